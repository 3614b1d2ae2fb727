"""Modality dropout in local training, uniform or by each modality's importance."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from fedmllm.core.errors import ConfigError
from fedmllm.core.spec import Named
from fedmllm.core.types import Modality, Visible

if TYPE_CHECKING:
    import numpy as np

MAX_MODALITIES = 4  # of exact Shapley values: 2^M passes a row


class ModalityDropout(Named):
    """Complete training rows that lose a modality for an epoch, so that a client learns from each of them."""

    def measured_rows(self) -> int:
        """Complete rows for which a client finds the importance of the modalities in each of its rounds; each costs 2^M passes.

        Returns:
            0 if `odds` does not depend on it. Otherwise clients report it.
        """
        return 0

    def check(self, modalities: tuple[Modality, ...]) -> None:
        """Check the settings against the experiment, before anything is loaded.

        Args:
            modalities: Of the data set.

        Raises:
            ConfigError: A setting does not fit.
        """
        if self.measured_rows() and len(modalities) > MAX_MODALITIES:
            raise ConfigError(
                f"modality_dropout: got {self.name!r} for {len(modalities)} modalities, which takes {2 ** len(modalities)} "
                f"passes a row; allowed: at most {MAX_MODALITIES} modalities, or 'uniform'"
            )

    def label(self) -> str:
        """The name in tables.

        Returns:
            A name such as "dropout-uniform".
        """
        changed = {k: v for k, v in self.model_dump(mode="json", exclude_defaults=True).items() if k != "name"}
        return f"dropout-{self.name}" + (f"({','.join(f'{k}={v}' for k, v in changed.items())})" if changed else "")

    @abstractmethod
    def odds(self, modalities: Sequence[Modality], importance: Mapping[Modality, float]) -> list[float]:
        """Probability that a complete row loses each modality, for one epoch; it loses one at most.

        Args:
            modalities: Of the data set.
            importance: Mean Shapley value of each at this client, in nats; {} without `measured_rows`, or without
                a complete row.

        Returns:
            One number per modality; their sum is at most 1.
        """

    def drop(
        self, visible: Visible, modalities: Sequence[Modality], odds: Sequence[float], draw: np.random.Generator
    ) -> Visible:
        """Apply the odds to a row. A row that lacks a modality stays as it is, and draws nothing.

        Args:
            visible: What its mask leaves.
            modalities: Of the data set.
            odds: As `odds` gave them.
            draw: The row's own random stream.

        Returns:
            The row's mask for this epoch.
        """
        if len(modalities) < 2 or any(m not in visible for m in modalities):
            return visible
        left = float(draw.random())
        for modality, share in zip(modalities, odds, strict=True):
            if left < share:
                return visible - {modality}
            left -= share
        return visible


class NoDropout(ModalityDropout):
    """Rows keep their modalities."""

    name: Literal["none"] = "none"

    def odds(self, modalities: Sequence[Modality], importance: Mapping[Modality, float]) -> list[float]:
        return [0.0] * len(modalities)


class UniformDropout(ModalityDropout):
    """Each modality is lost with the same probability. The control of `importance`."""

    name: Literal["uniform"] = "uniform"
    rate: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Probability that a complete row loses a modality in an epoch."""

    def odds(self, modalities: Sequence[Modality], importance: Mapping[Modality, float]) -> list[float]:
        return [self.rate / len(modalities)] * len(modalities)


class ImportanceDropout(ModalityDropout):
    """The more a client relies on a modality, the more often its complete rows lose it (idea of OGM-GE, CVPR 2022).

    At the start of a client's round v(S) = log p(answer | modalities S) is found for `rows` of its complete rows and all
    sets S, with the adapter that it received. Its Shapley values phi_m add up to v(all) - v(none). A complete row loses
    modality m with probability rate softmax(phi / tau)_m. The client's mean phi is in the record as `importance_MODALITY`,
    in nats; rate = 0 trains as without it and only reports. On questions that no modality answers by itself, dropout
    removes what there is to learn.
    """

    name: Literal["importance"] = "importance"
    rate: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Probability that a complete row loses a modality in an epoch."""
    tau: PositiveFloat = 0.1
    """Temperature, in nats: far above the values all modalities are alike, far below the strongest one alone is lost."""
    rows: PositiveInt = 16
    """Complete rows that are measured in a client's round, drawn in each round; each costs 2^M passes."""

    def measured_rows(self) -> int:
        return self.rows

    def odds(self, modalities: Sequence[Modality], importance: Mapping[Modality, float]) -> list[float]:
        if not importance:
            return [0.0] * len(modalities)
        largest = max(importance.values())
        weights = [math.exp((importance[m] - largest) / self.tau) for m in modalities]
        return [self.rate * weight / sum(weights) for weight in weights]


def shapley(values: Mapping[Visible, float], modalities: Sequence[Modality]) -> dict[Modality, float]:
    """Shapley values of a game whose players are modalities (Shapley, 1953).

    Args:
        values: v(S) of every set of modalities, the empty one included.
        modalities: The players.

    Returns:
        Modality -> value. They add up to v(all) - v(none).
    """
    count, found = len(modalities), {}
    for modality in modalities:
        others = [m for m in modalities if m != modality]
        total = 0.0
        for size in range(count):
            weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for chosen in map(frozenset, combinations(others, size)):
                total += weight * (values[chosen | {modality}] - values[chosen])
        found[modality] = total
    return found


def coalitions(modalities: Sequence[Modality]) -> list[Visible]:
    """All sets of modalities.

    Args:
        modalities: The players.

    Returns:
        2^M sets, from the empty one to the full one.
    """
    return [frozenset(s) for size in range(len(modalities) + 1) for s in combinations(modalities, size)]
