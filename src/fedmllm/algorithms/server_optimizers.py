"""FedAvg and the server optimizers.

Delta is the mean of (client - global) weighted by num_examples. Formulas: Reddi et al., arXiv:2003.00295, Alg. 2, which
has no bias correction. `references.py` holds them as the published FedMLLM code computes them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveFloat

from fedmllm.algorithms.base import Aggregator, Beta
from fedmllm.core.tensors import mean_delta, tree_map, zeros
from fedmllm.core.types import ClientUpdate, Params, Round, State

if TYPE_CHECKING:
    from torch import Tensor


class ServerOptimizer(Aggregator):
    """A step along the mean delta, tensor by tensor."""

    optimizes: ClassVar[bool] = True
    of_the_mean: ClassVar[bool] = True
    weighted_by: ClassVar[Literal["", "rows", "clients"]] = "rows"


class FedAvg(ServerOptimizer):
    """Weighted mean of the clients' deltas: w += lr * Delta (McMahan et al., arXiv:1602.05629; lr = 1 there)."""

    name: Literal["fedavg"] = "fedavg"
    lr: PositiveFloat = 1.0
    """Factor of the mean delta."""

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        delta = mean_delta(updates)
        return tree_map(lambda w, d: w + self.lr * d, params, delta), state


class FedAvgM(ServerOptimizer):
    """Momentum on the server: v = beta v + Delta; w += lr v (Hsu et al., arXiv:1909.06335)."""

    name: Literal["fedavgm"] = "fedavgm"
    lr: PositiveFloat = 1.0
    """Factor of the momentum."""
    beta: Beta = 0.9
    """Share of the momentum that stays."""

    def init(self, params: Params) -> State:
        return {"v": zeros(params)}

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        delta = mean_delta(updates)
        v = tree_map(lambda v, d: self.beta * v + d, state["v"], delta)
        return tree_map(lambda w, v: w + self.lr * v, params, v), {"v": v}


class Adaptive(ServerOptimizer):
    """The part that the adaptive server optimizers share: v starts at tau^2, w += lr m / (sqrt v + tau)."""

    lr: PositiveFloat = 1e-3
    """Learning rate of the server: about the largest step of a weight."""
    tau: PositiveFloat = 1e-3
    """Added to the denominator, which bounds the step; v starts at tau^2."""

    def init(self, params: Params) -> State:
        return {"m": zeros(params), "v": tree_map(lambda w: w.new_full(w.shape, self.tau**2), params)}

    def step(self, params: Params, m: Params, v: Params) -> Params:
        return tree_map(lambda w, m, v: w + self.lr * m / (v.sqrt() + self.tau), params, m, v)


class FedAdagrad(Adaptive):
    """v += Delta^2; w += lr Delta / (sqrt v + tau); v starts at tau^2 (Reddi et al., arXiv:2003.00295, Alg. 2)."""

    name: Literal["fedadagrad"] = "fedadagrad"

    def init(self, params: Params) -> State:
        return {"v": super().init(params)["v"]}

    def mean(self, updates: Iterable[ClientUpdate]) -> Params:
        return mean_delta(updates)

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        delta = self.mean(updates)
        v = tree_map(lambda v, d: v + d * d, state["v"], delta)
        return self.step(params, delta, v), {"v": v}


class Moments(Adaptive):
    """m = b1 m + (1-b1) Delta; v from v and Delta^2 by `second_moment`; w += lr m / (sqrt v + tau)."""

    beta1: Beta = 0.9
    """Share of the first moment that stays."""
    beta2: Beta = 0.99
    """Share of the second moment that stays."""

    @abstractmethod
    def second_moment(self, v: Tensor, delta: Tensor) -> Tensor:
        """The new v of one tensor."""

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        delta = mean_delta(updates)
        m = tree_map(lambda m, d: self.beta1 * m + (1 - self.beta1) * d, state["m"], delta)
        v = tree_map(lambda v, d: self.second_moment(v, d), state["v"], delta)
        return self.step(params, m, v), {"m": m, "v": v}


class FedAdam(Moments):
    """m = b1 m + (1-b1) Delta; v = b2 v + (1-b2) Delta^2; w += lr m / (sqrt v + tau) (Reddi et al., arXiv:2003.00295, Alg. 2).

    v starts at tau^2, and there is no bias correction.
    """

    name: Literal["fedadam"] = "fedadam"

    def second_moment(self, v: Tensor, delta: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * delta * delta


class FedYogi(Moments):
    """m = b1 m + (1-b1) Delta; v -= (1-b2) Delta^2 sign(v - Delta^2); w += lr m / (sqrt v + tau) (Reddi et al., 2020).

    arXiv:2003.00295, Alg. 2. v starts at tau^2, and there is no bias correction.
    """

    name: Literal["fedyogi"] = "fedyogi"

    def second_moment(self, v: Tensor, delta: Tensor) -> Tensor:
        return v - (1 - self.beta2) * delta * delta * (v - delta * delta).sign()
