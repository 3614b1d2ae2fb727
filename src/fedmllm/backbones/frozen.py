"""Adapters of any rank on a backbone: frozen ones, and results.

Shapes: C channels in, D channels out, q rank of the frozen adapter.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmllm.backbones.base import Backbone
from fedmllm.backbones.peft_names import LoraLayer
from fedmllm.core.errors import FedmllmError
from fedmllm.core.tensors import padded, rank_dim
from fedmllm.core.types import Params

_ADAPTER = "default"  # PEFT's name of the one adapter
_PREFIX = "base_model.model."  # of PEFT's saved names


def saved_names(module: str) -> tuple[str, str]:
    """Names under which PEFT saves A and B of a module of a PeftModel."""
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


@contextmanager
def frozen_adapter(backbone: Backbone, adapter: Params) -> Iterator[None]:
    """While open, each adapted layer's frozen part is y + s B (A x), without dropout; the base itself is not changed.

    Args:
        backbone: Whose scaling s applies, as for its live adapter.
        adapter: A [q, C] and B [D, q] under PEFT's saved names, any q per module; {} = none.

    Raises:
        FedmllmError: a tensor belongs to no adapted layer.
    """
    hooks, left = [], set(adapter)
    try:
        for name, layer in backbone.model.named_modules() if adapter else ():
            if isinstance(layer, LoraLayer) and (names := saved_names(name))[0] in adapter:
                left -= set(names)
                a, b = (adapter[n] for n in names)
                if a.shape[0]:
                    hooks.append(_add_to(layer, a, b))
        if left:
            raise FedmllmError(f"frozen adapter: {min(left)} belongs to no adapted layer")
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add_to(layer: Any, a_qC: Tensor, b_Dq: Tensor) -> Any:
    scaling = float(layer.scaling[_ADAPTER])
    like = layer.lora_A[_ADAPTER].weight
    a_qC, b_Dq = a_qC.to(like), b_Dq.to(like)

    def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        low = torch.nn.functional.linear(inputs[0].to(a_qC.dtype), a_qC)
        more = torch.nn.functional.linear(low, b_Dq)
        return (output.to(more.dtype) + scaling * more).to(output.dtype)

    return layer.base_layer.register_forward_hook(add)


@contextmanager
def scaled(backbone: Backbone, factor: float) -> Iterator[None]:
    """While open, the product of the live adapter is multiplied with `factor`; a frozen one that is open is not."""
    layers = [m for m in backbone.model.modules() if isinstance(m, LoraLayer)] if factor != 1.0 else []
    before = [layer.scaling[_ADAPTER] for layer in layers]
    try:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[_ADAPTER] = scaling * factor
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[_ADAPTER] = scaling


@contextmanager
def installed(backbone: Backbone, adapter: Params) -> Iterator[None]:
    """While open, the model computes with an adapter of any rank: the part over the backbone's own rank is frozen.

    The live adapter keeps its part afterwards.

    Raises:
        FedmllmError: names or shapes other than the rank differ from those of the backbone.
    """
    live: Params = dict(backbone.trainable())
    own, more = dict(adapter), {}
    for name, t in adapter.items():
        dim = rank_dim(name)
        if name in live and dim is not None and t.shape[dim] > (rank := live[name].shape[dim]):
            own[name] = t.narrow(dim, 0, rank)
            more[name] = t.narrow(dim, rank, t.shape[dim] - rank)
    backbone.set_lora(padded(own, live))
    with frozen_adapter(backbone, more):
        yield


def save_as(backbone: Backbone, adapter: Params, folder: Path) -> None:
    """Write an adapter of any rank so that `PeftModel.from_pretrained(base, folder)` loads it.

    The scaling s of the backbone holds at every rank R: lora_alpha = s R (s sqrt R with rsLoRA). Modules of another rank than
    most get their own entries in `rank_pattern` and `alpha_pattern`.
    """
    live: Params = dict(backbone.trainable())
    backbone.save(folder)
    if all(adapter[name].shape == t.shape for name, t in live.items()):
        return
    ranks = {name: t.shape[0] for name, t in adapter.items() if rank_dim(name) == 0}
    most, _ = Counter(ranks.values()).most_common(1)[0]
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    per_rank = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])

    def alpha(rank: int) -> float:
        value = per_rank * (math.sqrt(rank) if config["use_rslora"] else rank)
        return int(value) if float(value).is_integer() else value

    odd = {name.removeprefix(_PREFIX).removesuffix(".lora_A.weight"): r for name, r in ranks.items() if r != most}
    config |= {"r": most, "lora_alpha": alpha(most), "rank_pattern": odd}
    config["alpha_pattern"] = {name: alpha(rank) for name, rank in odd.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {name: adapter[name].contiguous() for name in live}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
