"""The adapters of many clients on one frozen base: each row of a batch goes through its own client's LoRA.

Sequential training in another order of summation: the base never changes, so rows of different clients may share a pass.

Shapes: K clients, P weights of one adapter, B rows, L tokens, C channels in, D channels out, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedmllm.backbones.base import Backbone
from fedmllm.backbones.dropout import RowDropout
from fedmllm.core.tensors import same_names
from fedmllm.core.types import Params

ADAPTER = "default"  # PEFT's name of the only adapter that we make


@dataclass(frozen=True)
class Target:
    """An adapted linear layer, and the saved names of its A [r, C] and B [D, r]."""

    layer: Any  # PEFT's LoraLayer
    a: str
    b: str


def find_targets(backbone: Backbone) -> tuple[list[Target], str]:
    """(the adapted layers, "") where LoRA on linear layers is all that is trained; else ([], what else there is)."""
    names = {id(parameter): name for name, parameter in backbone.trainable().items()}
    targets = []
    for name, layer in backbone.model.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (getattr(layer, part)[ADAPTER] for part in ("lora_A", "lora_B"))
            linear = all(isinstance(module, nn.Linear) for module in (layer.get_base_layer(), a, b))
            if not linear or layer.lora_variant or b.bias is not None:
                return [], f"{name} is no plain LoRA on a linear layer"
            targets.append(Target(layer, names.pop(id(a.weight)), names.pop(id(b.weight))))
    if names:
        return [], f"{len(names)} tensors are trained besides LoRA on linear layers, such as {min(names.values())}"
    return targets, "" if targets else "the backbone has no LoRA layer of PEFT"


class Stack:
    """K adapters as the rows of one matrix [K, P], their gradients as the rows of another.

    A's and B's are views of the matrices and a backward pass adds to `grads_KP`, so an optimiser, clipping or a proximal
    pull is one operation over all clients. NaN of one client stays in its row: nothing here adds two rows.

    Args:
        targets: The adapted layers (`find_targets`).
        live: The backbone's trainable parameters: their device and type become the stack's.
        start: Where every adapter begins.
        num_clients: K.
    """

    def __init__(self, targets: list[Target], live: dict[str, nn.Parameter], start: Params, num_clients: int) -> None:
        same_names(dict[str, Tensor](live), start)
        like = next(iter(live.values()))
        self._start = start
        self.sizes = {name: t.numel() for name, t in start.items()}
        self._like = like
        self.anchor_P = self.matrix([start])[0]
        self.weights_KP = self.anchor_P.repeat(num_clients, 1)
        self.grads_KP = torch.zeros_like(self.weights_KP)
        weights, grads = self._views(self.weights_KP), self._views(self.grads_KP)
        self._layers = [_Layer(t.layer, weights[t.a], weights[t.b], grads[t.a], grads[t.b]) for t in targets]

    def _views(self, matrix_KP: Tensor) -> dict[str, Tensor]:
        """Name -> [K, *shape], a view."""
        pieces = torch.split(matrix_KP, list(self.sizes.values()), dim=1)
        shapes = {name: (len(matrix_KP), *t.shape) for name, t in self._start.items()}
        return {name: piece.view(shapes[name]) for name, piece in zip(self.sizes, pieces, strict=True)}

    @contextmanager
    def installed(self) -> Iterator[Callable[[Tensor], None]]:
        """While open, the model runs with these adapters. Yields what takes the client (0..K-1) of each row, int64 [B]."""
        for layer in self._layers:
            layer.install()
        try:
            yield self._use
        finally:
            for layer in self._layers:
                layer.remove()

    def _use(self, clients_B: Tensor) -> None:
        for layer in self._layers:
            layer.clients_B = clients_B

    def matrix(self, trees: Sequence[Params]) -> Tensor:
        """One row a tree, in the layout, device and type of the weights."""
        rows = [torch.cat([tree[name].reshape(-1) for name in self.sizes]) for tree in trees]
        return torch.stack(rows).to(self._like.device, self._like.dtype)

    def params(self, row_P: Tensor) -> Params:
        """A row as tensors by name: copies on the CPU, float32 (float64 where the start is)."""
        pieces = torch.split(row_P.cpu(), list(self.sizes.values()))
        return {name: piece.view(t.shape).clone() for (name, t), piece in zip(self._start.items(), pieces, strict=True)}


class _Layer:
    """Stands in for one PEFT layer's forward pass."""

    def __init__(self, layer: Any, a_KrC: Tensor, b_KDr: Tensor, da_KrC: Tensor, db_KDr: Tensor) -> None:
        self.a_KrC, self.b_KDr, self.da_KrC, self.db_KDr = a_KrC, b_KDr, da_KrC, db_KDr
        self._layer, self._base = layer, layer.base_layer
        self._dropout: RowDropout = layer.lora_dropout[ADAPTER]
        self.scaling = float(layer.scaling[ADAPTER])
        self.clients_B = torch.zeros(0, dtype=torch.int64)
        self._switch = a_KrC.new_zeros(()).requires_grad_()  # so that autograd calls our backward pass

    def install(self) -> None:
        self._layer.forward = self._forward  # an attribute of the instance goes before the method of its class

    def remove(self) -> None:
        del self._layer.forward

    def _forward(self, x_BLC: Tensor) -> Tensor:
        keep_BLC, gain = self._dropout.mask(x_BLC)
        out: Tensor = _RowLora.apply(x_BLC, self._base(x_BLC), self._switch, keep_BLC, gain, self)  # type: ignore[no-untyped-call]
        return out


