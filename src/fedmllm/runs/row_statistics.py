"""Statistics over test rows: intervals, paired tests, calibration and confusion.

An interval over rows says how far a result would move with other test rows from the same source. It says nothing about
another seed of the training. Rows that belong together, such as those of a patient, are drawn together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmllm.core.metrics import METRICS, chosen, is_right, probabilities
from fedmllm.core.rng import stream
from fedmllm.core.types import Prediction

DRAWS = 1000  # bootstrap samples of a metric that is computed for all of them at once
SLOW_DRAWS = 200  # of any other metric
LEAST_ROWS = 5  # a bootstrap over fewer rows has no meaning
LEAST_DEFINED = 0.9  # share of the samples that must define a metric

Floats = NDArray[np.float64]
Draws = NDArray[np.int64]  # [K, n]: how often row n is in sample K


@dataclass(frozen=True)
class RowEstimate:
    """A value with its 95 % interval over rows; the interval is None if the rows do not define it."""

    value: float | None
    low: float | None
    high: float | None
    num_rows: int


@dataclass(frozen=True)
class PairedRows:
    """a - b on the same rows.

    Attributes:
        difference: Of the metric.
        low: Lower end of the 95 % interval, by a paired bootstrap over rows.
        high: Upper end.
        p: Two-sided; McNemar's exact test if the metric is accuracy of one run a side and no rows belong together, otherwise
            from the bootstrap. None without an interval.
        num_rows: Rows that both have.
        only_a: Rows that a alone answers right, for one run a side.
        only_b: Rows that b alone answers right.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    num_rows: int
    only_a: int | None = None
    only_b: int | None = None


@dataclass(frozen=True)
class Calibration:
    """Confidence of the chosen answers of closed questions against their accuracy, in bins of equal width.

    Attributes:
        ece: Expected calibration error (arXiv:1706.04599): mean over rows of |accuracy - confidence| of the row's bin.
        confidence: Mean probability of the chosen answer.
        accuracy: Share of right answers.
        num_rows: Closed questions.
        bins: (rows, mean confidence, accuracy) of each bin that has rows, ascending.
    """

    ece: float
    confidence: float
    accuracy: float
    num_rows: int
    bins: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class Confusion:
    """Counts of closed questions: `counts[i][j]` rows of truth `labels[i]` got the answer `labels[j]`."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


def draws(num_rows: int, num: int, groups: Sequence[str] = ()) -> Draws:
    """Bootstrap samples of rows, the same for the same number of rows.

    Args:
        num_rows: n.
        num: K.
        groups: Per row the group that it is drawn with; () = each row alone.

    Returns:
        [K, n] counts.
    """
    rng = stream(0, "bootstrap", num_rows)
    if not groups:
        return rng.multinomial(num_rows, [1 / num_rows] * num_rows, size=num).astype(np.int64)
    names, of_row = np.unique(np.asarray(groups), return_inverse=True)
    counts = rng.multinomial(len(names), [1 / len(names)] * len(names), size=num)
    return counts[:, of_row].astype(np.int64)


def sampled(metric: str, predictions: Sequence[Prediction], samples: Draws) -> Floats:
    """Return a metric of each sample [K]; NaN if the sample does not define it."""
    if metric == "accuracy":
        return _mean(np.array([is_right(p) for p in predictions], dtype=np.float64), samples)
    if metric == "auc" and (two := _two_way(predictions)):
        return _auc(*two, samples)
    found = []
    for sample in samples[:SLOW_DRAWS]:
        value = METRICS[metric]([p for p, n in zip(predictions, sample, strict=True) for _ in range(n)])
        found.append(np.nan if value is None else value)
    return np.array(found, dtype=np.float64)


def _mean(values: Floats, samples: Draws) -> Floats:
    sizes = samples.sum(axis=1)  # drawn groups may have unequal sizes
    found: Floats = np.divide(samples @ values, sizes, out=np.full(len(samples), np.nan), where=sizes > 0)
    return found


def _two_way(predictions: Sequence[Prediction]) -> tuple[NDArray[np.bool_], Floats] | None:
    if any(len(p.scores) != 2 for p in predictions):
        return None
    truth = np.array([p.example.answer == p.example.choices[1] for p in predictions])
    return truth, np.array([p.scores[1] - p.scores[0] for p in predictions])


def _auc(truth: NDArray[np.bool_], scores: Floats, samples: Draws) -> Floats:
    """Mann-Whitney's statistic of each sample; equal scores count half."""
    _, place = np.unique(scores, return_inverse=True)
    above, below = (np.zeros((len(samples), place.max() + 1)) for _ in range(2))
    for row, at in enumerate(place):
        (above if truth[row] else below)[:, at] += samples[:, row]
    lower = np.cumsum(below, axis=1) - 0.5 * below
    pairs = above.sum(axis=1) * below.sum(axis=1)
    won = (above * lower).sum(axis=1)
    found: Floats = np.divide(won, pairs, out=np.full(len(samples), np.nan), where=pairs > 0)
    return found


