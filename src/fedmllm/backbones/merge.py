"""Merging of an adapter into its base.

W + scaling * B A is summed in float32 and rounded once to the base's own type.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn

from fedmllm.backbones import nf4
from fedmllm.backbones.base import FromFolder, Precision
from fedmllm.backbones.folder import family_of, load_model, quiet
from fedmllm.backbones.hub_kernels import without_hub_kernels
from fedmllm.backbones.peft_names import LoraLayer, PeftModel
from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import apply_umask, make_folder, writing

WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.onnx",
)


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Write `out`: the folder `base` with the adapter of the PEFT folder `adapter` in its weights.

    Everything but the weights is copied as it is. `out` appears when it is complete.

    Args:
        base: A model folder.
        adapter: A PEFT folder for it.
        out: A folder that does not exist yet.

    Raises:
        FedmllmError: `out` exists, the base is held in four bits, or the adapter does not fit it.
    """
    with writing(out):
        exists = out.exists()
        make_folder(out.parent)
    if exists:
        raise FedmllmError(f"{out} exists; name a folder that does not")
    if json.loads((adapter / "adapter_config.json").read_text()).get("modality_gate"):
        raise FedmllmError(
            f"{adapter}: it was trained with backbone.lora.modality_gate, whose vectors depend on a token's modality; no "
            "weight of the base can hold them. `fedmllm predict` uses the adapter as it is"
        )
    family = family_of(base)
    if nf4.is_quantized(base):
        raise FedmllmError(
            f"{base} holds 4-bit weights; merge into the full checkpoint that they were made from (--base)"
        )
    own = _own_type(base)
    held = "bfloat16" if own == torch.bfloat16 else "float64" if own == torch.float64 else "float32"
    spec = FromFolder(path=str(base), precision=Precision.model_validate({"base": held}))
    with quiet(), without_hub_kernels(), torch.random.fork_rng(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = load_model(base, family, spec, torch.device("cpu"))
        merged: Any = _merged(model, adapter).to(own)
        with writing(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
            folder = Path(temporary) / "model"
            merged.save_pretrained(folder)
            _copy_others(base, folder)
            apply_umask(folder)
            folder.rename(out)


def _own_type(base: Path) -> torch.dtype:
    """Type of the first floating-point matrix in the checkpoint."""
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                if len(part.get_shape()) > 1 and part[:1].is_floating_point():
                    return cast("torch.dtype", part[:1].dtype)
    raise FedmllmError(f"{base}: no *.safetensors with weights")


def _merged(model: nn.Module, adapter: Path) -> nn.Module:
    try:
        peft = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise FedmllmError(f"{adapter}: this adapter does not fit its base: {error}") from error
    for module in peft.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            delta = cast("Any", module).get_delta_weight("default")
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            weight.copy_(weight.to(wide) + delta.to(wide))
            if not bool(weight.isfinite().all()):
                raise FedmllmError(f"{adapter}: merging it gives weights that are not finite")
    plain: nn.Module = peft.unload()
    return plain


def _copy_others(base: Path, folder: Path) -> None:
    """Copy the configuration, the tokenizer, the processor and all other files next to the weights."""
    weights = {file.name for pattern in WEIGHTS for file in base.glob(pattern)}
    for file in base.iterdir():
        if file.is_file() and file.name not in weights:
            shutil.copyfile(file, folder / file.name)
