"""Robust aggregators: by hand, against plain numpy, and what one client that sends noise can do."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fedmllm.algorithms.robust import Krum, Median, MultiKrum, Robust, TrimmedMean, krum_order
from fedmllm.algorithms.server_optimizers import FedAvg
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import NothingToAverage
from fedmllm.core.types import ClientUpdate, Params, Round

AT = Round(number=1, seed=0, num_rounds=1, cohort=(), num_clients=10)
ALL = [Median(), TrimmedMean(), Krum(), MultiKrum()]


def updates(values: list[list[float]]) -> list[ClientUpdate]:
    return [
        ClientUpdate(k, {"a": torch.tensor(v[:1]).float(), "b": torch.tensor(v[1:]).float()}, 10 + k, {"loss": 0.0})
        for k, v in enumerate(values)
    ]


def centre(aggregator: Robust, values: list[list[float]]) -> list[float]:
    zero: Params = {"a": torch.zeros(1), "b": torch.zeros(len(values[0]) - 1)}
    after, _ = aggregator.apply(zero, {}, AT, updates(values))
    return [*after["a"].tolist(), *after["b"].tolist()]


def test_median_by_hand() -> None:
    assert centre(Median(), [[1, 9], [2, -5], [300, 0]]) == [2, 0]
    assert centre(Median(), [[1, 9], [2, -5], [300, 0], [4, 2]]) == [3, 1]  # the mean of the middle two


def test_trimmed_mean_by_hand() -> None:
    assert centre(TrimmedMean(), [[1, 9], [2, -5], [300, 0], [4, 2]]) == [3, 1]
    assert centre(TrimmedMean(num_bad=2), [[1, 9], [2, 8], [3, 7], [4, 6], [99, -99]]) == [3, 7]


def test_krum_by_hand() -> None:
    values = [[0, 0], [1, 0], [1.5, 0], [3, 0], [100, 0]]  # K - f - 2 = 2 nearest: scores 3.25, 1.25, 2.5, 6.25, ...
    assert krum_order([u.delta for u in updates(values)], 1) == [1, 2, 0, 3, 4]
    assert centre(Krum(), values) == [1, 0]
    assert centre(MultiKrum(num_kept=3), values) == pytest.approx([2.5 / 3, 0])


def reference_krum(rows: np.ndarray, num_bad: int) -> np.ndarray:
    """Blanchard et al., section 4, as the text has it: for i, the n - f - 2 closest of the others, by sorting them."""
    n = len(rows)
    scores = []
    for i in range(n):
        distances = sorted(float(np.sum((rows[i] - rows[j]) ** 2)) for j in range(n) if j != i)
        scores.append(sum(distances[: n - num_bad - 2]))
    return np.argsort(scores, kind="stable")


@pytest.mark.parametrize(("num", "num_bad", "seed"), list(itertools.product([7, 10], [1, 2], range(5))))
def test_against_plain_numpy(num: int, num_bad: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(num, 40))
    order = reference_krum(rows.astype(np.float32).astype(np.float64), num_bad)
    assert krum_order([u.delta for u in updates(rows.tolist())], num_bad) == order.tolist()
    expected = {
        Median(): np.median(rows, axis=0),
        TrimmedMean(num_bad=num_bad): np.sort(rows, axis=0)[num_bad:-num_bad].mean(axis=0),
        Krum(num_bad=num_bad): rows[order[0]],
        MultiKrum(num_bad=num_bad, num_kept=3): rows[order[:3]].mean(axis=0),
        MultiKrum(num_bad=num_bad): rows[order[: max(1, num - 2 * num_bad - 3)]].mean(axis=0),
    }
    for aggregator, delta in expected.items():
        assert centre(aggregator, rows.tolist()) == pytest.approx(delta.tolist(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("aggregator", ALL, ids=lambda a: a.name)
@pytest.mark.parametrize("liar", range(7))
@pytest.mark.parametrize("size", [10.0, 1e6, 1e20])
def test_one_client_that_sends_noise_moves_nothing_far(aggregator: Robust, liar: int, size: float) -> None:
    rng = np.random.default_rng(liar)
    honest = 1 + 0.1 * rng.normal(size=(7, 50))
    sent = honest.copy()
    sent[liar] = size * rng.normal(size=50)
    moved = np.abs(np.array(centre(aggregator, sent.tolist())) - 1).max()
    assert moved < 0.4  # inside the spread of the honest ones
    plain, _ = FedAvg().apply({"a": torch.zeros(1), "b": torch.zeros(49)}, {}, AT, updates(sent.tolist()))
    assert (plain["b"] - 1).abs().max() > 1


@pytest.mark.parametrize("aggregator", ALL, ids=lambda a: a.name)
def test_too_few_updates_for_the_formula_are_not_averaged(aggregator: Robust) -> None:
    few = updates([[1.0, 2.0]] * (aggregator.least_updates() - 1))
    with pytest.raises(NothingToAverage, match=f"{aggregator.name} needs {aggregator.least_updates()} updates"):
        aggregator.apply({"a": torch.zeros(1), "b": torch.zeros(1)}, {}, AT, few)


def test_multi_krum_never_keeps_so_many_that_a_bad_one_is_among_them() -> None:
    values = [[0.0, 0.0]] * 5 + [[900.0, -900.0]]
    assert MultiKrum(num_bad=1, num_kept=5).least_updates() == 6
    assert centre(MultiKrum(num_bad=1, num_kept=5), values) == [0, 0]
    with pytest.raises(NothingToAverage, match="multi-krum needs 6 updates"):
        centre(MultiKrum(num_bad=1, num_kept=5), values[1:])


def test_they_are_picked_by_name() -> None:
    experiment = Experiment.parse(
        {"data": "synthetic-irony", "cohort_size": 7, "aggregator": {"name": "krum", "num_bad": 2}}
    )
    assert experiment.aggregator == Krum(num_bad=2)
