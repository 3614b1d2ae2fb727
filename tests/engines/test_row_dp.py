"""Row-level differential privacy: gradients of single rows, sensitivity, noise, engines, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmllm.algorithms.privacy.accounting import gaussian_epsilon
from fedmllm.algorithms.privacy.noise import simulation_key
from fedmllm.algorithms.privacy.row_dp import RowDp, RowNoise, clip_factors
from fedmllm.algorithms.sharing import FfaLora
from fedmllm.backbones.base import Lora, Precision, Tiny
from fedmllm.config import engine as engines
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, DataError, FedmllmError
from fedmllm.core.types import Example, Params, Round, Shard
from fedmllm.data.prompts import Plain
from fedmllm.federation.client import Clients, RowStore, Step
from fedmllm.federation.engines.stacked.engine import StackedEngine
from fedmllm.federation.engines.stacked.packing import items
from fedmllm.federation.engines.stacked.stack import Stack, gate_of
from fedmllm.runs.privacy import RowPrivacy
from fedmllm.runs.run import run
from fedmllm.testing import examples as made_up
from support import runs
from support.small_federation import COHORT, SIZES, federation, flat, one_after_another, sents, stirred, together
from support.tiny_families import FAMILIES, PORTS

KEY = b"k" * 32
DP: dict[str, Any] = {
    "privacy": {"name": "row-dp", "noise_multiplier": 1.0, "clip": 0.5, "delta": 1e-3},
    "train": {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 2, "clip_norm": 0},
    "num_rounds": 2,
}


def noise(z: float, clip: float = 1.0, key: bytes = KEY, simulate: bool = False) -> RowNoise:
    return RowNoise(RowDp(name="row-dp", noise_multiplier=z, clip=clip, simulate_noise=simulate), key, "0" * 12)


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Clients:
    rows = made_up(tmp_path_factory.mktemp("rows"))
    return federation(Tiny().load(seed=0), rows, clip_norm=0.0, batch_size=2, accumulation=2)


def clipped_sums(
    clients: Clients, start: Params, clip: float, token_budget: int = 1024
) -> tuple[list[Step], torch.Tensor]:
    """Each client's first step and its sum of clipped gradients [K, T]."""
    private = replace(clients, row_noise=noise(0.0, clip))
    members = [k for k in COHORT if SIZES[k]]
    steps = [next(private.steps(k, 1)) for k in members]
    engine = StackedEngine(engines.Stacked(token_budget=token_budget), private)
    gate = gate_of(clients.backbone)
    stack = Stack(engine._targets, clients.backbone.trainable(), [start] * len(members), gate=gate)
    engine._gradients(stack, steps, torch.zeros(len(members), dtype=torch.float64))
    return steps, stack.grads_KT.double()


def of_single_rows(clients: Clients, start: Params, step: Step) -> torch.Tensor:
    """Gradients of a step's rows one at a time, the plain way: [S, T]."""
    clients.backbone.set_lora(start)
    weights, out = clients.backbone.trainable(), []
    for row, seed in zip(step.rows, step.dropout_seeds, strict=True):
        for weight in weights.values():
            weight.grad = None
        nll_B, tokens_B = clients.backbone.loss(clients.backbone.collate([row]), [seed])
        (nll_B / tokens_B).sum().backward()
        out.append(torch.cat([weights[n].grad.reshape(-1) for n in start]).double())
    for weight in weights.values():
        weight.grad = None
    return torch.stack(out)


# ---- R1, R3, R6, R7: clipped sums


