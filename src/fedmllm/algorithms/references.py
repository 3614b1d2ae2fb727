"""Server optimizers as the published FedMLLM code computes them, faults included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from fedmllm.algorithms.base import Aggregator, Beta
from fedmllm.algorithms.server_optimizers import Adaptive, FedAdagrad
from fedmllm.core.tensors import mean_delta, plain_mean_delta, tree_map
from fedmllm.core.types import ClientUpdate, Params, Round, State


class FedAvgReference(Aggregator):
    """The published code's FedAvg, fault included: the first tensor is averaged, to all others the mean is ADDED (FedMLLM,
    arXiv:2411.14717).

    w = mean(local) for the first tensor in the adapter's own order, w = w + mean(local) = 2 w + Delta for the rest; it
    diverges. It is here to demonstrate that.
    """

    name: Literal["fedavg-reference"] = "fedavg-reference"
    weighted_by: ClassVar[Literal["", "rows", "clients"]] = "rows"

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        local = tree_map(lambda w, d: w + d, params, mean_delta(updates))
        first = next(iter(params))
        return {name: local[name] if name == first else params[name] + local[name] for name in params}, state


class FedAvgMReference(Aggregator):
    """The published code's FedAvgM: v = Delta in the first round, then beta1 v + (1-beta1) Delta; w += v (arXiv:2411.14717)."""

    name: Literal["fedavgm-reference"] = "fedavgm-reference"
    weighted_by: ClassVar[Literal["", "rows", "clients"]] = "rows"
    beta1: Beta = 0.9
    """Share of the momentum that stays."""

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        delta = mean_delta(updates)
        v = tree_map(lambda v, d: self.beta1 * v + (1 - self.beta1) * d, state["v"], delta) if state else delta
        return tree_map(lambda w, v: w + v, params, v), {"v": v}


class FedAdagradReference(FedAdagrad):
    """The published code's FedAdagrad: Delta is the unweighted mean (arXiv:2411.14717)."""

    name: Literal["fedadagrad-reference"] = "fedadagrad-reference"  # type: ignore[assignment]
    weighted_by: ClassVar[Literal["", "rows", "clients"]] = "clients"

    def mean(self, updates: Iterable[ClientUpdate]) -> Params:
        return plain_mean_delta(updates)


class MomentReference(Adaptive):
    """Common part of the published FedAdam and FedYogi: unweighted Delta, m = Delta in the first round, v from m^2."""

    weighted_by: ClassVar[Literal["", "rows", "clients"]] = "clients"
    beta1: Beta = 0.9
    """Share of the first moment that stays."""
    beta2: Beta = 0.99
    """Share of the second moment that stays."""

    def init(self, params: Params) -> State:
        return {"v": super().init(params)["v"]}

    def moment(self, state: State, updates: Iterable[ClientUpdate]) -> Params:
        delta = plain_mean_delta(updates)
        if "m" not in state:
            return delta
        return tree_map(lambda m, d: self.beta1 * m + (1 - self.beta1) * d, state["m"], delta)


class FedAdamReference(MomentReference):
    """The published code's FedAdam: v = b2 v + (1-b2) m^2 (arXiv:2411.14717)."""

    name: Literal["fedadam-reference"] = "fedadam-reference"

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        m = self.moment(state, updates)
        v = tree_map(lambda v, m: self.beta2 * v + (1 - self.beta2) * m * m, state["v"], m)
        return self.step(params, m, v), {"m": m, "v": v}


class FedYogiReference(MomentReference):
    """The published code's FedYogi: v -= (1-b2) m^2 sign(v - m^2) (arXiv:2411.14717)."""

    name: Literal["fedyogi-reference"] = "fedyogi-reference"

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        m = self.moment(state, updates)
        v = tree_map(lambda v, m: v - (1 - self.beta2) * m * m * (v - m * m).sign(), state["v"], m)
        return self.step(params, m, v), {"m": m, "v": v}