class _RowLora(torch.autograd.Function):
    """base + scaling * B A dropout(x), each row with its client's A and B, in the adapters' type as in PEFT.

    Written out because autograd would make a zero [K, r, C] a layer and pass for the gradient of picking A's, and keep
    dropout(x) for each of q, k and v where x is one tensor. Only x, the mask and the [B, L, r] between A and B are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BLC: Tensor, base_BLD: Tensor, switch: Tensor, keep_BLC: Tensor | None, gain: float, layer: _Layer
    ) -> Tensor:
        a_BrC = layer.a_KrC.index_select(0, layer.clients_B)
        b_BDr = layer.b_KDr.index_select(0, layer.clients_B)
        low_BLr = torch.bmm(_dropped(x_BLC, keep_BLC, a_BrC.dtype), a_BrC.mT)
        ctx.save_for_backward(x_BLC, keep_BLC, low_BLr, a_BrC, b_BDr, layer.clients_B)
        ctx.layer, ctx.scaling = layer, gain * layer.scaling
        sum_BLD = torch.baddbmm(base_BLD.to(low_BLr.dtype), low_BLr, b_BDr.mT, alpha=ctx.scaling)
        return sum_BLD.to(base_BLD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BLD: Tensor) -> Any:
        x_BLC, keep_BLC, low_BLr, a_BrC, b_BDr, clients_B = ctx.saved_tensors
        layer: _Layer = ctx.layer
        wide_BLD = grad_BLD.to(low_BLr.dtype)
        layer.db_KDr.index_add_(0, clients_B, torch.bmm(wide_BLD.mT, low_BLr * ctx.scaling))
        dlow_BLr = torch.bmm(wide_BLD, b_BDr * ctx.scaling)
        if keep_BLC is not None:
            keep_BLC = keep_BLC.to(a_BrC.dtype)  # kept in a quarter of the bytes; two products follow
        layer.da_KrC.index_add_(0, clients_B, torch.bmm(dlow_BLr.mT, _dropped(x_BLC, keep_BLC, a_BrC.dtype)))
        dx_BLC = None
        if ctx.needs_input_grad[0]:
            dx_BLC = torch.bmm(dlow_BLr, a_BrC)
            dx_BLC = (dx_BLC if keep_BLC is None else dx_BLC.mul_(keep_BLC)).to(x_BLC.dtype)
        return dx_BLC, grad_BLD if ctx.needs_input_grad[1] else None, None, None, None, None


def _dropped(x_BLC: Tensor, keep_BLC: Tensor | None, dtype: torch.dtype) -> Tensor:
    x_BLC = x_BLC.to(dtype)
    return x_BLC if keep_BLC is None else x_BLC * keep_BLC