@pytest.mark.parametrize("family", ["tiny", "tiny with a gate", *FAMILIES, *PORTS])
def test_sums_of_clipped_gradients_are_those_of_single_rows(load: Any, examples: list[Example], family: str) -> None:
    gated = family == "tiny with a gate"
    backbone = Tiny(lora=Lora(modality_gate=True)).load(seed=0) if gated else load(family)
    clients = federation(backbone, examples, clip_norm=0.0)
    start = stirred(clients.backbone)
    steps, sums_KT = clipped_sums(clients, start, clip=0.05)
    for step, sum_T in zip(steps, sums_KT, strict=True):
        rows_ST = of_single_rows(clients, start, step)
        norms = rows_ST.norm(dim=1)
        assert (norms > 0.05).any()
        expected = (rows_ST * (0.05 / norms).clamp(max=1)[:, None]).sum(dim=0)
        assert float((sum_T - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("change", ["passes", "checkpointing", "small buffer"])
def test_clipping_does_not_depend_on_how_the_rows_are_computed(
    clients: Clients, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = stirred(clients.backbone)
    before = clipped_sums(clients, start, clip=0.05)[1]
    budget, other = 1024, clients
    if change == "passes":
        budget = 1  # one row a pass
    elif change == "checkpointing":
        other = replace(clients, backbone=Tiny(precision=Precision(gradient_checkpointing=True)).load(seed=0))
    else:
        monkeypatch.setattr("fedmllm.federation.engines.stacked.engine.ROW_GRADIENT_BYTES", 300_000)
    after = clipped_sums(other, start, 0.05, budget)[1]
    assert float((after - before).norm() / before.norm()) < 1e-5


def test_one_row_changes_the_sum_by_the_clip_at_most(clients: Clients) -> None:
    start, clip = stirred(clients.backbone), 0.05
    private = replace(clients, row_noise=noise(0.0, clip))
    whole = next(clients.steps(4, 1))
    engine = StackedEngine(engines.Stacked(), private)
    sums = []
    for step in (whole, Step(whole.rows[1:], whole.dropout_seeds[1:], whole.lr)):
        stack = Stack(engine._targets, clients.backbone.trainable(), [start])
        engine._gradients(stack, [step], torch.zeros(1, dtype=torch.float64))
        sums.append(stack.grads_KT[0].double())
    assert 0 < float((sums[0] - sums[1]).norm()) <= clip * (1 + 1e-5)
    assert len(items([whole])) == 4


# ---- groups: all rows of a patient are clipped together

WARDS = ("a", "b", "a", "a", "c")  # of each client's rows in turn: a patient with three rows of five


def by_patient(clients: Clients, name: Callable[[int], str], made: RowNoise) -> Clients:
    """The clients whose row i is of patient `name(i)`, clipped by patient."""
    rows = clients.store._examples
    named = [replace(row, columns={"patient": name(i)}) for i, row in enumerate(rows)]
    store = RowStore(clients.backbone, Plain(), named)
    settings = made.settings.model_copy(update={"unit": "group"})
    return replace(clients, store=store, row_noise=RowNoise(settings, made._key, made._run_id, "patient"))


def patients(i: int) -> str:
    return f"{i // 5}{WARDS[i % 5]}"


def sums_by_patient(clients: Clients, start: Params, step: Step, clip: float) -> torch.Tensor:
    """The sum of a step's clipped gradients, as `loop` of patients and rows would compute it."""
    rows_ST, total = of_single_rows(clients, start, step), 0.0
    for unit in dict.fromkeys(step.units):
        whole = rows_ST[[i for i, one in enumerate(step.units) if one == unit]].sum(dim=0)
        total = total + whole * min(1.0, clip / float(whole.norm()))
    return total


@pytest.mark.parametrize("computed", ["at once", "one row a pass", "one patient at a time", "one after another"])
def test_the_gradients_of_a_patient_s_rows_are_clipped_together(
    clients: Clients, computed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, clip = stirred(clients.backbone), 0.05
    private = by_patient(clients, patients, noise(0.0, clip))
    step = next(private.steps(4, 1))
    assert len(set(step.units)) == private.rows_per_step == 4 < len(step.rows)
    expected = sums_by_patient(clients, start, step, clip)
    if computed == "one after another":
        clients.backbone.set_lora(start)
        weights = clients.backbone.trainable()
        private._private_backward(4, Round(1, 0, 4, (4,), 5), step, 0, weights)
        sum_T = torch.cat([weights[n].grad.reshape(-1) for n in start]).double() * private.rows_per_step
        for weight in weights.values():
            weight.grad = None
    else:
        if computed == "one patient at a time":
            monkeypatch.setattr("fedmllm.federation.engines.stacked.engine.ROW_GRADIENT_BYTES", 1)
        engine = StackedEngine(engines.Stacked(token_budget=1 if computed == "one row a pass" else 1024), private)
        stack = Stack(engine._targets, clients.backbone.trainable(), [start])
        engine._gradients(stack, [step], torch.zeros(1, dtype=torch.float64))
        sum_T = stack.grads_KT[0].double()
    assert float((sum_T - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("clipped", ["patient", "row"])
def test_one_patient_changes_the_sum_by_the_clip_at_most(clients: Clients, clipped: str) -> None:
    """With all of the patient's rows; rows that are clipped one by one change it by more."""
    start, clip = stirred(clients.backbone), 0.05
    private = by_patient(clients, lambda i: "a" if i % 3 else "b", noise(0.0, clip))
    whole = next(private.steps(4, 1))
    most = max(set(whole.units), key=whole.units.count)
    assert whole.units.count(most) == 8
    units = whole.units if clipped == "patient" else ()
    kept = [i for i, unit in enumerate(whole.units) if unit != most]
    without = Step(*([of[i] for i in kept] for of in (whole.rows, whole.dropout_seeds)), whole.lr)
    sums = []
    engine = StackedEngine(engines.Stacked(), private)
    for step in (replace(whole, units=units), replace(without, units=tuple(units[i] for i in kept) if units else ())):
        stack = Stack(engine._targets, clients.backbone.trainable(), [start])
        engine._gradients(stack, [step], torch.zeros(1, dtype=torch.float64))
        sums.append(stack.grads_KT[0].double())
    moved = float((sums[0] - sums[1]).norm())
    assert (moved <= clip * (1 + 1e-5)) == (clipped == "patient")
    assert moved > 0


@pytest.mark.parametrize("engine", [one_after_another, together])
def test_with_one_row_a_patient_it_is_row_clipping_bit_for_bit(clients: Clients, engine) -> None:
    start, made = stirred(clients.backbone), noise(1.0, 0.05, simulation_key(0), simulate=True)
    alone = by_patient(clients, lambda i: f"p{i}", made)
    for a, b in zip(engine(replace(clients, row_noise=made), start), engine(alone, start), strict=True):
        assert a.metrics.keys() == b.metrics.keys()
        assert all(torch.equal(a.delta[name], b.delta[name]) for name in start)


def test_engines_agree_on_patients_and_take_whole_ones(clients: Clients) -> None:
    start = stirred(clients.backbone)
    private = by_patient(clients, patients, noise(1.0, 0.05, simulation_key(0), simulate=True))
    private = replace(private, aggregator=FfaLora())
    sent = {k: FfaLora().sends(start, {}, Round(1, 0, 4, tuple(COHORT), len(SIZES)), k) for k in sents(start, COHORT)}
    for a, b in zip(one_after_another(private, sent), together(private, sent), strict=True):
        assert float((flat(a.delta) - flat(b.delta)).abs().quantile(0.999)) < 1e-5
        assert a.metrics["num_steps"] == b.metrics["num_steps"] == private.planned_steps(a.client)
    taken = [row for step in private.steps(4, 1) for row in step.rows]
    assert len(taken) == SIZES[4]  # each row once an epoch
    assert private.planned_steps(4) == 2  # 12 rows of 8 patients, four patients a step


def test_a_row_without_a_patient_is_refused(clients: Clients) -> None:
    private = by_patient(clients, lambda i: "" if i == 14 else patients(i), noise(1.0))
    assert private.planned_steps(1) > 0
    with pytest.raises(DataError, match=r"made up:14, id 14: no value in column 'patient' \(data\.group\)"):
        private.planned_steps(4)


def test_a_row_whose_gradient_is_not_finite_counts_as_zeros() -> None:
    grads = torch.tensor([[3.0, 4.0], [0.0, 0.0], [float("nan"), 1.0], [1e30, 1e30], [0.3, 0.4]])
    assert clip_factors(grads, 1.0).tolist() == pytest.approx([0.2, 1.0, 0.0, 0.0, 1.0])


# ---- R2, R4: steps and noise


@pytest.mark.parametrize("engine", [one_after_another, together])
def test_without_noise_and_clip_it_is_the_ordinary_step(clients: Clients, engine) -> None:
    start = stirred(clients.backbone)
    whole = replace(clients, train=clients.train.model_copy(update={"max_steps": 1}))
    members = [1, 4]  # their first step is of whole size
    expected = engine(whole, start, members)
    private = engine(replace(whole, row_noise=noise(0.0, 1e9)), start, members)
    for a, b in zip(expected, private, strict=True):
        # AdamW turns a gradient of about 1e-8, of which rounding is a large part, into a step of its own.
        off = (flat(a.delta) - flat(b.delta)).abs()
        assert float(off.quantile(0.99)) < 1e-6
        assert a.metrics.keys() - b.metrics.keys() == {"loss"}


def test_engines_agree_with_simulated_noise(clients: Clients) -> None:
    start = stirred(clients.backbone)
    private = replace(clients, row_noise=noise(1.0, 0.5, simulation_key(0), simulate=True), aggregator=FfaLora())
    sent = {k: FfaLora().sends(start, {}, Round(1, 0, 4, tuple(COHORT), len(SIZES)), k) for k in sents(start, COHORT)}
    for a, b in zip(one_after_another(private, sent), together(private, sent), strict=True):
        assert list(a.delta) == list(b.delta)
        assert all("lora_B" in name for name in a.delta)
        assert float((flat(a.delta) - flat(b.delta)).abs().quantile(0.999)) < 1e-5


@pytest.mark.parametrize("simulate", [False, True])
def test_noise_has_the_standard_deviation_that_is_claimed(simulate: bool) -> None:
    made = noise(2.0, 0.5, simulate=simulate)
    sum_T = torch.arange(50, dtype=torch.float32)
    off = torch.stack([made.noisy(sum_T, 1, t, 0).double() - sum_T for t in range(1000)]).numpy()
    assert off.std() == pytest.approx(1.0, rel=0.03)
    assert np.abs(off.mean(axis=0)).max() < 5 / 1000**0.5
    for place in ((1, 0, 1), (2, 0, 0)):
        assert not torch.equal(made.noisy(sum_T, 1, 0, 0), made.noisy(sum_T, *place))


def test_secret_noise_of_another_sum_is_independent() -> None:
    zero, one = torch.zeros(1000), torch.ones(1000)
    made, simulated = noise(1.0), noise(1.0, simulate=True)
    assert torch.equal(made.noisy(zero, 0, 1, 0), made.noisy(zero, 0, 1, 0))
    assert float((made.noisy(one, 0, 1, 0) - made.noisy(zero, 0, 1, 0)).std()) > 1
    assert float((simulated.noisy(one, 0, 1, 0) - simulated.noisy(zero, 0, 1, 0)).std()) < 1e-5


def test_noise_of_another_size_on_one_sum_is_independent() -> None:
    # Equal normals at two sizes are two equations, whose solution is the sum.
    sum_T = torch.linspace(-1, 1, 1000)
    drawn = [
        (noise(z, clip).noisy(sum_T, 0, 1, 0) - sum_T).double().numpy() for z, clip in ((50, 1), (100, 1), (50, 0.5))
    ]
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.2


# ---- runs


def test_a_run_states_its_guarantee_and_records_no_loss(tmp_path: Path) -> None:
    (row, *_) = run(runs.experiment(**DP), tmp_path)
    record = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    rounds = [e for e in record if e["event"] == "round"]
    visits = max(sum(k in e["cohort"] for e in rounds) for k in range(3))
    said = next(e for e in record if e["event"] == "guarantee")["guarantee"]
    assert (said["unit"], said["num_releases"]) == ("row", visits)
    assert row["epsilon"] == said["epsilon"] == pytest.approx(gaussian_epsilon(1.0, visits, 1e-3))
    assert not any("loss" in c for e in rounds for c in e["clients"])
    assert (tmp_path / "noise.key").stat().st_size == 32


def test_a_round_that_is_computed_again_counts_twice_if_its_noise_is_another(tmp_path: Path) -> None:
    two = {"num_rounds": 2, "cohort_size": 3}
    with pytest.raises(KeyboardInterrupt):
        run(runs.experiment(**{**DP, **two}), tmp_path, [runs.Stop("round", 2)])
    lines = (tmp_path / "releases.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]  # before anything of round 2 left
    (row, *_) = run(runs.experiment(**{**DP, **two}), tmp_path, resume=True)
    assert row["epsilon"] == pytest.approx(gaussian_epsilon(1.0, 2, 1e-3))
    assert (tmp_path / "releases.jsonl").read_text().splitlines() == lines
    # as on another machine, whose sums differ in a bit
    (tmp_path / "releases.jsonl").write_text("".join(f"{line}\n" for line in (*lines, '{"round": 2, "tag": "0"}')))
    e = runs.experiment(**{**DP, **two})
    inputs = (e, e.privacy, tmp_path, [Shard(0, (0, 1), ())], [], lambda _: [0], True)
    again = RowPrivacy(*inputs).guarantee(2)
    assert (again.num_releases, again.epsilon) == (3, pytest.approx(gaussian_epsilon(1.0, 3, 1e-3)))
    (tmp_path / "releases.jsonl").unlink()
    with pytest.raises(
        FedmllmError, match=r"releases\.jsonl: missing: without it the releases so far cannot be counted"
    ):
        RowPrivacy(*inputs)


def test_the_tag_of_a_round_is_that_of_its_sums() -> None:
    def tag(*sums: float) -> str:
        made = noise(1.0)
        for step, value in enumerate(sums):
            made.noisy(torch.full((4,), value), 0, 1, step)
        return made.tag(1)

    assert tag(1.0, 2.0) == tag(1.0, 2.0)
    assert len({tag(1.0, 2.0), tag(2.0, 1.0), tag(1.0), tag(1.0, np.nextafter(np.float32(2), np.float32(3)))}) == 4


HOSPITALS = {"p1": "north", "p2": "north", "p3": "south", "p4": "south", "p5": "west"}


def hospitals(folder: Path, moved: str = "south", **more: Any) -> Experiment:
    """Rows of five patients at three hospitals, several of each; one row of p1 is at `moved`."""
    lines = ["patient,site,note,question,answer"]
    for i in range(30):
        patient = f"p{i % 5 + 1}"
        site = moved if i == 0 else HOSPITALS[patient]
        lines.append(f"{patient},{site},note {i},Is it so?,{('yes', 'no')[i % 2]}")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    columns = {"question": "question", "answer": "answer", "text": "note", "client": "site"}
    data = {"name": "table", "root": str(folder), "train": "rows.csv", "test": "rows.csv", "columns": columns}
    data |= {"choices": ["no", "yes"], "group": "patient"} | more
    privacy = {**DP["privacy"], "unit": "group"}
    table = {**runs.TABLE, **DP, "data": data, "partition": "by-column", "privacy": privacy, "cohort_size": 0}
    return Experiment.parse(table)


@pytest.mark.parametrize(("moved", "times"), [("north", 1), ("south", 2)])
def test_a_guarantee_for_patients_counts_the_rounds_of_all_clients_that_hold_one(
    tmp_path: Path, moved: str, times: int
) -> None:
    (row, *_) = run(hospitals(tmp_path, moved), tmp_path / "run")
    record = [json.loads(line) for line in (tmp_path / "run" / "record.jsonl").read_text().splitlines()]
    said = next(e for e in record if e["event"] == "guarantee")["guarantee"]
    assert (said["unit"], said["relation"]) == ("group 'patient'", "a group's gradients replaced by zeros")
    assert said["num_releases"] == 2 * times  # two rounds, at one client or at two
    assert said["epsilon"] == pytest.approx(gaussian_epsilon(1.0, 2 * times, 1e-3))
    assert row["privacy"].endswith("at delta 0.001 per group 'patient'")
    assert row["method"].endswith("row-dp z=1 per group")


def test_the_unit_row_leaves_run_ids_as_they_are() -> None:
    named = runs.experiment(**{**DP, "privacy": {**DP["privacy"], "unit": "row"}})
    assert named.run_id() == runs.experiment(**DP).run_id()


REFUSED = {
    "groups": (
        {"privacy": {**DP["privacy"], "unit": "group"}},
        r"names no column of groups \(data\.group\); allowed: row",
    ),
    "baseline": ({"method": "centralised"}, 'got "row-dp" with method "centralised"'),
    "gradients": ({"aggregator": "scaffold"}, "scaffold, whose clients return more than their delta"),
    "clip_norm": ({"train": {}}, "train.clip_norm: got 1; .*allowed: 0"),
    "objective": ({"objective": "fedprox-adaptive"}, "objective fedprox-adaptive, .*allowed: task, fedprox"),
    "ranks": (
        {"backbone": {"name": "tiny", "lora": {"r": 4, "alpha": 4, "ranks": [2, 4]}}, "aggregator": "hetlora"},
        "lora.ranks",
    ),
    "actors": ({"engine": "flower-simulation"}, "whose actors have no key; allowed: true"),
    "sites": (
        {"engine": "flower-sites", "privacy": {**DP["privacy"], "simulate_noise": True}},
        'simulate_noise: got true with engine "flower-sites"',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_would_make_the_guarantee_false_are_refused(case: str) -> None:
    changed, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        runs.experiment(**{**DP, **changed})


def test_a_delta_that_is_too_large_for_the_rows_is_refused(tmp_path: Path) -> None:
    table = {**DP, "privacy": {**DP["privacy"], "delta": 0.2}}
    with pytest.raises(ConfigError, match=r"privacy\.delta: got 0\.2; a client has 12 rows"):
        run(runs.experiment(**table), tmp_path)
