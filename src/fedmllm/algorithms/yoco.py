"""YOCO: one round, supervised by the frozen weights.

NeurIPS 2025, OpenReview FoVF3iL6o3.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from fedmllm.algorithms.base import WithServer
from fedmllm.algorithms.lowrank import A, B, concatenated, pairs, shares, unpaired
from fedmllm.algorithms.objectives import ClientView
from fedmllm.core.tensors import mean_delta
from fedmllm.core.types import ClientUpdate, LocalRule, Params, Round, Sent, State

if TYPE_CHECKING:
    from torch import Tensor


class OneShot(WithServer):
    """Common part: B starts at the principal directions of W, and a term |tanh(gamma B) - sign B0| / (|sign B0| + 1e-6) per
    module holds its signs. gamma rises over the client's steps from 1 to `gamma_max`, as (1 - cos) / 2.

    The paper adapts q_proj of the last layer alone: set `backbone.lora.targets`. gamma_max and the penalty of A are chosen
    per data set there.
    """

    one_round: ClassVar[bool] = True
    warm_start: ClassVar[bool] = False
    gamma_max: PositiveFloat = 25.0
    """gamma at the last step; published: 5 to 300."""

    def begin(self, at: Round, view: ClientView, sent: Sent, kept: Params) -> LocalRule:
        signs = {name: t.sign() for name, t in sent.start.items() if B in name}

        def penalty(done: float, weights: Params) -> Params:
            gamma = 1 + (self.gamma_max - 1) * _risen(done)
            return {
                name: sign_gradient(w, signs[name].to(w), gamma) if B in name else self.of_a(w, done)
                for name, w in weights.items()
                if B in name or A in name
            }

        return LocalRule(penalty=penalty)

    @abstractmethod
    def of_a(self, a: Tensor, done: float) -> Tensor:
        """Gradient of the penalty of one A.

        Args:
            a: [r, C], as it is.
            done: Share of the steps that is done, 0..1.
        """

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        return self.step(params, state, at, mean_delta(updates))


class Yoco(OneShot):
    """One round, supervised by the frozen weights (YOCO, NeurIPS 2025, OpenReview FoVF3iL6o3).

    A has the penalty lambda |A|_1 and is aggregated by principal components; B is averaged. B0 A0 is taken out of W, so
    that training starts at the base model; the result therefore has rank 2 r.

    Components of the rows vec(A_k): scores Z_k on the leading ones, their mean weighted by rows, and back. The number of
    components and the centring are not readable in the stored copy of the paper (Eq. 5). With centring, equal weights give
    the plain mean for every number of components, and all components give the weighted mean.
    """

    name: Literal["yoco"] = "yoco"
    needs: ClassVar[frozenset[str]] = frozenset({"frozen-adapter"})
    lora_init: ClassVar[str] = "principal"
    sparsity: NonNegativeFloat = 1e-3
    """lambda; published: 1e-4 to 1e-1."""
    components: NonNegativeInt = 1
    """Principal components of A; 0 = all."""
    centred: bool = True
    """Take the components of the deviations from the clients' plain mean, not of A itself."""

    def init(self, params: Params) -> State:
        start = {name: (-b, a) for name, (b, a) in pairs(params).items()}
        return {**super().init(params), "start": unpaired(start, params)}

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        return Sent(params, frozen=state["start"])

    def of_a(self, a: Tensor, done: float) -> Tensor:
        return self.sparsity * a.sign()

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        listed = list(updates)
        delta = mean_delta(listed)
        used = [update for update in listed if update.num_examples]
        for name in [name for name in delta if A in name]:
            delta[name] = self.principal_mean([params[name] + u.delta[name] for u in used], shares(used)) - params[name]
        return self.step(params, state, at, delta)

    def principal_mean(self, locals_: list[Tensor], weights: list[float]) -> Tensor:
        """A_g of one module: c + w' U_P U_P' (X - c) with X the rows vec(A_k), U_P the leading left singular vectors."""
        import torch

        x_KN = torch.stack([a.double().reshape(-1) for a in locals_])
        centre_N = x_KN.mean(dim=0) if self.centred else torch.zeros_like(x_KN[0])
        x_KN = x_KN - centre_N
        _, u_KK = torch.linalg.eigh(x_KN @ x_KN.mT)  # ascending
        leading = u_KK[:, -self.components :] if self.components else u_KK
        score_K = torch.tensor(weights, dtype=torch.float64) @ leading @ leading.mT
        mean_N: Tensor = centre_N + score_K @ x_KN
        return mean_N.reshape(locals_[0].shape).to(locals_[0].dtype)

    def result(self, params: Params, state: State) -> Params:
        """The adapter together with the part that left W."""
        out = pairs(state["start"])
        return {**params, **unpaired({n: concatenated([pair, out[n]]) for n, pair in pairs(params).items()}, params)}


class YocoReference(OneShot):
    """The published code's form of YOCO (NeurIPS 2025, OpenReview FoVF3iL6o3).

    A is random and has the penalty |A'A - I|^2, whose weight falls from 0.1 to 0.01; both factors are averaged; B0 A stays
    in the model, which therefore starts perturbed.
    """

    name: Literal["yoco-reference"] = "yoco-reference"
    lora_init: ClassVar[str] = "principal-b"
    gamma_max: PositiveFloat = 200.0
    """gamma at the last step; 200 in the published code."""

    def of_a(self, a: Tensor, done: float) -> Tensor:
        import torch

        weight = 0.1 + (0.01 - 0.1) * _risen(done)
        gram = a @ a.mT - torch.eye(len(a), dtype=a.dtype, device=a.device)
        return weight * 4 * (gram @ a)  # = the gradient of |A'A - I|^2 with its C x C matrix


def sign_gradient(b: Tensor, sign: Tensor, gamma: float) -> Tensor:
    """Gradient of |tanh(gamma B) - B^s| / (|B^s| + 1e-6), Frobenius norms; 0 where the first is 0."""
    bent = (gamma * b).tanh()
    off = bent - sign
    gradient: Tensor = off * (1 - bent * bent) * (gamma / (off.norm().clamp(min=1e-12) * (sign.norm() + 1e-6)))
    return gradient


def _risen(done: float) -> float:
    return (1 - math.cos(math.pi * done)) / 2
