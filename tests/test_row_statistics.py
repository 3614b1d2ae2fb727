"""Statistics over test rows: by hand, and against independent formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedmllm.core.metrics import METRICS
from fedmllm.core.types import Example, Prediction
from fedmllm.runs.row_statistics import (
    calibration,
    confusion,
    draws,
    estimate_rows,
    mcnemar,
    paired_rows,
    sampled,
)


def row(p: float, answer: str = "yes", group: str = "") -> Prediction:
    """A two-way question whose second choice, "yes", has probability p."""
    example = Example(0, {}, "?", ("no", "yes"), answer, "t:1", {"patient": group})
    return Prediction(example, (math.log(1 - p), math.log(p)), None)


def many(seed: int, n: int = 60, shift: float = 0.0) -> list[Prediction]:
    rng, truth = np.random.default_rng(seed), np.random.default_rng(7).random(n) < 0.5
    p = 1 / (1 + np.exp(-rng.normal(np.where(truth, 0.6 + shift, -0.6 - shift))))
    return [row(float(x), "yes" if t else "no") for x, t in zip(p, truth, strict=True)]


@pytest.mark.parametrize("metric", ["accuracy", "auc"])
def test_a_sample_has_the_value_of_the_metric_on_the_drawn_rows(metric: str) -> None:
    rows = [*many(1, 30), row(0.5), row(0.5, "no")]  # two equal scores
    samples = draws(len(rows), 20)
    for sample, value in zip(samples, sampled(metric, rows, samples), strict=True):
        drawn = [p for p, n in zip(rows, sample, strict=True) for _ in range(n)]
        assert value == pytest.approx(METRICS[metric](drawn))


def test_the_interval_of_accuracy_is_near_the_binomial_one() -> None:
    rows = [row(0.9)] * 320 + [row(0.1)] * 80
    found = estimate_rows("accuracy", [rows])
    half = 1.96 * math.sqrt(0.8 * 0.2 / 400)
    assert found.value == 0.8
    assert (found.low, found.high) == (pytest.approx(0.8 - half, abs=0.006), pytest.approx(0.8 + half, abs=0.006))
    # Rows that are copies of each other in groups of 4 hold a quarter of the information.
    wide = estimate_rows("accuracy", [rows], [str(i // 4) for i in range(400)])
    assert wide.high is not None
    assert wide.low is not None
    assert wide.high - wide.low == pytest.approx(2 * 2 * half, rel=0.15)  # steps of 0.01


def test_few_rows_and_undefined_metrics_have_no_interval() -> None:
    few = estimate_rows("accuracy", [[row(0.9)] * 4])
    assert (few.value, few.low) == (1.0, None)
    assert estimate_rows("auc", [[row(0.9)] * 20]).value is None  # one class
    all_right = estimate_rows("accuracy", [[row(0.9)] * 20])
    assert (all_right.low, all_right.high) == (pytest.approx(0.025 ** (1 / 20)), 1.0)  # not from 100 % to 100 %
    assert (
        estimate_rows("auc", [[row(0.9), *[row(0.2, "no")] * 5]]).low is None
    )  # a third of the samples have one class
    assert paired_rows("auc", [[row(0.9)] * 20], [[row(0.8)] * 20]) is None


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(9, 1) == mcnemar(1, 9)


def test_a_paired_test_counts_the_rows_that_one_alone_has_right() -> None:
    a = [row(0.9)] * 30 + [row(0.1)] * 10
    b = [row(0.9)] * 18 + [row(0.1)] * 12 + [row(0.9)] * 2 + [row(0.1)] * 8
    found = paired_rows("accuracy", [a], [b])
    assert found is not None
    assert (found.only_a, found.only_b) == (12, 2)
    assert found.difference == pytest.approx(0.25)
    assert found.p == pytest.approx(mcnemar(12, 2))
    assert found.low is not None
    assert 0 < found.low < 0.25
    swapped = paired_rows("accuracy", [b], [a])
    assert swapped is not None
    assert swapped.p == found.p


def test_two_methods_of_equal_quality_are_rarely_told_apart() -> None:
    """The bootstrap's p of AUC: 5 % of null comparisons are below 0.05, and a true difference is found."""
    ps = [found.p for i in range(40) if (found := paired_rows("auc", [many(2 * i)], [many(2 * i + 1)])) and found.p]
    assert sum(p < 0.05 for p in ps) <= 6
    far = paired_rows("auc", [many(1, shift=1.0)], [many(2, shift=-0.5)])
    assert far is not None
    assert far.p is not None
    assert far.p < 0.05


def test_calibration_by_hand() -> None:
    rows = [row(0.95), row(0.95, "no"), row(0.25, "no"), row(0.25, "no")]
    found = calibration(rows)
    assert found is not None
    assert [n for n, _, _ in found.bins] == [2, 2]  # confidences 0.75, 0.75 and 0.95, 0.95
    assert found.ece == pytest.approx(0.5 * abs(1.0 - 0.75) + 0.5 * abs(0.5 - 0.95))
    assert (found.accuracy, found.confidence) == (0.75, pytest.approx(0.85))
    assert calibration([Prediction(Example(0, {}, "?", (), "x", "t"), (), "x", "x")]) is None


def test_confusion_has_truth_in_rows() -> None:
    found = confusion([row(0.9), row(0.9), row(0.2), row(0.9, "no")])
    assert found is not None
    assert found.labels == ("no", "yes")
    assert found.counts == ((0, 1), (1, 2))
