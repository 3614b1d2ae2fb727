"""Importance of each modality, from evaluations on test rows that lack it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from fedmllm.core.errors import ConfigError
from fedmllm.core.types import Modality, Visible, visible_of
from fedmllm.reports.reading import BySeed, DatasetResults, Draw
from fedmllm.reports.stats import Spread


@dataclass(frozen=True)
class Importance:
    """Contribution of each modality of the test rows to the main metric of one method.

    Attributes:
        method: The method.
        is_shapley: True if all patterns of visible modalities were evaluated: Shapley values, which add up to the difference
            between everything and nothing. False: what is lost if a modality alone is hidden.
        rows: Setting -> modality -> contribution, over the seeds.
    """

    method: str
    is_shapley: bool
    rows: Mapping[str, Mapping[Modality, Spread]]


def importances(dataset: DatasetResults) -> list[Importance]:
    """The contributions of the modalities, one table a method.

    Args:
        dataset: Runs on one data set.

    Returns:
        One table for each method that was evaluated on everything and without at least one modality. Empty for two modalities
        or fewer, whose train x test table says the same, unless all their patterns were evaluated.
    """
    modalities = dataset.modalities
    patterns = _patterns(dataset, modalities)
    whole = frozenset(modalities)
    all_known = len(patterns) == 2 ** len(modalities) and len(modalities) > 1
    hidden = [m for m in modalities if whole - {m} in patterns]
    if whole not in patterns or not (all_known or (len(modalities) > 2 and hidden)):
        return []
    by_pattern = {pattern: dataset.values(dataset.metric, name) for pattern, name in patterns.items()}
    found = []
    for method in dataset.methods:
        rows = {}
        for setting in dataset.settings:
            own = {p: seeds for p, values in by_pattern.items() if (seeds := values.get((setting, method)))}
            if len(own) == len(by_pattern) and set.intersection(*(set(seeds) for seeds in own.values())):
                rows[setting] = {m: Spread.of(_contribution(own, whole, m, all_known).values()) for m in hidden}
        if rows:
            found.append(Importance(method, all_known, rows))
    return found


def _patterns(dataset: DatasetResults, modalities: tuple[Modality, ...]) -> dict[Visible, str]:
    """Pattern of visible modalities -> its name in the records, if the clients' rows have these modalities."""
    found: dict[Visible, str] = {}
    for name in dict.fromkeys(row["visible"] for run in dataset.runs for row in run.rows):
        try:
            found.setdefault(visible_of(name, modalities), name)
        except ConfigError:  # a modality that no client has
            continue
    return found


def _contribution(
    values: Mapping[Visible, BySeed], whole: Visible, modality: Modality, is_shapley: bool
) -> dict[Draw, float]:
    """The contribution of a modality in each draw that all patterns have."""
    others = whole - {modality}
    sets = (
        [frozenset(c) for n in range(len(others) + 1) for c in combinations(sorted(others), n)]
        if is_shapley
        else [others]
    )
    draws = set.intersection(*(set(seeds) for seeds in values.values()))
    return {
        draw: sum(
            _weight(len(s), len(whole), is_shapley) * (values[s | {modality}][draw] - values[s][draw]) for s in sets
        )
        for draw in sorted(draws)
    }


def _weight(size: int, num_modalities: int, is_shapley: bool) -> float:
    """|S|! (n - |S| - 1)! / n!, the share of the orders in which exactly S comes before the modality."""
    if not is_shapley:
        return 1.0
    return math.factorial(size) * math.factorial(num_modalities - size - 1) / math.factorial(num_modalities)


def about_importance(table: Importance) -> str:
    """The caption."""
    if table.is_shapley:
        return (
            "Shapley values over all patterns of visible modalities: a row adds up to everything minus nothing visible."
        )
    return "Loss if this modality alone is hidden from the test rows; small for one that another modality can stand in for."
