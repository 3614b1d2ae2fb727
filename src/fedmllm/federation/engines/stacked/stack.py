"""Adapters of many clients on one frozen base.

Each row of a batch passes through its own client's LoRA. Equal to training one client after another up to the order of
summation: the base never changes, so rows of different clients may share a pass.

Shapes: K clients, P weights of one adapter, T of them trained, B rows, L tokens, C channels in, D channels out, r rank,
M modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedmllm.backbones.base import Backbone
from fedmllm.backbones.dropout import RowDropout
from fedmllm.backbones.modality_gate import GateLayer, ModalityGate
from fedmllm.backbones.peft_names import LoraLayer
from fedmllm.core.tensors import cut, padded, same_names
from fedmllm.core.types import Params

_ADAPTER = "default"  # PEFT's name of the one adapter


@dataclass(frozen=True)
class Target:
    """An adapted linear layer, and the saved names of its A [r, C] and B [D, r]."""

    layer: Any  # PEFT's LoraLayer
    a: str
    b: str


def find_targets(backbone: Backbone) -> tuple[list[Target], str]:
    """(the adapted layers, "") if LoRA on linear layers is all that is trained; else ([], what else there is)."""
    names = {id(parameter): name for name, parameter in backbone.trainable().items()}
    targets, gate = [], gate_of(backbone)
    for layer_ in gate.layers if gate else ():
        names.pop(id(layer_.weight))
    for name, layer in backbone.model.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (getattr(layer, part)[_ADAPTER] for part in ("lora_A", "lora_B"))
            linear = all(isinstance(module, nn.Linear) for module in (layer.get_base_layer(), a, b))
            if not linear or layer.lora_variant or b.bias is not None:
                return [], f"{name} is not plain LoRA on a linear layer"
            targets.append(Target(layer, names.pop(id(a.weight)), names.pop(id(b.weight))))
    if names:
        return (
            [],
            f"{len(names)} tensors are trained in addition to LoRA on linear layers, such as {min(names.values())}",
        )
    return targets, "" if targets else "the backbone has no LoRA layer of PEFT"


def gate_of(backbone: Backbone) -> ModalityGate | None:
    """The backbone's modality gate, if it has one."""
    gate: ModalityGate | None = getattr(backbone, "gate", None)
    return gate