def estimate_rows(metric: str, runs: Sequence[Sequence[Prediction]], groups: Sequence[str] = ()) -> RowEstimate:
    """Mean of a metric over runs, with its interval over rows.

    Args:
        metric: Its name.
        runs: Predictions of each run, for the same rows in the same order.
        groups: Per row the group that it is drawn with; () = each row alone.

    Returns:
        The mean of the runs that define the metric.
    """
    n = len(runs[0]) if runs else 0
    values = [v for run in runs if (v := METRICS[metric](run)) is not None]
    value = float(np.mean(values)) if values and len(values) == len(runs) else None
    if value is None or n < LEAST_ROWS:
        return RowEstimate(value, None, None, n)
    if metric == "accuracy" and value in (0.0, 1.0):  # every sample would have the same value
        least = 0.025 ** (1 / (len(set(groups)) or n))  # Clopper and Pearson's (Biometrika 26, 1934)
        return RowEstimate(value, least, 1.0, n) if value else RowEstimate(value, 0.0, 1 - least, n)
    samples = draws(n, DRAWS, groups)
    low, high = _ends(np.mean([sampled(metric, run, samples) for run in runs], axis=0))
    return RowEstimate(value, low, high, n)


def paired_rows(
    metric: str,
    a: Sequence[Sequence[Prediction]],
    b: Sequence[Sequence[Prediction]],
    groups: Sequence[str] = (),
) -> PairedRows | None:
    """Compare two methods on the same rows.

    Args:
        metric: Its name.
        a: Predictions of each run of one method, for the same rows in the same order.
        b: Those of the other method.
        groups: Per row the group that it is drawn with; () = each row alone.

    Returns:
        The difference a - b; None if the rows do not define the metric.
    """
    means = []
    for runs in (a, b):
        values = [v for run in runs if (v := METRICS[metric](run)) is not None]
        if not values or len(values) < len(runs):
            return None
        means.append(float(np.mean(values)))
    n = len(a[0])
    if n < LEAST_ROWS:
        return PairedRows(means[0] - means[1], None, None, None, n)
    samples = draws(n, DRAWS, groups)
    left, right = (np.mean([sampled(metric, run, samples) for run in runs], axis=0) for runs in (a, b))
    low, high = _ends(left - right)
    if low is None or high is None:
        return PairedRows(means[0] - means[1], None, None, None, n)
    p = _p_of((left - right)[~np.isnan(left - right)])
    if len(a) > 1 or len(b) > 1:
        return PairedRows(means[0] - means[1], low, high, p, n)
    right_a, right_b = ([is_right(p) for p in runs[0]] for runs in (a, b))
    only_a = sum(x and not y for x, y in zip(right_a, right_b, strict=True))
    only_b = sum(y and not x for x, y in zip(right_a, right_b, strict=True))
    p = mcnemar(only_a, only_b) if metric == "accuracy" and not groups else p
    return PairedRows(means[0] - means[1], low, high, p, n, only_a, only_b)


def _ends(values: Floats) -> tuple[float, float] | tuple[None, None]:
    defined = values[~np.isnan(values)]
    if len(defined) < LEAST_DEFINED * len(values):
        return None, None
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def _p_of(differences: Floats) -> float:
    """Twice the share of samples on the other side of 0, counting the observed sample itself; at most 1."""
    n = len(differences)
    side = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return float(min(1.0, 2 * (side + 1) / (n + 1)))


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p of McNemar's exact test (Psychometrika 12, 1947).

    Args:
        only_a: Rows that one method alone answers right.
        only_b: Rows that the other one alone answers right.

    Returns:
        Twice the lower tail of Binomial(only_a + only_b, 1/2), at most 1.
    """
    from scipy.special import bdtr

    total = only_a + only_b
    return float(min(1.0, 2 * bdtr(min(only_a, only_b), total, 0.5))) if total else 1.0


def calibration(predictions: Sequence[Prediction], num_bins: int = 10) -> Calibration | None:
    """Return the calibration of the closed questions; None if there are none.

    Args:
        predictions: One per row.
        num_bins: Bins of equal width over 0 to 1.
    """
    rows = [(max(probabilities(p)), is_right(p)) for p in predictions if p.scores]
    if not rows:
        return None
    of_bin: dict[int, list[tuple[float, bool]]] = {}
    for confidence, right in rows:
        of_bin.setdefault(min(num_bins - 1, int(confidence * num_bins)), []).append((confidence, right))
    bins = []
    for _, members in sorted(of_bin.items()):
        sums = [sum(values) / len(members) for values in zip(*members, strict=True)]
        bins.append((len(members), float(sums[0]), float(sums[1])))
    ece = sum(n * abs(right - sure) for n, sure, right in bins) / len(rows)
    mean, share = (float(np.mean(column)) for column in zip(*rows, strict=True))
    return Calibration(ece, mean, share, len(rows), tuple(bins))


def confusion(predictions: Sequence[Prediction]) -> Confusion | None:
    """Return truth against answer of the closed questions; None if there are none."""
    pairs = Counter((p.example.answer, str(chosen(p))) for p in predictions if p.scores)
    choices = dict.fromkeys(choice for p in predictions for choice in p.example.choices if p.scores)
    if not pairs:
        return None
    labels = tuple(choice for choice in choices if any(choice in pair for pair in pairs))
    return Confusion(labels, tuple(tuple(pairs[truth, answer] for answer in labels) for truth in labels))
