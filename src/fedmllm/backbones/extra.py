"""Modules that are trained and sent whole, in addition to LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedmllm.backbones.peft_names import ModulesToSaveWrapper, PeftModel
from fedmllm.core.errors import ConfigError
from fedmllm.core.spec import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def extra_modules(model: PreTrainedModel, names: tuple[str, ...]) -> list[str]:
    """Full names of the modules of `train_extra`.

    Args:
        model: The base.
        names: A module's whole name, or its last part if no other module has it.

    Raises:
        ConfigError: No module or several have a name, one is held in four bits, or shares its weights with another module.
    """
    known = {name: module for name, module in model.named_modules() if name}
    chosen = []
    for name in names:
        fits = [full for full in known if full == name or full.endswith("." + name)]
        if len(fits) != 1:
            last = sorted({full.rsplit(".", 1)[-1] for full in known if not full[-1].isdigit()})
            found = f"{len(fits)} modules have this name: {fits[:3]}" if fits else "no module has this name"
            raise ConfigError(f"lora.train_extra: {name!r}: {found}{nearest(name, last)}")
        if not all(parameter.is_floating_point() for parameter in known[fits[0]].parameters()):
            raise ConfigError(
                f"lora.train_extra: {fits[0]!r} is held in four bits in this folder and cannot be trained whole"
            )
        mine = {id(parameter) for parameter in known[fits[0]].parameters()}
        shared = [
            full
            for full, module in known.items()
            if not _within(full, fits[0]) and not _within(fits[0], full) and _own(module) & mine
        ]
        if shared:
            raise ConfigError(f"lora.train_extra: {fits[0]!r} is tied to {shared[0]!r}: training it would untie them")
        chosen.append(fits[0])
    return chosen


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


def _own(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters(recurse=False)}


def widen(peft: PeftModel, dtype: torch.dtype) -> None:
    """Hold the trained copies in at least float32 on any base: an AdamW step is lost in bfloat16's rounding.

    Such a module computes in float32; its output has the base's type again.
    """
    if dtype in (torch.float32, torch.float64):
        return
    for wrapper in peft.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            copy = wrapper.modules_to_save["default"].float()
            copy.register_forward_pre_hook(
                lambda _, args, kwargs: (_cast(args, torch.float32), _cast(kwargs, torch.float32)), with_kwargs=True
            )
            copy.register_forward_hook(lambda _module, _args, output: _cast(output, dtype))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(v, dtype) for v in value)
    if type(value) is dict:
        return {key: _cast(v, dtype) for key, v in value.items()}
    return value
