"""Byzantine-robust aggregators, which hold all updates of a round in memory.

None weighs by num_examples: otherwise a malicious client could choose its own weight. Clients without rows are left out.
K updates, f = `num_bad` of which may hold any finite values (NaN and Inf are refused before, see `UpdateValidator`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fedmllm.algorithms.base import WithServer
from fedmllm.core.errors import FedmllmError, NothingToAverage
from fedmllm.core.tensors import same_names, tree_map
from fedmllm.core.types import ClientUpdate, Params, Round, State

if TYPE_CHECKING:
    from torch import Tensor


class Robust(WithServer):
    """w += lr * centre(deltas), or `server` applies centre(deltas)."""

    lr: PositiveFloat = 1.0
    """Factor of the combined delta; with `server` that has a rate of its own."""

    @model_validator(mode="after")
    def _one_rate(self) -> Robust:
        if self.server is not None and self.lr != 1.0:
            raise ValueError(f"lr = {self.lr:g} has no effect with server; set server.lr")
        return self

    @abstractmethod
    def centre(self, deltas: Sequence[Params]) -> Params:
        """One delta for all.

        Args:
            deltas: In ascending client order, at least `least_updates()`.
        """

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        listed = list(updates)
        clients = [update.client for update in listed]
        if clients != sorted(set(clients)):
            raise FedmllmError(f"clients came as {clients}; updates must be in ascending client order")
        deltas = [update.delta for update in listed if update.num_examples]
        if len(deltas) < self.least_updates():
            raise NothingToAverage(f"{self.name} needs {self.least_updates()} updates with rows; {len(deltas)} came")
        same_names(params, *deltas)
        return self.step(params, state, at, self.centre(deltas), self.lr)


class Median(Robust):
    """The median of each coordinate; of an even number the mean of the middle two (Yin et al., arXiv:1803.01498, Def. 1)."""

    name: Literal["median"] = "median"

    def least_updates(self) -> int:
        return 3  # of two, the median is the mean

    def centre(self, deltas: Sequence[Params]) -> Params:
        return _between(deltas, (len(deltas) - 1) // 2)


class TrimmedMean(Robust):
    """The mean of each coordinate without its f largest and f smallest values (Yin et al., arXiv:1803.01498, Def. 2)."""

    name: Literal["trimmed-mean"] = "trimmed-mean"
    num_bad: PositiveInt = 1
    """f: clients that may be malicious."""

    def least_updates(self) -> int:
        return 2 * self.num_bad + 1

    def centre(self, deltas: Sequence[Params]) -> Params:
        return _between(deltas, self.num_bad)


class Krum(Robust):
    """The one delta that lies closest to its K - f - 2 nearest others (Blanchard et al., NeurIPS 2017, arXiv:1703.02757)."""

    name: Literal["krum"] = "krum"
    num_bad: PositiveInt = 1
    """f: clients that may be malicious."""

    def least_updates(self) -> int:
        return 2 * self.num_bad + 3

    def centre(self, deltas: Sequence[Params]) -> Params:
        return deltas[krum_order(deltas, self.num_bad)[0]]


class MultiKrum(Robust):
    """The mean of the `num_kept` deltas with the lowest Krum scores (Blanchard et al., arXiv:1703.02757, section 4)."""

    name: Literal["multi-krum"] = "multi-krum"
    num_bad: PositiveInt = 1
    """f: clients that may be malicious."""
    num_kept: NonNegativeInt = 0
    """Deltas in the mean; 0 = as many as the paper's proof allows: K - 2 f - 3, at least one."""

    def least_updates(self) -> int:
        return max(2 * self.num_bad + 3, self.num_kept + self.num_bad)  # with fewer, a bad one would be kept

    def centre(self, deltas: Sequence[Params]) -> Params:
        import torch

        num_kept = self.num_kept or max(1, len(deltas) - 2 * self.num_bad - 3)
        kept = sorted(krum_order(deltas, self.num_bad)[:num_kept])
        return tree_map(lambda *tensors: torch.stack(tensors).mean(dim=0), *(deltas[k] for k in kept))


def _between(deltas: Sequence[Params], cut: int) -> Params:
    """Coordinate by coordinate the mean without the `cut` smallest and the `cut` largest values."""
    import torch

    def middle(*tensors: Tensor) -> Tensor:
        return torch.stack(tensors).sort(dim=0).values[cut : len(tensors) - cut].mean(dim=0)

    return tree_map(middle, *deltas)


def krum_order(deltas: Sequence[Params], num_bad: int) -> list[int]:
    """Indices by Krum's score, lowest first: the sum of squared distances to the K - f - 2 nearest others.

    Distances are taken between the deltas themselves, in float64: the expansion |a|^2 + |b|^2 - 2ab loses small ones.
    """
    import torch

    k = len(deltas)
    squared_KK = torch.zeros(k, k, dtype=torch.float64)
    for i in range(k):
        for j in range(i):
            between = sum(float((a - deltas[j][name]).double().pow(2).sum()) for name, a in deltas[i].items())
            squared_KK[i, j] = squared_KK[j, i] = between
    nearest = squared_KK.sort(dim=1).values[:, 1 : k - num_bad - 1]  # column 0 is the distance to itself
    return [int(i) for i in nearest.sum(dim=1).argsort(stable=True)]
