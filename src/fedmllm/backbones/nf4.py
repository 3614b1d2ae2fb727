"""Four-bit weights (NF4, arXiv:2305.14314) by bitsandbytes.

They come from a full checkpoint, or from a folder that is quantized already.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedmllm.core.errors import ConfigError

# Left alone by the hub's own openbmb/MiniCPM-V-2_6-int4; for other families transformers finds the head itself.
SKIPPED = {"minicpmv": ["out_proj", "kv_proj", "lm_head"]}


def is_quantized(folder: Path) -> bool:
    """True if the folder's weights are in bitsandbytes' four bits already.

    Raises:
        ConfigError: They are quantized in another way.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if not config:
        return False
    if not config.get("load_in_4bit"):
        raise ConfigError(
            f"{folder / 'config.json'}: quantization_config is {config.get('quant_method', '?')}; "
            "of quantized folders only bitsandbytes' 4-bit ones can be trained here"
        )
    return True


def check(folder: Path, base: str) -> None:
    """Check that `precision.base` fits the folder and this machine.

    Raises:
        ConfigError: It does not.
    """
    quantized = is_quantized(folder)
    if quantized and base != "nf4":
        raise ConfigError(f"precision.base: got {base!r}, but {folder} holds 4-bit weights; set 'nf4'")
    if base == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("precision.base: 'nf4' needs the package bitsandbytes: pip install 'fedmllm[nf4]'")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Type of the arithmetic and of the other weights: bfloat16 on CUDA, float32 on CPUs, most of which are slow in it."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def options(folder: Path, family: str, device: torch.device, whole: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of `from_pretrained` in addition to dtype. Modules that are trained whole stay as they are."""
    placed: dict[str, Any] = {"device_map": {"": str(device)}}
    if is_quantized(folder):
        return placed
    from transformers import BitsAndBytesConfig

    return placed | {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(device),
            llm_int8_skip_modules=[*SKIPPED.get(family, ["lm_head"]), *whole] if family in SKIPPED or whole else None,
        )
    }


def keep_trainable(model: nn.Module, dtype: torch.dtype) -> None:
    """Switch off two features that would stop training silently.

    On CPUs with AVX512-BF16 one evaluation pass repacks the weights for good, and training after it gets no gradient. A
    folder that was quantized on another machine has a compute type of its own.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype
            module.compute_type_is_set = True
