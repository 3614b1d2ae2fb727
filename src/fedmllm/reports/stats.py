"""Spread over seeds, paired tests, detectable differences.

A seed fixes rows, partition, masks and cohorts, so methods are compared seed by seed. A statistic without a meaning is None:
the test of a single seed, or of differences that do not vary.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
LEVEL, POWER = 0.05, 0.8
NO_SPREAD = 1e-9  # standard deviations below are rounding: 0.9 - 0.5 is not 0.8 - 0.4 in binary
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Spread:
    """Mean over seeds; the standard deviation (n - 1) is None for a single seed."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = list(values)
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))

    @property
    def half(self) -> float | None:
        """Half of the 95 % interval of the mean (Student's t); None for one seed, or without any spread."""
        if self.std is None or self.std < NO_SPREAD:
            return None
        return float(_quantile(self.n - 1, 0.975) * self.std / self.n**0.5)


@dataclass(frozen=True)
class Paired:
    """a - b over the seeds that both have: mean, 95 % interval and p of Student's paired t-test (two-sided).

    `p`, `low` and `high` are None for fewer than two seeds, and for differences that are all alike: then the noise between
    seeds is unknown, and a test has no meaning.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    n: int
    std: float | None = None  # of the differences

    def needed(self, level: float = LEVEL) -> int | None:
        """Seeds for which a true difference of this size is found with 80 % power; None if unknown or over 10,000."""
        return None if self.std is None else seeds_needed(self.difference, self.std, level)

    @property
    def detectable(self) -> float | None:
        """Smallest true difference that this test finds with 80 % power at the 5 % level; None if unknown."""
        return None if self.std is None else detectable(self.std, self.n)


def paired(a: Mapping[K, float], b: Mapping[K, float]) -> Paired | None:
    """Student's paired t-test over shared keys, which are seeds; None if none is shared."""
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    if not differences:
        return None
    mean, n = statistics.fmean(differences), len(differences)
    std = statistics.stdev(differences) if n > 1 else None
    if std is None or std < NO_SPREAD:
        return Paired(mean, None, None, None, n)
    from scipy.special import stdtr  # Student's t; scipy.stats takes a second to load

    error = std / n**0.5
    half = _quantile(n - 1, 0.975) * error
    return Paired(mean, mean - half, mean + half, float(2 * stdtr(n - 1, -abs(mean / error))), n, std)


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """Holm's correction of several tests made at once."""
    adjusted: dict[K, float] = {}
    worst = 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, p * (len(p_values) - rank)))
        adjusted[key] = worst
    return adjusted


def pooled_std(tests: Iterable[Paired | None]) -> tuple[float, int] | None:
    """(root mean variance of the differences, fewest seeds) of several paired tests; None if none has a spread."""
    known = [(test.std, test.n) for test in tests if test and test.std is not None]
    if not known:
        return None
    return statistics.fmean(std**2 for std, _ in known) ** 0.5, min(n for _, n in known)


def detectable(std: float, n: int, level: float = LEVEL) -> float:
    """Smallest true difference that a paired t-test over `n` seeds finds with 80 % power.

    (t(1 - level/2) + t(0.8)) std / sqrt(n) with n - 1 degrees of freedom, the usual approximation of the non-central t.

    Args:
        std: Standard deviation of the paired differences.
        n: Seeds, at least 2.
        level: Two-sided level of the test.
    """
    return float((_quantile(n - 1, 1 - level / 2) + _quantile(n - 1, POWER)) * std / n**0.5)


def seeds_needed(difference: float, std: float, level: float = LEVEL) -> int | None:
    """Fewest seeds for which `difference` is detectable; None if over 10,000."""
    low, high = 2, MOST_SEEDS
    if not difference or detectable(std, high, level) > abs(difference):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if detectable(std, middle, level) <= abs(difference) else (middle + 1, high)
    return low


def _quantile(freedom: int, probability: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def mean_of(columns: Sequence[Mapping[K, float]]) -> dict[K, float]:
    """Seed -> mean over the columns; a seed that one of them lacks is left out."""
    if not columns:
        return {}
    shared = [seed for seed in columns[0] if all(seed in column for column in columns)]
    return {seed: statistics.fmean(column[seed] for column in columns) for seed in shared}
