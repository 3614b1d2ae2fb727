"""A saved adapter's names are those that vLLM's LoRA loader takes, by vLLM's published rules (vllm/lora, models/*.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedmllm.backbones.hf import TransformersBackbone

# Prefixes of checkpoint names -> vLLM's modules. Of families whose classes are SupportsLoRA there.
LANGUAGE_MODEL = ("model.language_model.", "language_model.model.")
MAPPERS = {
    "minicpmv2.6": ("llm.model.", "llm.model."),
    "minicpm-llama3-v2.5": ("llm.model.", "llm.model."),
    "minicpmv4_6": LANGUAGE_MODEL,
    "qwen2_vl": LANGUAGE_MODEL,
    "qwen2_5_vl": LANGUAGE_MODEL,
    "qwen3_vl": LANGUAGE_MODEL,
    "qwen3_5": LANGUAGE_MODEL,
    "gemma3": LANGUAGE_MODEL,
    "llava": LANGUAGE_MODEL,
    "internvl": LANGUAGE_MODEL,
}
# vLLM fuses these; its loader packs the parts of an adapter by these last names
PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "out_proj"}


@pytest.mark.parametrize("family", MAPPERS)
def test_every_tensor_lands_in_vllm_s_language_model(
    loaded: Callable[[str], TransformersBackbone], tmp_path: Path, family: str
) -> None:
    loaded(family).save(tmp_path)
    old, new = MAPPERS[family]
    for name in load_file(tmp_path / "adapter_model.safetensors"):
        assert name.startswith("base_model.model.")
        inner = name.removeprefix("base_model.model.")
        assert inner.startswith(old)
        module, kind, last = (new + inner.removeprefix(old)).rsplit(".", 2)
        assert last == "weight"
        assert kind in ("lora_A", "lora_B")
        assert re.fullmatch(re.escape(new) + r"layers\.\d+\.(self_attn|linear_attn)\.\w+", module)
        assert module.rsplit(".", 1)[1] in PARTS


def test_the_configuration_is_one_that_vllm_reads(
    loaded: Callable[[str], TransformersBackbone], tmp_path: Path
) -> None:
    """target_modules: a list, of which vLLM reads each last part; no bias, no DoRA, no whole modules; r and lora_alpha."""
    loaded("qwen2_vl").save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name.rsplit(".", 1)[1] for name in config["target_modules"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert config["peft_type"] == "LORA"
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert isinstance(config["lora_alpha"], int)