class Stack:
    """K adapters as the rows of one matrix [K, P], the gradients of what trains as the rows of another.

    A's and B's are views of the matrices and a backward pass adds to `grads_KT`, so an optimizer, clipping or a proximal
    term is one operation over all clients. NaN of one client stays in its row: nothing here adds two rows.

    The first T of the P columns train, the rest stay. Adapters of unequal rank are padded to the largest with zeros, which
    have zero gradients.

    Args:
        targets: The adapted layers (`find_targets`).
        live: The backbone's trainable parameters: their device and type become the stack's.
        starts: The adapter that each client starts from. One object for all is stored once.
        trained: Names that train; None = all.
        frozens: The frozen adapter of each client (`Sent.frozen`), or one for all; () = none.
        scale: Factor of every client's product (`Sent.scale`).
        gate: The backbone's modality gate; None = it has none.
    """

    def __init__(
        self,
        targets: list[Target],
        live: dict[str, nn.Parameter],
        starts: Sequence[Params],
        trained: frozenset[str] | None = None,
        frozens: Sequence[Params] = (),
        scale: float = 1.0,
        gate: ModalityGate | None = None,
    ) -> None:
        shared = all(start is starts[0] for start in starts)
        largest = starts[0] if shared else largest_of(starts)
        same_names(dict[str, Tensor](live), padded(largest, live))  # raises unless every adapter fits the model
        self._like = next(iter(live.values()))
        rests = {name: trained is not None and name not in trained for name in largest}
        self._shapes = {name: largest[name] for name in sorted(largest, key=lambda name: rests[name])}
        self.sizes = {name: t.numel() for name, t in self._shapes.items()}
        self.num_trained = sum(size for name, size in self.sizes.items() if not rests[name])
        self.anchor_KP = self.matrix(starts[:1] if shared else starts)
        self.weights_KP = self.anchor_KP.repeat(len(starts), 1) if shared else self.anchor_KP.clone()
        self.grads_KT = torch.zeros_like(self.weights_KP[:, : self.num_trained])
        weights, grads = self.views(self.weights_KP), self.views(self.grads_KT)
        self._targets, self._rows_ST = targets, self.grads_KT[:0]
        self._layers = [_Layer(t.layer, weights[t.a], weights[t.b], grads.get(t.a), grads.get(t.b)) for t in targets]
        for layer in self._layers:
            layer.own_scaling = layer.scaling * scale
        gates = gate.layers if gate else []
        self._gates = [_Gate(layer, weights[layer.name], grads.get(layer.name)) for layer in gates]
        self._parts: list[_Layer | _Gate] = [*self._layers, *self._gates]
        if frozens:
            largest = largest_of(frozens)
            for target, layer in zip(targets, self._layers, strict=True):
                if target.a in largest and len(largest[target.a]):
                    a, b = (
                        torch.stack([padded({n: f[n]}, largest)[n] for f in frozens]).to(self._like)
                        for n in (target.a, target.b)
                    )
                    layer.frozen = (a, b)

    def views(self, matrix_KP: Tensor) -> dict[str, Tensor]:
        """Name -> [K, *shape], a view; of the names whose columns the matrix has."""
        views, begin = {}, 0
        for name, size in self.sizes.items():
            if begin == matrix_KP.shape[1]:
                break
            shape = (len(matrix_KP), *self._shapes[name].shape)
            views[name] = matrix_KP[:, begin : begin + size].view(shape)
            begin += size
        return views

    @contextmanager
    def installed(self) -> Iterator[Callable[[Tensor], None]]:
        """While open, the model runs with these adapters. Yields a setter of each row's client (0..K-1), int64 [B]."""
        for part in self._parts:
            part.install()
        try:
            yield self._use
        finally:
            for part in self._parts:
                part.remove()

    def _use(self, clients_B: Tensor) -> None:
        for part in self._parts:
            part.clients_B = part.slots_B = clients_B

    def unit_gradients(self, num_units: int, slots_B: Tensor, adds: bool = False) -> Tensor:
        """Gradients [S, T] to which the next backward pass adds those of its rows, instead of to `grads_KT`.

        Rows are already multiplied one by one in the backward pass, so this costs memory and no second pass. Call it
        between the setter of `installed` and the forward pass; the tensor is used again for the next pass.

        Args:
            num_units: S, rows or groups of rows.
            slots_B: The unit of each row of the pass.
            adds: Whether to keep what the passes before have added; otherwise all are zeros first.
        """
        if len(self._rows_ST) < num_units:
            self._rows_ST = self.grads_KT.new_zeros(num_units, self.num_trained)
        rows_ST = self._rows_ST[:num_units]
        if not adds:
            rows_ST.zero_()
        grads = self.views(rows_ST)
        for target, layer in zip(self._targets, self._layers, strict=True):
            layer.da_KrC, layer.db_KDr, layer.slots_B = grads.get(target.a), grads.get(target.b), slots_B
        for gate in self._gates:
            gate.grads_KMD, gate.slots_B = grads.get(gate.layer.name), slots_B
        return rows_ST

    def trained(self) -> Params:
        """Tensors of the names that train, in the stack's shapes; their values mean nothing."""
        return {name: self._shapes[name] for name in self.views(self.grads_KT)}

    def matrix(self, trees: Sequence[Params]) -> Tensor:
        """One row a tree, in the layout, device and type of the weights; of those names alone that the first tree has."""
        names = [name for name in self.sizes if name in trees[0]]
        whole = (padded(tree, self._shapes) for tree in trees)
        rows = [torch.cat([tree[name].reshape(-1) for name in names]) for tree in whole]
        return torch.stack(rows).to(self._like.device, self._like.dtype)

    def params(self, row_P: Tensor, like: Params) -> Params:
        """A row's tensors in the shapes and the order of `like`: copies on the CPU, float32 (float64 where the start is).

        A row of T columns holds the names that train.
        """
        views = self.views(row_P.cpu()[None])
        return {name: cut({name: views[name][0]}, like)[name].clone() for name in like if name in views}


_NOTHING = torch.zeros(0)


def largest_of(trees: Sequence[Params]) -> Params:
    """Zeros in the largest shape that each tensor has in any of the trees."""
    same_names(*(dict.fromkeys(tree, _NOTHING) for tree in trees))
    shapes = {name: [max(sizes) for sizes in zip(*(t[name].shape for t in trees), strict=True)] for name in trees[0]}
    return {name: trees[0][name].new_zeros(shape) for name, shape in shapes.items()}


