"""Modality dropout: Shapley values by hand, odds, engines, resume, and a rate of 0 that changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmllm.backbones.base import Tiny
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError
from fedmllm.core.rng import stream
from fedmllm.data.prompts import Plain
from fedmllm.federation.importance import importance
from fedmllm.runs.result import load_run
from fedmllm.runs.run import run
from fedmllm.scenarios.modalities.dropout import ImportanceDropout, ModalityDropout, UniformDropout, coalitions, shapley
from fedmllm.testing import check_settings, examples, perturbed
from support.runs import Stop, events, experiment

BOTH = ("image", "text")
IMPORTANCE = {"name": "importance", "rows": 4, "rate": 0.6}


def test_shapley_values_by_hand():
    v = {frozenset(): -1.0, frozenset({"image"}): -0.6, frozenset({"text"}): -0.9, frozenset(BOTH): -0.2}
    found = shapley(v, BOTH)
    assert found["image"] == pytest.approx(((-0.2 + 0.9) + (-0.6 + 1.0)) / 2)
    assert sum(found.values()) == pytest.approx(-0.2 + 1.0)
    three, rng = ("a", "b", "c"), np.random.default_rng(0)
    random = {s: float(rng.normal()) for s in coalitions(three)}
    assert sum(shapley(random, three).values()) == pytest.approx(random[frozenset(three)] - random[frozenset()])
    assert len(coalitions(three)) == 8


@pytest.mark.parametrize("name", sorted(ModalityDropout.members))
def test_every_member_gives_odds(name: str):
    member = ModalityDropout.pick(name, "modality_dropout")
    check_settings(member)
    odds = member.odds(BOTH, {"image": 0.3, "text": 0.1})
    assert all(0 <= share <= 1 for share in odds)
    assert sum(odds) <= 1
    assert member.drop(frozenset({"image"}), BOTH, (0.5, 0.5), stream(0, "x")) == {"image"}  # already incomplete


def test_odds_follow_the_importance():
    dropout = ImportanceDropout(rate=0.4, tau=0.1)
    odds = dropout.odds(BOTH, {"image": 0.3, "text": 0.1})
    assert odds[0] / odds[1] == pytest.approx(math.exp(2))
    assert sum(odds) == pytest.approx(0.4)
    assert dropout.odds(BOTH, {}) == [0.0, 0.0]  # no complete row was measured
    lost = [dropout.drop(frozenset(BOTH), BOTH, odds, stream(0, "row", i)) for i in range(2000)]
    assert sum(v == {"text"} for v in lost) / 2000 == pytest.approx(odds[0], abs=0.03)  # lost the image
    assert sum(v == {"image"} for v in lost) / 2000 == pytest.approx(odds[1], abs=0.03)
    assert UniformDropout(rate=0.5).odds(("a", "b", "c", "d", "e"), {}) == [0.1] * 5


def test_importance_is_what_occlusion_costs(tmp_path: Path):
    tiny = Tiny().load(seed=0)
    rows, adapter = examples(tmp_path)[:3], perturbed(tiny)
    found = importance(tiny, Plain(), rows, BOTH, adapter)
    tiny.set_lora(adapter)

    def value(visible: frozenset[str]) -> float:
        scores = [tiny.score([Plain().render(r, visible)], [Plain().options(r)])[0] for r in rows]
        logs = [s[r.choices.index(r.answer)] - np.logaddexp(*s) for r, s in zip(rows, scores, strict=True)]
        return float(np.mean(logs))

    assert sum(found.values()) == pytest.approx(value(frozenset(BOTH)) - value(frozenset()), abs=1e-5)
    assert importance(tiny, Plain(), [], BOTH, adapter) == {}


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dropped")
    run(experiment(num_rounds=2, modality_dropout=IMPORTANCE), folder / "run")
    run(experiment(num_rounds=2), folder / "none")
    return folder


def distance(one: Path, two: Path) -> float:
    a, b = load_run(one).adapter.tensors, load_run(two).adapter.tensors
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def test_a_rate_of_zero_only_reports(dropped: Path, tmp_path: Path):
    run(experiment(num_rounds=2, modality_dropout={**IMPORTANCE, "rate": 0.0}), tmp_path / "zero")
    assert distance(tmp_path / "zero", dropped / "none") == 0.0
    for event in events(tmp_path / "zero", "round"):
        assert all({"importance_image", "importance_text"} <= client.keys() for client in event["clients"])
    assert distance(dropped / "run", dropped / "none") > 1e-6  # and this one does drop


def test_engines_agree_and_a_resumed_run_has_the_same_bytes(dropped: Path, tmp_path: Path):
    table: dict[str, Any] = {"num_rounds": 2, "modality_dropout": IMPORTANCE}
    run(experiment(**table, engine="in-process"), tmp_path / "in-process")
    assert distance(tmp_path / "in-process", dropped / "run") < 1e-4
    with pytest.raises(KeyboardInterrupt):
        run(experiment(**table), tmp_path / "run", [Stop("round", 2)])
    run(experiment(**table), tmp_path / "run", resume=True)
    assert distance(tmp_path / "run", dropped / "run") == 0.0
    record = [event["clients"][0]["importance_image"] for event in events(tmp_path / "run", "round")]
    assert record == [event["clients"][0]["importance_image"] for event in events(dropped / "run", "round")]


def test_a_client_without_complete_rows_trains_as_before(tmp_path: Path):
    cross = {"num_rounds": 1, "scenario": {"name": "cross", "num_image_clients": 1}}
    run(experiment(**cross, modality_dropout="importance"), tmp_path / "importance")
    run(experiment(**cross), tmp_path / "none")
    assert distance(tmp_path / "importance", tmp_path / "none") == 0.0
    (event,) = events(tmp_path / "importance", "round")
    assert all("importance_image" not in client for client in event["clients"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"completion": "oracle"}, "which would fill what is dropped"),
        ({"engine": "flower-sites"}, "which drops no modalities; allowed: flower-simulation"),
        ({"modality_dropout": {"name": "importance", "tau": 0}}, "modality_dropout.tau"),
    ],
)
def test_what_cannot_go_together_is_refused_when_it_is_read(changed: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        experiment(**{"modality_dropout": "importance", **changed})
    assert message in str(error.value)


def test_names_and_run_ids():
    plain, none = experiment(), experiment(modality_dropout="none")
    assert plain.run_id() == none.run_id()
    other = experiment(modality_dropout={"name": "uniform", "rate": 0.2})
    assert other.method_name() == "fedavg+dropout-uniform(rate=0.2)"
    assert Experiment.parse(other.dump()) == other
    with pytest.raises(ConfigError, match="32 passes a row; allowed: at most 4 modalities, or 'uniform'"):
        ImportanceDropout().check(("a", "b", "c", "d", "e"))
