"""FedRot-LoRA: rotation of the clients' factors before they are averaged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedmllm.algorithms.base import WithServer
from fedmllm.algorithms.lowrank import Pair, pairs, rebuilt, unpaired
from fedmllm.core.tensors import mean_delta
from fedmllm.core.types import ClientUpdate, Params, Round, State

if TYPE_CHECKING:
    from torch import Tensor


class FedRotLora(WithServer):
    """Mean of (B_k Q_k, Q_k' A_k) with rotations Q_k that leave each product as it is (arXiv:2602.23638).

    Q_k is the rotation with the least |Q'A_k - A| in odd rounds, |B_k Q - B| in even ones, A and B those of the start.
    """

    name: Literal["fedrot-lora"] = "fedrot-lora"
    amount: Annotated[float, Field(ge=0, le=1)] = 0.5
    """l: the rotation applied is the orthogonal polar factor of (1 - l) I + l Q; 0 = none, which is plain averaging."""

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        def turned() -> Iterator[ClientUpdate]:
            for update in updates:
                if self.amount == 0 or at.number == 1 or not update.num_examples:
                    yield update
                    continue
                sent = self.sends(params, state, at, update.client)
                start, local = pairs(sent.start), pairs(rebuilt(sent, update))
                moved = {n: _turned(local[n], start[n], at.number % 2 == 1, self.amount) for n in local}
                delta = {n: (moved[n][0] - start[n][0], moved[n][1] - start[n][1]) for n in local}
                yield replace(update, delta={**update.delta, **unpaired(delta, update.delta)})

        return self.step(params, state, at, mean_delta(turned()))


def _turned(pair: Pair, start: Pair, by_a: bool, amount: float) -> Pair:
    """(B Q, Q'A) with Q the rotation, softened by `amount`, that brings A (or B) nearest to the start's."""
    import torch

    (b, a), (b0, a0) = ((t.double() for t in p) for p in (pair, start))
    u, _, vt = torch.linalg.svd(a0 @ a.mT if by_a else b0.mT @ b)  # = U S V'; Q = V diag(1, .., det) U'
    q = _rotation(vt.mT, u)
    left, _, right = torch.linalg.svd((1 - amount) * torch.eye(len(q), dtype=q.dtype) + amount * q)
    q = left @ right
    return (b @ q).to(pair[0].dtype), (q.mT @ a).to(pair[1].dtype)


def _rotation(v: Tensor, u: Tensor) -> Tensor:
    """V diag(1, .., 1, det(V U')) U': orthogonal with determinant 1."""
    import torch

    last = v.clone()
    last[:, -1] *= torch.sign(torch.linalg.det(v @ u.mT))
    return last @ u.mT
