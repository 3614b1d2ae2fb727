"""Audits: their statistics, planted faults that they catch, and honest mechanisms that they do not accuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedmllm.algorithms.privacy.accounting import gaussian_epsilon
from fedmllm.algorithms.privacy.client_dp import ClientDp, NoisyMean
from fedmllm.algorithms.privacy.noise import simulation_key
from fedmllm.algorithms.privacy.row_dp import RowDp, RowNoise
from fedmllm.cli.main import app
from fedmllm.core.errors import ConfigError
from fedmllm.core.types import ClientUpdate, Params
from fedmllm.federation.client import Clients
from fedmllm.runs.audits import membership
from fedmllm.runs.audits.audit import audit
from fedmllm.runs.audits.bounds import exposure, lira_scores, one_run_epsilon, true_positive_rate
from fedmllm.runs.audits.one_run import Canaries, CanaryMean, CanaryNoise, one_run, verdict
from fedmllm.runs.inputs import Inputs
from support import runs
from support.planted import FAULTS, WeightedByRows, planted

LIKE: Params = {"a": torch.zeros(1000)}
ROUNDS, SIZE, Z = 5, 10, 8.0
CLAIM = gaussian_epsilon(Z, ROUNDS, 1e-5)
KEYS = (bytes([i] * 32) for i in range(256))


# ---- statistics


@pytest.mark.parametrize(
    ("m", "r", "v", "delta", "epsilon"),
    [
        (100, 100, 100, 1e-5, 3.490),
        (100, 100, 100, 0.0, 3.493),
        (1000, 600, 600, 1e-5, 5.27),
        (200, 60, 60, 1e-5, 2.97),
        (200, 60, 50, 1e-5, 1.01),
        (200, 100, 60, 1e-5, 0.05),
        (200, 100, 50, 1e-5, 0.0),
    ],
)
def test_one_run_bounds_of_the_paper_s_formula(m: int, r: int, v: int, delta: float, epsilon: float) -> None:
    assert one_run_epsilon(delta, m, r, v) == pytest.approx(epsilon, abs=6e-3)


def test_exposure_and_true_positives_by_hand() -> None:
    assert exposure([0.0, -1.0, -2.0, -3.0], 0) == 2.0
    assert exposure([0.0, -1.0, -2.0, -3.0], 3) == 0.0
    scores, is_in = np.arange(200.0), np.arange(200) >= 100
    assert true_positive_rate(scores, is_in, 0.01) == 1.0
    assert true_positive_rate(-scores, is_in, 0.01) == 0.0
    assert true_positive_rate([3.0, 1.0, 2.0, 0.0], [True, True, False, False], 0.001) == 0.5


def test_lira_recognizes_members_whose_logits_are_higher() -> None:
    rng = np.random.default_rng(0)
    is_in = rng.integers(0, 2, (16, 30)).astype(bool)
    phi = rng.normal(size=30) * 5 + rng.normal(size=(16, 30)) + 3 * is_in  # rows differ more than membership does
    scores = lira_scores(phi, is_in)
    assert true_positive_rate(scores, is_in, 0.01) > 0.3
    assert true_positive_rate(phi, is_in, 0.01) < 0.2
    assert abs(scores[is_in].mean() + scores[~is_in].mean()) < 3


# ---- planted faults, 20 repeats each


def client_audit(fault: str, repeat: int) -> dict[str, Any]:
    s = ClientDp(name="client-dp", noise_multiplier=Z / 10 if fault == "noise / 10" else Z, clip=0.5)
    key = simulation_key(0) if fault == "public seed" else bytes([repeat + 1] * 32)
    inner = (WeightedByRows if fault == "weights" else NoisyMean)(s, SIZE, key)
    canaries = Canaries(100, np.random.default_rng(repeat))
    mean = CanaryMean(inner, canaries, 1000, NoisyMean(s, SIZE, simulation_key(0)))
    real = [ClientUpdate(k, {"a": torch.full((1000,), 0.01 * k)}, 5, {}) for k in range(SIZE)]
    for t in range(1, ROUNDS + 1):
        mean(real, t, LIKE, {})
    return verdict(canaries, CLAIM, 1e-5, mean.noise_is_known)


def row_audit(fault: str, repeat: int) -> dict[str, Any]:
    s = RowDp(
        name="row-dp",
        noise_multiplier=Z / 10 if fault == "noise / 10" else Z,
        clip=0.5,
        simulate_noise=fault == "public seed",
    )
    key = simulation_key(0) if fault == "public seed" else bytes([repeat + 1] * 32)
    canaries = Canaries(100, np.random.default_rng(repeat))
    noise = CanaryNoise(RowNoise(s, key, "0" * 12), canaries, 1, [RowNoise(s, simulation_key(0), "0" * 12)])
    for t in range(1, ROUNDS + 1):
        noise.noisy(torch.full((1000,), 0.03), 0, t, 0)
        noise.noisy(torch.full((1000,), 0.03), 1, t, 0)
    return verdict(canaries, CLAIM, 1e-5, noise.noise_is_known)


@pytest.mark.parametrize(
    ("attack", "fault"),
    [
        (client_audit, "noise / 10"),
        (client_audit, "weights"),
        (client_audit, "public seed"),
        (row_audit, "noise / 10"),
        (row_audit, "public seed"),
    ],
)
def test_every_planted_fault_is_caught(attack: Any, fault: str) -> None:
    made = [attack(fault, repeat) for repeat in range(20)]
    assert all(row["caught"] for row in made), [row["attack"] for row in made]


@pytest.mark.parametrize("attack", [client_audit, row_audit])
def test_no_honest_mechanism_is_accused(attack: Any) -> None:
    made = [attack("", repeat) for repeat in range(20)]
    assert not any(row["caught"] for row in made), [row["reason"] for row in made]
    assert all(row["bound"] < CLAIM < row["largest_bound"] for row in made)


# ---- on experiments

CLIENT = {"name": "client-dp", "noise_multiplier": 10.0, "clip": 0.5, "delta": 1e-3}
ROW = {"name": "row-dp", "noise_multiplier": 10.0, "clip": 0.5, "delta": 1e-3}
QUIET = {"update_filter": {"on_bad_update": "drop_client"}, "num_rounds": 2}
NO_CLIP = {**runs.TABLE["train"], "clip_norm": 0}


@pytest.mark.parametrize("privacy", [CLIENT, ROW], ids=lambda p: p["name"])
def test_the_verb_audits_an_experiment(tmp_path: Path, privacy: dict[str, Any]) -> None:
    table = {**runs.TABLE, **QUIET, "train": NO_CLIP, "privacy": privacy}
    del table["checkpoint"]
    rows = audit(runs.experiment(**table), "one-run", tmp_path / "audit.json", num_canaries=50)
    assert not rows[0]["caught"]
    saved = json.loads((tmp_path / "audit.json").read_text())
    assert saved["rows"] == rows
    assert saved["settings"]["privacy"]["noise_multiplier"] == 10.0
    assert "epsilon" in rows[0]["claim"]
    simulated = runs.experiment(**{**table, "privacy": {**privacy, "simulate_noise": True}})
    (row,) = audit(simulated, "one-run", num_canaries=50)
    assert row["reason"].startswith("the noise can be computed from the public seed")


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, faults in FAULTS.items() for fault in faults])
def test_a_run_with_a_planted_fault_is_caught_and_an_honest_one_is_not(name: str, fault: str) -> None:
    privacy = {"name": name, "noise_multiplier": 8.0, "clip": 0.5}
    experiment = runs.experiment(**QUIET | {"num_rounds": 5, "cohort_size": 3}, train=NO_CLIP, privacy=privacy)
    row = one_run(Inputs.load(experiment), 100, np.random.default_rng(1), planted(experiment, fault))
    assert row["caught"] == bool(fault), row


def test_words_are_found_without_row_dp_and_not_with_it() -> None:
    table = {"train": NO_CLIP}
    plain = {row["attack"]: row for row in audit(runs.experiment(**table), "tokens")}
    crafted, ordinary = (plain[f"{a}, one step of one row"] for a in ("a crafted adapter", "an ordinary adapter"))
    assert crafted["caught"]
    assert crafted["bound"] > ordinary["bound"]
    noisy = audit(runs.experiment(**table, privacy={**ROW, "noise_multiplier": 1.0}), "tokens")
    assert not any(row["caught"] for row in noisy)


def test_a_secret_that_was_inserted_often_is_exposed() -> None:
    train = {"lr": 1e-2, "batch_size": 4, "accumulation": 1, "epochs": 6, "clip_norm": 0}
    data = {**runs.TABLE["data"], "num_train": 12}
    once, _, often = audit(runs.experiment(data=data, train=train, num_rounds=2, cohort_size=3), "canary")
    assert once["bound"] < often["bound"]
    assert often["caught"]


def test_lira_finds_what_each_shadow_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a training that only remembers: the halves that are left out, and the scores, are wired to each other."""
    held: set[str | int] = set()
    rng = np.random.default_rng(0)

    def remember(inputs: Inputs, clients: Clients) -> Params:
        held.clear()
        held.update(inputs.train[row].id for shard in clients.shards for row in shard.rows)
        return inputs.start

    def margins(inputs: Inputs, adapter: Params, rows: Any) -> list[float]:
        return [6.0 * (example.id in held) + float(rng.normal()) for example, _ in rows]

    monkeypatch.setattr(membership, "trained_adapter", remember)
    monkeypatch.setattr(membership, "_margins", margins)
    (row,) = audit(runs.experiment(), "lira", num_shadows=8)
    assert row["bound"] > 0.95
    assert row["tpr_at_0.01"] >= row["tpr_at_0.001"] > 0.2
    assert row["caught"]
    with pytest.raises(ConfigError, match="--shadows: got 3; allowed: 4 and more"):
        audit(runs.experiment(), "lira", num_shadows=3)


def test_what_cannot_be_audited_is_refused(tmp_path: Path) -> None:
    for changed, kind, message in (
        ({"method": "local"}, "tokens", 'method: got "local"'),
        ({"aggregator": "scaffold"}, "canary", "whose clients keep state"),
        ({"engine": "flower-simulation"}, "lira", "an audit runs in one process"),
        ({}, "one-run", "--kind one-run needs a claim"),
    ):
        with pytest.raises(ConfigError, match=message):
            audit(runs.experiment(**changed), kind)  # type: ignore[arg-type]
    assert math.isinf(gaussian_epsilon(0.0, 1, 1e-5))


def test_the_verb_prints_a_table_and_exits_with_1_if_an_attack_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(
        'data = {name = "synthetic-irony", num_train = 36, num_test = 8}\npartition = {name = "iid", num_clients = 3}\n'
        "[train]\nlr = 1e-3\nmax_steps = 1\n"
    )
    said = CliRunner().invoke(app, ["audit", str(path), "--kind", "tokens", "--out", str(tmp_path / "a.json")])
    assert said.exit_code == 1
    assert "recovered" in said.output.replace("\n", " ")
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 4
