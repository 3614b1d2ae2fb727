"""Client objectives and learning-rate schedules, by hand."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from fedmllm.algorithms.objectives import AdaptiveFedProx, ClientView, FedProx, Objective, TaskLoss
from fedmllm.algorithms.schedules import round_factor, step_factor
from fedmllm.testing import check_objective


def view(missing_rate: float = 0.0, num_layers: int = 28) -> ClientView:
    def layer_of(name: str) -> int | None:
        found = re.search(r"layers\.(\d+)\.", name)
        return int(found[1]) if found else None

    return ClientView(missing_rate, num_layers, layer_of)


def test_task_loss_pulls_nothing_and_fedprox_everything() -> None:
    assert TaskLoss().prox_mu("layers.3.q", view()) == 0
    assert FedProx(mu=0.3).prox_mu("layers.3.q", view()) == 0.3
    assert FedProx(mu=0.3).prox_mu("resampler.kv", view()) == 0.3


def test_adaptive_band_is_the_published_one_at_28_layers() -> None:
    prox = AdaptiveFedProx(mu_min=0.1, mu_max=0.1)
    pulled = [layer for layer in range(28) if prox.prox_mu(f"layers.{layer}.q", view())]
    assert pulled == list(range(4, 24))  # s <= l <= 27 - s with s = 4
    assert prox.prox_mu("resampler.kv", view()) == 0
    assert prox.prox_mu("layers.10.q", view(missing_rate=0.7)) == 0.1  # the published constant


def test_adaptive_band_scales_with_depth() -> None:
    prox = AdaptiveFedProx()
    assert [layer for layer in range(4) if prox.prox_mu(f"layers.{layer}.q", view(num_layers=4))] == [1, 2]


def test_adaptive_weight_grows_with_what_is_missing() -> None:
    prox = AdaptiveFedProx(mu_min=0.1, mu_max=0.5)
    assert [prox.prox_mu("layers.10.q", view(m)) for m in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.3, 0.5])


def test_adaptive_refuses_an_empty_range() -> None:
    with pytest.raises(ValidationError, match="mu_min"):
        AdaptiveFedProx(mu_min=0.2, mu_max=0.1)


@pytest.mark.parametrize("name", sorted(Objective.members))
def test_every_objective_is_pure_and_never_negative(name: str) -> None:
    check_objective(Objective.pick(name, "objective"))


def test_round_schedule() -> None:
    assert round_factor("cosine", 1, 25) == 1.0  # minus the published fault: the first round is not doubled
    assert round_factor("cosine-reference", 1, 50) == 2.0
    factors = [round_factor("cosine", t, 25) for t in range(1, 26)]
    assert factors == sorted(factors, reverse=True)
    assert 0 < factors[-1] < 0.01  # the last round still trains
    assert [round_factor("cosine", t, 300) for t in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])  # 1 % = 3 rounds
    assert round_factor("cosine", 1, 1) == 1.0
    assert {round_factor("constant", t, 9) for t in range(1, 10)} == {1.0}


def test_step_schedule() -> None:
    assert step_factor("cosine", 0, 1) == 1.0  # a client of one step trains
    assert step_factor("cosine-reference", 0, 1) == 0.0  # the published fault
    steps = [step_factor("cosine", s, 300) for s in range(300)]
    assert steps[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert steps[3:] == sorted(steps[3:], reverse=True)
    assert steps[-1] > 0
