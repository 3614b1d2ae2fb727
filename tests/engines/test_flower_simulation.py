"""Flower's Ray simulation: the bytes of in-process, and what happens where a client fails. Loopback only, always stopped."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="the extra `flower` is not installed")
pytest.importorskip("ray", reason="the extra `flower` is not installed")

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from flower_federation import addresses

from fedmllm.config.experiment import Experiment
from fedmllm.core import tensors
from fedmllm.core.errors import FedmllmError
from fedmllm.core.types import Round, Sent
from fedmllm.flower import simulation as flower_simulation
from fedmllm.runs.inputs import Inputs
from fedmllm.runs.record import read
from fedmllm.runs.run import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("flower-simulation")]

TABLE = {
    "data": {"name": "synthetic-irony"},
    "partition": {"name": "dirichlet", "alpha": 0.5, "num_clients": 4},
    "scenario": {"name": "missing", "rate": 0.3},
    "train": {"lr": 3e-3, "batch_size": 4, "accumulation": 1, "max_steps": 2},
    "evaluate": {"limit": 4},
    "num_rounds": 3,
    "cohort_size": 3,
}
SIMULATION = {"name": "flower-simulation", "num_actors": 2, "threads": 1, "timeout_s": 400}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    flower_simulation._stop()
    torch.set_num_threads(before)


def adapter(table: dict, out: Path) -> str:
    run(Experiment.parse(table), out)
    files = sorted(out.glob("adapter*/**/*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def ask(engine: flower_simulation.SimulationEngine, params: dict, cohort: list[int]) -> list:
    return list(engine(Round(1, 0, 3, tuple(cohort), 4), {client: Sent(params) for client in cohort}))


METHODS = [
    "fedavg",
    "fedadam",
    "scaffold",
    "fednova",
    "ffa-lora",
    "fedsa-lora",
    "fedex-lora",
    "fed-plora",
    "flora",
    "hetlora",
    "fedalt",
    "rolora",
    "fedrot-lora",
    "lora-fair",
    "flexlora",
    "raflora",
    "florist",
    "fedsvd",
    "fedilora",
    "yoco",
]
RANKED = ("fed-plora", "flora", "hetlora", "flexlora", "raflora", "florist", "fedilora")


@pytest.mark.parametrize("aggregator", METHODS)
def test_three_rounds_give_the_bytes_of_in_process(tmp_path, aggregator):
    lora = {"ranks": [2, 8, 4]} if aggregator in RANKED else {"init": "principal"} if aggregator == "yoco" else {}
    prunes = {"tail_penalty": 10.0, "tail_from": 0.7} if aggregator == "hetlora" else {}
    table = {**TABLE, "aggregator": {"name": aggregator, **prunes}, "backbone": {"name": "tiny", "lora": lora}}
    table["num_rounds"] = num_rounds = 1 if aggregator == "yoco" else 3
    if aggregator == "fedavg":  # actors complete rows by themselves
        table |= {"completion": {"name": "retrieve", "test": True}, "public": {"rows": 6}}
    simulated = adapter({**table, "engine": SIMULATION}, tmp_path / "simulation")
    assert simulated == adapter({**table, "engine": "in-process"}, tmp_path / "in-process")
    rounds = [event for event in read(tmp_path / "simulation" / "record.jsonl") if event["event"] == "round"]
    assert [len(event["clients"]) for event in rounds] == [3] * num_rounds
    if prunes:
        assert len({(c["client"], c["rank"]) for event in rounds for c in event["clients"]}) > 4


def test_models_that_are_fine_tuned_are_those_of_in_process(tmp_path):
    table = {**TABLE, "method": "personal", "personal": {"mu": 0.1}, "num_rounds": 2}
    simulated = adapter({**table, "engine": SIMULATION}, tmp_path / "simulation")
    assert simulated == adapter({**table, "engine": "in-process"}, tmp_path / "in-process")


def test_a_graph_that_the_server_learns_is_that_of_in_process(tmp_path):
    table = {**TABLE, "relation": "graph-attention", "public": {"rows": 6}, "num_rounds": 2}
    simulated = adapter({**table, "engine": SIMULATION}, tmp_path / "simulation")
    assert simulated == adapter({**table, "engine": "in-process"}, tmp_path / "in-process")


def test_ranks_by_a_column_are_those_of_in_process(tmp_path):
    limits = {"east": 2, "north": 4, "west": 64}
    lines = [
        f"{s}-{i},{('well', 'fever')[i % 2]},{('no', 'yes')[i % 2]},{s},{limits[s]}" for s in limits for i in range(4)
    ]
    (tmp_path / "rows.csv").write_text("\n".join(["case,note,ill,site,limit", *lines]) + "\n")
    columns = {"id": "case", "text": "note", "answer": "ill", "client": "site", "keep": ["limit"]}
    data = {"name": "table", "root": str(tmp_path), "train": "rows.csv", "test": "rows.csv", "columns": columns}
    table = {
        "data": data | {"question": "Is it ill?", "choices": ["no", "yes"]},
        "backbone": {"name": "tiny", "lora": {"rank_column": "limit"}},
        "train": TABLE["train"], "num_rounds": 2, "aggregator": "flexlora",
    }  # fmt: skip
    simulated = adapter({**table, "engine": SIMULATION}, tmp_path / "simulation")
    assert simulated == adapter({**table, "engine": "in-process"}, tmp_path / "in-process")
    rounds = [event for event in read(tmp_path / "simulation" / "record.jsonl") if event["event"] == "round"]
    assert [[c["rank"] for c in event["clients"]] for event in rounds] == [[2, 4, 8]] * 2


PLUGIN = """
from typing import Literal
from fedmllm.algorithms.objectives import Objective
from fedmllm.algorithms.server_optimizers import FedAvg
class HalfInAnActor(FedAvg):
    name: Literal["half-in-an-actor"] = "half-in-an-actor"
    lr: float = 0.5