class _Layer:
    """Replacement of one PEFT layer's forward pass. A factor without a gradient tensor does not train."""

    def __init__(self, layer: Any, a_KrC: Tensor, b_KDr: Tensor, da_KrC: Tensor | None, db_KDr: Tensor | None) -> None:
        self.a_KrC, self.b_KDr, self.da_KrC, self.db_KDr = a_KrC, b_KDr, da_KrC, db_KDr
        self._layer, self._base = layer, layer.base_layer
        self._dropout: RowDropout = layer.lora_dropout[_ADAPTER]
        self.scaling = float(layer.scaling[_ADAPTER])
        self.own_scaling = self.scaling  # of the clients' adapters, not of a frozen one
        self.clients_B = torch.zeros(0, dtype=torch.int64)  # whose weights each row of a pass uses
        self.slots_B = self.clients_B  # to which line of the gradients it adds
        self.frozen: tuple[Tensor, Tensor] | None = None  # A [1 or K, q, C] and B [1 or K, D, q]
        self._switch = a_KrC.new_zeros(()).requires_grad_()  # so that autograd calls our backward pass

    def install(self) -> None:
        self._layer.forward = self._forward  # an instance attribute hides the method of the class

    def remove(self) -> None:
        del self._layer.forward

    def _forward(self, x_BLC: Tensor) -> Tensor:
        keep_BLC, gain = self._dropout.mask(x_BLC)
        base_BLD = self._base(x_BLC)
        if self.frozen:
            base_BLD = self._with_frozen(x_BLC, base_BLD)
        out: Tensor = _RowLora.apply(x_BLC, base_BLD, self._switch, keep_BLC, gain, self)  # type: ignore[no-untyped-call]
        return out

    def _with_frozen(self, x_BLC: Tensor, base_BLD: Tensor) -> Tensor:
        """base + scaling * B A x with the frozen adapter of each row's client, without dropout."""
        assert self.frozen
        a, b = (t if len(t) == 1 else t.index_select(0, self.clients_B) for t in self.frozen)
        more_BLD = (x_BLC.to(a.dtype) @ a.mT) @ b.mT
        return (base_BLD.to(more_BLD.dtype) + self.scaling * more_BLD).to(base_BLD.dtype)


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
        ctx.save_for_backward(x_BLC, keep_BLC, low_BLr, a_BrC, b_BDr, layer.slots_B)
        ctx.layer, ctx.scaling = layer, gain * layer.own_scaling
        sum_BLD = torch.baddbmm(base_BLD.to(low_BLr.dtype), low_BLr, b_BDr.mT, alpha=ctx.scaling)
        return sum_BLD.to(base_BLD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BLD: Tensor) -> Any:
        x_BLC, keep_BLC, low_BLr, a_BrC, b_BDr, slots_B = ctx.saved_tensors
        layer: _Layer = ctx.layer
        wide_BLD = grad_BLD.to(low_BLr.dtype)
        if layer.db_KDr is not None:
            layer.db_KDr.index_add_(0, slots_B, torch.bmm(wide_BLD.mT, low_BLr * ctx.scaling))
        dlow_BLr = torch.bmm(wide_BLD, b_BDr * ctx.scaling)
        if keep_BLC is not None:
            keep_BLC = keep_BLC.to(a_BrC.dtype)  # kept in a quarter of the bytes; two products follow
        if layer.da_KrC is not None:
            layer.da_KrC.index_add_(0, slots_B, torch.bmm(dlow_BLr.mT, _dropped(x_BLC, keep_BLC, a_BrC.dtype)))
        dx_BLC = None
        if ctx.needs_input_grad[0]:
            dx_BLC = torch.bmm(dlow_BLr, a_BrC)
            dx_BLC = (dx_BLC if keep_BLC is None else dx_BLC.mul_(keep_BLC)).to(x_BLC.dtype)
        return dx_BLC, grad_BLD if ctx.needs_input_grad[1] else None, None, None, None, None


class _Gate:
    """Replacement of one layer's modality gate. Without a gradient tensor it does not train."""

    def __init__(self, layer: GateLayer, weights_KMD: Tensor, grads_KMD: Tensor | None) -> None:
        self.layer, self.weights_KMD, self.grads_KMD = layer, weights_KMD, grads_KMD
        self.clients_B = self.slots_B = torch.zeros(0, dtype=torch.int64)
        self._switch = weights_KMD.new_zeros(()).requires_grad_()

    def install(self) -> None:
        self.layer.instead = self._add

    def remove(self) -> None:
        self.layer.instead = None

    def _add(self, keys_BLD: Tensor) -> Tensor:
        out: Tensor = _RowGate.apply(keys_BLD, self._switch, self)  # type: ignore[no-untyped-call]
        return out


class _RowGate(torch.autograd.Function):
    """Keys + the vector of each token's modality, of the row's own client."""

    @staticmethod
    def forward(ctx: Any, keys_BLD: Tensor, switch: Tensor, gate: _Gate) -> Tensor:
        ctx.gate, ctx.slots_B, ctx.pictures_BL1 = gate, gate.slots_B, gate.layer.pictures_BL1
        text_B1D, picture_B1D = (
            gate.weights_KMD.index_select(0, gate.clients_B).to(keys_BLD.dtype)[:, :, None].unbind(1)
        )
        return keys_BLD + torch.where(ctx.pictures_BL1, picture_B1D, text_B1D)

    @staticmethod
    def backward(ctx: Any, grad_BLD: Tensor) -> Any:
        gate: _Gate = ctx.gate
        if gate.grads_KMD is not None:
            wide_BLD = grad_BLD.to(gate.grads_KMD.dtype)
            picture_BD = (wide_BLD * ctx.pictures_BL1).sum(1)
            text_BD = (wide_BLD * ~ctx.pictures_BL1).sum(1)
            gate.grads_KMD.index_add_(0, ctx.slots_B, torch.stack([text_BD, picture_BD], dim=1))
        return grad_BLD, None, None


def _dropped(x_BLC: Tensor, keep_BLC: Tensor | None, dtype: torch.dtype) -> Tensor:
    x_BLC = x_BLC.to(dtype)
    return x_BLC if keep_BLC is None else x_BLC * keep_BLC
