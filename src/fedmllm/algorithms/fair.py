"""LoRA-FAIR: a correction of the mean B towards the mean product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat

from fedmllm.algorithms.base import WithServer
from fedmllm.algorithms.lowrank import A, B, Pair, pairs, rebuilt, shares
from fedmllm.core.tensors import mean_delta
from fedmllm.core.types import ClientUpdate, Params, Round, State

if TYPE_CHECKING:
    from torch import Tensor


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
                delta[partner] = delta[partner] + self._correction(mean, clients, shares(used)).to(weight.dtype)
        return self.step(params, state, at, delta)

    def _correction(self, mean: Pair, clients: Sequence[Pair], weights: Sequence[float]) -> Tensor:
        """dB of one module."""
        import torch

        b_mean, a_mean = mean
        gram = a_mean @ a_mean.mT
        residual = -(b_mean @ gram)
        for p, (b, a) in zip(weights, clients, strict=True):
            residual += p * (b @ (a @ a_mean.mT))
        ridge = self.penalty * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        solution: Tensor = torch.linalg.lstsq(gram + ridge, residual.mT, driver="gelsd").solution
        return solution.mT
