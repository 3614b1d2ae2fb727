"""Server half of an algorithm: fold the clients' deltas into the global adapter. Pure functions of their arguments.

Delta is the mean of (client - global) weighted by num_examples. Formulas: Reddi et al., arXiv:2003.00295, Alg. 2, which
has no bias correction. Names ending in "-reference" give what the published FedMLLM code does instead.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from fedmllm.tensors import mean_delta, plain_mean_delta, tree_map, zeros
from fedmllm.types import ClientUpdate, Named, Params, State

if TYPE_CHECKING:
    from torch import Tensor

Beta = Annotated[float, Field(ge=0, lt=1)]


class Aggregator(Named):
    """params and state before the round, the clients' updates -> params and state after it."""

    def least_updates(self) -> int:
        """How many updates a round must have for the formula to mean something."""
        return 1

    def init(self, params: Params) -> State:
        return {}

    def besides(self, state: State) -> Params:
        """What an asked client receives besides the adapter; {} = nothing."""
        return {}

    @abstractmethod
    def apply(self, params: Params, state: State, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        """One round. `updates` come in ascending client order and may be a stream: they are read once.

        Raises FedmllmError when there is nothing to average.
        """


class FedAvg(Aggregator):
    """w += lr * Delta (McMahan et al., arXiv:1602.05629; lr = 1 there)."""

    name: Literal["fedavg"] = "fedavg"
    lr: PositiveFloat = 1.0

    def apply(self, params: Params, state: State, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        delta = mean_delta(updates)
        return tree_map(lambda w, d: w + self.lr * d, params, delta), state


class FedAvgM(Aggregator):
    """v = beta v + Delta; w += lr v (Hsu et al., arXiv:1909.06335)."""

    name: Literal["fedavgm"] = "fedavgm"
    lr: PositiveFloat = 1.0
    beta: Beta = 0.9

    def init(self, params: Params) -> State:
        return {"v": zeros(params)}

    def apply(self, params: Params, state: State, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        delta = mean_delta(updates)
        v = tree_map(lambda v, d: self.beta * v + d, state["v"], delta)
        return tree_map(lambda w, v: w + self.lr * v, params, v), {"v": v}


class Adaptive(Aggregator):
    """What the adaptive server optimisers share: v starts at tau^2, w += lr m / (sqrt v + tau)."""

    lr: PositiveFloat = 1e-3
    tau: PositiveFloat = 1e-3

    def init(self, params: Params) -> State:
        return {"m": zeros(params), "v": tree_map(lambda w: w.new_full(w.shape, self.tau**2), params)}

    def step(self, params: Params, m: Params, v: Params) -> Params:
        return tree_map(lambda w, m, v: w + self.lr * m / (v.sqrt() + self.tau), params, m, v)


class FedAdagrad(Adaptive):
    """v += Delta^2; w += lr Delta / (sqrt v + tau)."""

    name: Literal["fedadagrad"] = "fedadagrad"

    def init(self, params: Params) -> State:
        return {"v": super().init(params)["v"]}

    def mean(self, updates: Iterable[ClientUpdate]) -> Params:
        return mean_delta(updates)

    def apply(self, params: Params, state: State, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        delta = self.mean(updates)
        v = tree_map(lambda v, d: v + d * d, state["v"], delta)
        return self.step(params, delta, v), {"v": v}


class Moments(Adaptive):
    """m = b1 m + (1-b1) Delta; v from v and Delta^2 by `second_moment`; w += lr m / (sqrt v + tau)."""

    beta1: Beta = 0.9
    beta2: Beta = 0.99

    @abstractmethod
    def second_moment(self, v: Tensor, delta: Tensor) -> Tensor:
        """The new v of one tensor."""

    def apply(self, params: Params, state: State, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        delta = mean_delta(updates)
        m = tree_map(lambda m, d: self.beta1 * m + (1 - self.beta1) * d, state["m"], delta)
        v = tree_map(lambda v, d: self.second_moment(v, d), state["v"], delta)
        return self.step(params, m, v), {"m": m, "v": v}


class FedAdam(Moments):
    """v = b2 v + (1-b2) Delta^2."""

    name: Literal["fedadam"] = "fedadam"

    def second_moment(self, v: Tensor, delta: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * delta * delta


class FedYogi(Moments):
    """v -= (1-b2) Delta^2 sign(v - Delta^2)."""

    name: Literal["fedyogi"] = "fedyogi"

    def second_moment(self, v: Tensor, delta: Tensor) -> Tensor:
        return v - (1 - self.beta2) * delta * delta * (v - delta * delta).sign()


class FedAvgReference(Aggregator):
    """The published code's FedAvg, fault included: the first tensor is averaged, to all others the mean is ADDED.

    w = mean(local) for the first tensor in the adapter's own order, w = w + mean(local) = 2 w + Delta for the rest; it
    diverges. Here to show that, not to be used.
    """

    name: Literal["fedavg-reference"] = "fedavg-reference"

    def apply(self, params: Params, state: State, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        local = tree_map(lambda w, d: w + d, params, mean_delta(updates))
        first = next(iter(params))
        return {name: local[name] if name == first else params[name] + local[name] for name in params}, state


class FedAvgMReference(Aggregator):
    """The published code's FedAvgM: v = Delta in the first round, then beta1 v + (1-beta1) Delta; w += v."""

    name: Literal["fedavgm-reference"] = "fedavgm-reference"
    beta1: Beta = 0.9

    def apply(self, params: Params, state: State, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        delta = mean_delta(updates)
        v = tree_map(lambda v, d: self.beta1 * v + (1 - self.beta1) * d, state["v"], delta) if state else delta
        return tree_map(lambda w, v: w + v, params, v), {"v": v}


class FedAdagradReference(FedAdagrad):
    """The published code's FedAdagrad: Delta is the unweighted mean."""

    name: Literal["fedadagrad-reference"] = "fedadagrad-reference"  # type: ignore[assignment]

    def mean(self, updates: Iterable[ClientUpdate]) -> Params:
        return plain_mean_delta(updates)


class MomentReference(Adaptive):
    """What the published FedAdam and FedYogi share: unweighted Delta, m = Delta in the first round, v built from m^2."""

    beta1: Beta = 0.9
    beta2: Beta = 0.99

    def init(self, params: Params) -> State:
        return {"v": super().init(params)["v"]}

    def moment(self, state: State, updates: Iterable[ClientUpdate]) -> Params:
        delta = plain_mean_delta(updates)
        if "m" not in state:
            return delta
        return tree_map(lambda m, d: self.beta1 * m + (1 - self.beta1) * d, state["m"], delta)


class FedAdamReference(MomentReference):
    """The published code's FedAdam: v = b2 v + (1-b2) m^2."""

    name: Literal["fedadam-reference"] = "fedadam-reference"

    def apply(self, params: Params, state: State, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        m = self.moment(state, updates)
        v = tree_map(lambda v, m: self.beta2 * v + (1 - self.beta2) * m * m, state["v"], m)
        return self.step(params, m, v), {"m": m, "v": v}


class FedYogiReference(MomentReference):
    """The published code's FedYogi: v -= (1-b2) m^2 sign(v - m^2)."""

    name: Literal["fedyogi-reference"] = "fedyogi-reference"

    def apply(self, params: Params, state: State, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        m = self.moment(state, updates)
        v = tree_map(lambda v, m: v - (1 - self.beta2) * m * m * (v - m * m).sign(), state["v"], m)
        return self.step(params, m, v), {"m": m, "v": v}
