"""SCAFFOLD: the paper's formulas by hand, and the store of client state."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedmllm.algorithms.objectives import ClientView
from fedmllm.algorithms.scaffold import Scaffold
from fedmllm.config.experiment import Experiment, check_engine_carries
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.types import ClientUpdate, Outcome, Params, Round
from fedmllm.federation.client_state import ClientStateStore
from fedmllm.runs.checkpoint import newest
from fedmllm.runs.events import Event
from fedmllm.runs.record import read
from fedmllm.runs.run import run

TABLE: dict[str, Any] = {
    "data": {"name": "synthetic-irony", "num_train": 36, "num_validation": 4, "num_test": 4},
    "partition": {"name": "iid", "num_clients": 4},
    "backbone": "tiny",
    "train": {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 2},
    "num_rounds": 4,
    "checkpoint": {"keep": 9},
    "engine": "in-process",
}


def tree(*values: float) -> Params:
    return {"a": torch.tensor(values)}


AT = Round(number=3, seed=0, num_rounds=9, cohort=(0, 2), num_clients=4)
VIEW = ClientView(0.0, 1, lambda name: 0)


def test_the_server_half_by_hand() -> None:
    updates = [
        ClientUpdate(0, tree(1.0), 10, {}, extra=tree(0.3)),
        ClientUpdate(2, tree(3.0), 90, {}, extra=tree(-0.1)),
    ]
    params, state = Scaffold(lr=0.5).apply(tree(1.0), {"c": tree(1.0)}, AT, updates)
    assert params["a"].tolist() == [2.0]  # 1 + 0.5 * (1 + 3) / 2: the paper's mean is unweighted
    assert state["c"]["a"].tolist() == pytest.approx([1.2])  # 1 + 0.3 - 0.1, each already divided by N


def test_the_client_half_by_hand() -> None:
    aggregator = Scaffold()
    sent = aggregator.sends(tree(0.0), {"c": tree(1.0)}, AT, 2)
    assert aggregator.begin(AT, VIEW, sent, {}).shift["a"].tolist() == [1.0]  # c - c_k, c_k = 0 at first
    assert aggregator.begin(AT, VIEW, sent, tree(4.0)).shift["a"].tolist() == [-3.0]
    outcome = Outcome(sent, tree(9.0), mean_gradient=tree(6.0), num_steps=2, num_examples=5)
    extra, kept = aggregator.finish(AT, VIEW, outcome, tree(4.0))
    assert extra["a"].tolist() == [0.5]  # (6 - 4) / N
    assert kept["a"].tolist() == [6.0]
    assert aggregator.finish(AT, VIEW, Outcome(sent, tree(0.0), {}, 0, 0), tree(4.0)) == ({}, {})


def test_the_mean_gradient_is_the_paper_s_option_two_for_sgd() -> None:
    """Plain SGD on a quadratic: c_k - c + (x - y) / (K lr) = mean of the uncorrected gradients."""
    lr, steps, x, target, c, c_k = 0.1, 5, 3.0, -1.0, 0.4, -0.7
    y, gradients = x, []
    for _ in range(steps):
        gradients.append(2 * (y - target))
        y -= lr * (gradients[-1] - c_k + c)
    assert c_k - c + (x - y) / (steps * lr) == pytest.approx(sum(gradients) / steps)


def test_a_client_reads_its_last_state_and_none_of_a_later_round(tmp_path: Path) -> None:
    store = ClientStateStore(tmp_path)
    assert store.read(3, 1) == {}
    store.write(3, 2, tree(4.0, 8.0))
    assert store.read(3, 2) == {}  # the round itself, trained again, starts from the same
    assert store.read(3, 3)["a"].tolist() == [4.0, 8.0]
    store.write(3, 5, tree(0.0, 0.0))
    assert store.read(3, 9)["a"].tolist() == [0.0, 0.0]
    resumed = ClientStateStore(tmp_path, finished=4)  # the file of round 5 is removed
    assert resumed.read(3, 9)["a"].tolist() == [4.0, 8.0]


def test_files_that_no_resume_needs_are_removed(tmp_path: Path) -> None:
    store = ClientStateStore(tmp_path)
    for round_ in (1, 3, 5, 8):
        store.write(0, round_, tree(float(round_)))

    def left() -> list[int]:
        return sorted(int(path.stem[-4:]) for path in (tmp_path / "client-0").iterdir())

    store.prune([])  # there is no checkpoint yet
    assert left() == [1, 3, 5, 8]
    store.prune([2, 6])  # the best so far, and the last: a resume from round 2 needs 1, one from round 6 needs 5
    assert left() == [1, 5, 8]
    store.prune([6, 7])
    assert left() == [5, 8]


def test_the_state_of_a_refused_update_is_discarded(tmp_path: Path) -> None:
    store = ClientStateStore(tmp_path)
    for round_ in (1, 2):
        store.write(0, round_, tree(float(round_)))
    store.discard(2, [0, 3])
    assert store.read(0, 3)["a"].tolist() == [1.0]


def test_a_client_whose_updates_are_refused_keeps_no_state(tmp_path: Path) -> None:
    """Else c would no longer be the mean of the c_k, and every later round would be pulled aside."""
    update_filter = {"max_norm": 1e-9, "on_bad_update": "drop_client"}
    run(
        Experiment.parse({**TABLE, "aggregator": "scaffold", "num_rounds": 2, "update_filter": update_filter}), tmp_path
    )
    assert all(len(e["dropped"]) == 2 for e in read(tmp_path / "record.jsonl") if e["event"] == "round")
    assert list((tmp_path / "client_state").rglob("*.safetensors")) == []


def test_a_state_that_is_not_finite_is_not_stored(tmp_path: Path) -> None:
    store = ClientStateStore(tmp_path)
    store.write(0, 1, tree(float("nan")))
    store.write(0, 2, {})
    assert store.read(0, 3) == {}


def test_a_damaged_client_state_is_refused(tmp_path: Path) -> None:
    store = ClientStateStore(tmp_path)
    store.write(0, 1, tree(1.0))
    path = tmp_path / "client-0" / "round-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x40")  # 1.0 becomes 2.0
    with pytest.raises(FedmllmError, match=r"round-0001\.safetensors: damaged"):
        store.read(0, 2)
    path.write_bytes(b"half")
    with pytest.raises(FedmllmError, match=r"round-0001\.safetensors: not a whole safetensors file"):
        store.read(0, 2)


def test_a_missing_folder_of_a_started_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedmllmError, match="the clients' state of rounds 1 to 3 is missing"):
        ClientStateStore(tmp_path / "client_state", finished=3)
    ClientStateStore(tmp_path / "client_state")
    ClientStateStore(tmp_path / "client_state", finished=3)  # the folder is there: no client kept anything


def adapters(folder: Path) -> list[bytes]:
    places = sorted((folder / "checkpoints").iterdir())
    return [path.read_bytes() for place in places for path in sorted(place.glob("*.safetensors"))]


class Stop:
    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, event: Event) -> None:
        self.left -= event.kind == "round"
        if self.left == 0:
            self.left = -1
            raise KeyboardInterrupt


def test_the_first_round_is_plain_and_the_next_is_not(tmp_path: Path) -> None:
    """c = c_k = 0 in round 1; cohorts of four clients of equal size: weighted and plain mean are the same."""
    table = {**TABLE, "cohort_size": 4, "data": {**TABLE["data"], "num_train": 32}, "num_rounds": 2}
    run(Experiment.parse({**table, "aggregator": "fedavg"}), tmp_path / "fedavg")
    run(Experiment.parse({**table, "aggregator": "scaffold"}), tmp_path / "scaffold")
    one, two = (
        [e["clients"] for e in read(tmp_path / n / "record.jsonl") if e["event"] == "round"]
        for n in ("fedavg", "scaffold")
    )
    assert [c["norm"] for c in one[0]] == [c["norm"] for c in two[0]]
    assert [c["norm"] for c in one[1]] != [c["norm"] for c in two[1]]
    sent = next(e for e in read(tmp_path / "scaffold" / "record.jsonl") if e["event"] == "round")
    plain = next(e for e in read(tmp_path / "fedavg" / "record.jsonl") if e["event"] == "round")
    assert (sent["up_bytes"], sent["down_bytes"]) == (2 * plain["up_bytes"], 2 * plain["down_bytes"])


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_resumed_run_ends_with_the_same_bytes(number: int, tmp_path: Path) -> None:
    settings = Experiment.parse({**TABLE, "aggregator": "scaffold"})
    run(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "run", [Stop(number)])
    run(settings, tmp_path / "run", resume=True)
    assert adapters(tmp_path / "run") == adapters(tmp_path / "whole")
    assert newest(tmp_path / "run" / "checkpoints") is not None
    for path in (tmp_path / "whole" / "client_state").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "run" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_an_engine_that_cannot_carry_it_is_refused() -> None:
    bare = SimpleNamespace(name="bare", supports=frozenset())
    with pytest.raises(
        ConfigError,
        match=r"engine\.name: got 'bare'; scaffold needs client-state and extra, .*"
        "allowed: flower-simulation, flower-sites, in-process, stacked",
    ):
        check_engine_carries(Experiment.parse({**TABLE, "aggregator": "scaffold"}).aggregator, bare)