class PullInAnActor(Objective):
    name: Literal["pull-in-an-actor"] = "pull-in-an-actor"
    def prox_mu(self, name, view):
        return 0.3
"""


def test_plug_ins_run_in_actors_with_the_bytes_of_in_process(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    own = {"imports": [str(tmp_path / "mine.py")], "aggregator": "half-in-an-actor", "objective": "pull-in-an-actor"}
    table = {**TABLE, **own, "num_rounds": 2}
    simulated = adapter({**table, "engine": SIMULATION}, tmp_path / "simulation")
    assert simulated == adapter({**table, "engine": "in-process"}, tmp_path / "in-process")
    rounds = [event for event in read(tmp_path / "simulation" / "record.jsonl") if event["event"] == "round"]
    assert [len(event["clients"]) for event in rounds] == [3, 3]  # no actor failed to load the file
    plain = adapter({**TABLE, "num_rounds": 2, "engine": "in-process"}, tmp_path / "plain")
    assert simulated != plain


def test_an_actor_loads_the_base_once_for_all_its_messages(tmp_path):
    adapter({**TABLE, "engine": SIMULATION, "seed": 1}, tmp_path / "seed-1")
    rounds = [event for event in read(tmp_path / "seed-1" / "record.jsonl") if event["event"] == "round"]
    loads = {client["base_loads"] for event in rounds for client in event["clients"]}
    assert loads <= set(range(1, len(METHODS) + 6))  # of its process: at most one for each experiment of this module
    assert max(client["base_loads"] for client in rounds[0]["clients"]) == max(loads)  # none in later rounds


def test_a_client_that_fails_is_named_and_the_simulation_goes_on(tmp_path):
    settings = {**TABLE, "engine": SIMULATION, "num_rounds": 1}
    inputs = Inputs.load(Experiment.parse(settings))
    engine = flower_simulation.SimulationEngine(inputs.experiment.engine, inputs.clients(1))
    strange = {"no-such-tensor": torch.zeros(3)}
    answers = ask(engine, strange, [0, 2])
    assert [answer.client for answer in answers] == [0, 2]
    assert all("names of the adapter differ" in answer.reason for answer in answers)
    assert all(hasattr(answer, "delta") for answer in ask(engine, inputs.start, [0, 2]))


def test_an_actor_that_is_killed_costs_time_and_no_update(tmp_path):
    inputs = Inputs.load(Experiment.parse({**TABLE, "engine": SIMULATION}))
    engine = flower_simulation.SimulationEngine(inputs.experiment.engine, inputs.clients(3))
    before = [tensors.params_digest(answer.delta) for answer in ask(engine, inputs.start, [0, 1, 2])]
    (killed, *_) = actors()
    os.kill(killed, signal.SIGKILL)
    after = [tensors.params_digest(answer.delta) for answer in ask(engine, inputs.start, [0, 1, 2])]
    assert after == before
    assert killed not in actors()


def test_ray_neither_listens_on_nor_reaches_another_address_than_loopback(tmp_path):
    inputs = Inputs.load(Experiment.parse({**TABLE, "engine": SIMULATION}))
    engine = flower_simulation.SimulationEngine(inputs.experiment.engine, inputs.clients(3))
    assert all(hasattr(answer, "delta") for answer in ask(engine, inputs.start, [0]))
    everything = {pid for pid, _ in processes()}
    assert len(everything) > 4  # raylet, its stores and agents, actors
    assert addresses(everything) == {"127.0.0.1"}


def actors() -> list[int]:
    """Process ids of our simulation's actors."""
    return [pid for pid, line in processes() if b"ray::ClientAppActor" in line]


def processes() -> list[tuple[int, bytes]]:
    """(id, command line) of the processes below this one."""
    found, below = [], {os.getpid()}
    table = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            table.append((int(entry.name), parent, (entry / "cmdline").read_bytes()))
        except OSError:
            continue
    for pid, parent, line in sorted(table):
        if parent in below:
            below.add(pid)
            found.append((pid, line))
    return found


def test_settings_of_another_engine_are_refused():
    other = Experiment.parse({**TABLE, "engine": "in-process"})
    with pytest.raises(FedmllmError, match="flower-simulation needs its own settings"):
        flower_simulation.SimulationEngine(other.engine, None)  # type: ignore[arg-type]


LONG = """num_rounds = 60
cohort_size = 4
data = { name = "synthetic-irony", num_train = 40, num_test = 8, num_validation = 8 }
partition = { name = "iid", num_clients = 4 }
train = { lr = 3e-3, batch_size = 4, accumulation = 1 }
engine = { name = "flower-simulation", num_actors = 1 }
"""


def test_sigterm_ends_a_simulation_with_the_status_of_every_other_run(tmp_path):
    (tmp_path / "long.toml").write_text(LONG)
    command = [sys.executable, "-m", "fedmllm.cli", "run", str(tmp_path / "long.toml"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    record, until = tmp_path / "out" / "record.jsonl", time.monotonic() + 400
    while not (record.exists() and record.read_text().count('"event": "round"') > 1) and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said.decode()
    assert b"--resume" in said
    assert list(read(record))[-1]["event"] == "stopped"
