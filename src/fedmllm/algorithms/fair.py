"""LoRA-FAIR: a correction of the mean B towards the mean product."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from fedmllm.algorithms.base import WithServer
from fedmllm.algorithms.lowrank import A, B, Pair, concatenated, pairs, product_norm, rebuilt, shares
from fedmllm.core.tensors import mean_delta
from fedmllm.core.types import ClientUpdate, Params, Round, State

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-9  # of a gradient times |Bm|, at and below which it is rounding


class LoraFair(WithServer):
    """Bm, Am the factor means, M = sum p_k B_k A_k: min over dB of |(Bm + dB) Am - M|^2 + lambda |dB|^2 (arXiv:2411.14961).

    In closed form, r x r only: dB = (sum p_k B_k (A_k Am') - Bm G)(G + lambda I)^-1 with G = Am Am'. The paper minimises
    1 - cosine by SGD instead. All updates of a round are in memory at once.
    """

    name: Literal["lora-fair"] = "lora-fair"
    penalty: NonNegativeFloat = 0.01
    """lambda, relative to tr(G) / r. Towards 0 the fit is exact in the rows of Am; the paper found 0 itself far worse."""

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        listed = list(updates)
        delta = mean_delta(listed)
        used = [update for update in listed if update.num_examples]
        locals_ = [pairs(rebuilt(self.sends(params, state, at, u.client), u)) for u in used]
        for name, weight in delta.items():
            if A in name:
                partner = name.replace(A, B)
                mean = ((params[partner] + delta[partner]).double(), (params[name] + weight).double())
                clients = [(b.double(), a.double()) for b, a in (local[name] for local in locals_)]
                delta[partner] = delta[partner] + self.correction(mean, clients, shares(used)).to(weight.dtype)
        return self.step(params, state, at, delta)

    def correction(self, mean: Pair, clients: Sequence[Pair], weights: Sequence[float]) -> Tensor:
        """Return dB of one module.

        Args:
            mean: (Bm, Am), the means of the factors, in float64.
            clients: Each client's pair.
            weights: p_k of each client.

        Returns:
            A tensor in the shape of Bm.
        """
        import torch

        b_mean, a_mean = mean
        gram = a_mean @ a_mean.mT
        residual = -(b_mean @ gram)
        for p, (b, a) in zip(weights, clients, strict=True):
            residual += p * (b @ (a @ a_mean.mT))
        ridge = self.penalty * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        solution: Tensor = torch.linalg.lstsq(gram + ridge, residual.mT, driver="gelsd").solution
        return solution.mT


class LoraFairReference(LoraFair):
    """The published objective, by gradient descent from dB = 0: 1 - cos((Bm + dB) Am, M) + penalty |dB| for each module
    (arXiv:2411.14961). The cosine leaves the length of the product open, so M itself is not the minimum.

    Rate and number of steps are ours: descent on the whole objective, without draws.
    """

    name: Literal["lora-fair-reference"] = "lora-fair-reference"  # type: ignore[assignment]
    penalty: NonNegativeFloat = 0.01
    """Weight of the norm of dB."""
    step_size: PositiveFloat = 0.1
    """Length of the first step, relative to |Bm|; later ones fall to 0 by the cosine schedule."""
    num_steps: PositiveInt = 100
    """Steps of the descent."""

    def correction(self, mean: Pair, clients: Sequence[Pair], weights: Sequence[float]) -> Tensor:
        b_mean, a_mean = mean
        target = concatenated([(p * b, a) for p, (b, a) in zip(weights, clients, strict=True)])
        size, length = product_norm([target]), float(b_mean.norm())
        best = b_mean.new_zeros(b_mean.shape)
        if not size or not float(product_norm([mean])):
            return best
        gram, cross = a_mean @ a_mean.mT, target[0] @ (target[1] @ a_mean.mT)

        def objective(change: Tensor) -> tuple[float, Tensor]:
            b = b_mean + change
            whole = float(((b @ gram) * b).sum()) ** 0.5
            cosine, moved = float((cross * b).sum()) / (size * whole), float(change.norm())
            gradient = cosine * (b @ gram) / whole**2 - cross / (size * whole)
            return 1 - cosine + self.penalty * moved, gradient + (
                self.penalty / moved * change if moved else 0 * change
            )

        change, (least, gradient) = best, objective(best)
        for step in range(self.num_steps):
            steepness = float(gradient.norm())
            if steepness < TINY / length:
                break
            rate = self.step_size * length / 2 * (1 + math.cos(math.pi * step / self.num_steps))
            change = change - rate / steepness * gradient
            value, gradient = objective(change)
            if value < least:
                best, least = change, value
        return best
