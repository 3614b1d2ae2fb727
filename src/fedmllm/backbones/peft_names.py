"""Names of PEFT, imported so that nothing is fetched.

PEFT imports bitsandbytes, which fetches compiled code at import if the package `kernels` is installed.
"""

from __future__ import annotations

from fedmllm.backbones.hub_kernels import without_hub_kernels

with without_hub_kernels():
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

__all__ = [
    "LoraConfig",
    "LoraLayer",
    "ModulesToSaveWrapper",
    "PeftModel",
    "get_peft_model",
    "get_peft_model_state_dict",
]
