"""Spread over seeds, and tests of methods paired by seed.

A seed fixes rows, partition and masks, so methods are compared seed by seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmllm.reports.reading import DatasetResults, Seeds


@dataclass(frozen=True)
class Spread:
    """Mean over seeds; the standard deviation (n - 1) is None for a single seed."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Paired:
    """a - b over the seeds that both have: mean, 95 % interval and p of Student's paired t-test (two-sided).

    `p`, `low` and `high` are None for fewer than two seeds: nothing can be said about noise then.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    n: int

    @property
    def verdict(self) -> str:
        """What may be claimed at the 5 % level."""
        if self.p is None:
            return "one seed: no test"
        if self.p >= 0.05:
            return "within noise"
        return "higher" if self.difference > 0 else "lower"


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Paired | None:
    """Student's paired t-test over shared seeds; None where they share none."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    differences = [a[seed] - b[seed] for seed in seeds]
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return Paired(mean, None, None, None, n)
    from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes a second to load

    error = statistics.stdev(differences) / n**0.5
    if error == 0:
        return Paired(mean, mean, mean, 1.0 if mean == 0 else 0.0, n)
    half = float(stdtrit(n - 1, 0.975)) * error
    p = float(2 * stdtr(n - 1, -abs(mean / error)))
    return Paired(mean, mean - half, mean + half, p, n)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction of several tests made at once."""
    adjusted: dict[str, float] = {}
    worst = 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, p * (len(p_values) - rank)))
        adjusted[key] = worst
    return adjusted


@dataclass(frozen=True)
class Versus:
    """Two methods over all settings that both have."""

    a: str
    b: str
    paired: Paired  # of the means over settings, one pair a seed
    p_holm: float | None  # corrected for all pairs of the dataset
    wins: int  # (setting, seed) cells in which a is strictly above b
    cells: int
    stable: tuple[str, ...]  # settings in which a is above b for every seed
    reversed: tuple[str, ...]  # settings in which b is above a for every seed


def mean_over_settings(values: Mapping[tuple[str, str], Seeds], method: str, settings: Sequence[str]) -> Seeds:
    """seed -> mean over the settings; a seed that lacks one of them is left out."""
    columns = [values.get((setting, method), {}) for setting in settings]
    shared = set.intersection(*(set(column) for column in columns)) if columns else set()
    return {seed: statistics.fmean(column[seed] for column in columns) for seed in sorted(shared)}


def all_pairs(dataset: DatasetResults, metric: str = "", visible: str = "") -> list[Versus]:
    """Every pair of methods, the better one first, the best method's pairs first."""
    values = dataset.values(metric, visible)
    methods = sorted(dataset.methods, key=lambda m: -_overall(values, m))
    found: list[Versus] = []
    for i, a in enumerate(methods):
        for b in methods[i + 1 :]:
            shared = [s for s in dataset.settings if (s, a) in values and (s, b) in values]
            test = paired(mean_over_settings(values, a, shared), mean_over_settings(values, b, shared))
            if test is None:
                continue
            pairs = {
                s: [(values[s, a][k], values[s, b][k]) for k in values[s, a].keys() & values[s, b].keys()]
                for s in shared
            }
            flat = [pair for several in pairs.values() for pair in several]
            found.append(
                Versus(
                    a=a,
                    b=b,
                    paired=test,
                    p_holm=None,
                    wins=sum(x > y for x, y in flat),
                    cells=len(flat),
                    stable=tuple(s for s, several in pairs.items() if several and all(x > y for x, y in several)),
                    reversed=tuple(s for s, several in pairs.items() if several and all(x < y for x, y in several)),
                )
            )
    corrected = holm({f"{v.a}|{v.b}": v.paired.p for v in found if v.paired.p is not None})
    return [Versus(**{**v.__dict__, "p_holm": corrected.get(f"{v.a}|{v.b}")}) for v in found]


def _overall(values: Mapping[tuple[str, str], Seeds], method: str) -> float:
    own = [value for (_, m), seeds in values.items() if m == method for value in seeds.values()]
    return statistics.fmean(own) if own else 0.0
