"""Algorithms over real sites: the bytes of one process, and state that stays at the sites. Trainers and messages are real;
only Flower's transport is replaced by a call.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flower_federation import NAMES, Federation

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.core.tensors import flatten, manifest_digest, params_digest
from fedmllm.core.types import Round
from fedmllm.flower.request import Request
from fedmllm.flower.site.state import SiteState
from fedmllm.runs.events import RoundEnd
from fedmllm.runs.record import read
from support.sites_in_process import InThisProcess, adapter, in_process, over_the_wire


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Federation:
    return Federation(tmp_path_factory.mktemp("rows"), 'name = "tiny"', rounds=3)


SHARING = ["ffa-lora", "rolora"]


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "scaffold", "feddyn", "fednova", *SHARING])
def test_over_sites_an_algorithm_gives_the_bytes_of_one_process(rows, tmp_path, monkeypatch, name):
    changes = [f'aggregator="{name}"']
    over_the_wire(rows, tmp_path, changes, monkeypatch)
    assert adapter(tmp_path / "out") == in_process(rows, tmp_path, changes)


class Stop:
    """Stops a run after a round, once its checkpoint is on the disk."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, event) -> None:
        if isinstance(event, RoundEnd) and event.round == self.number:
            raise KeyboardInterrupt


def test_scaffold_keeps_its_state_at_the_site_and_resumes_with_the_same_bytes(rows, tmp_path, monkeypatch):
    changes = ['aggregator="scaffold"']
    with pytest.raises(KeyboardInterrupt):
        over_the_wire(rows, tmp_path, changes, monkeypatch, sinks=[Stop(2)])
    wire = over_the_wire(rows, tmp_path, changes, monkeypatch, resume=True)
    assert adapter(tmp_path / "out") == in_process(rows, tmp_path, changes)
    own = {path.relative_to(tmp_path) for path in tmp_path.rglob("client-*/round-0003.safetensors")}
    at_sites = [path for path in own if "site-state" in path.parts]
    assert len(at_sites) == len(NAMES)
    at_server = [tmp_path / path for path in own if path.parts[0] == "out"]
    assert all(path.stat().st_size < 1000 for path in at_server)  # a digest, not the state
    assert max(map(int, wire.sites[10].requests[-1]["kept"])) == 2


def test_a_site_refuses_what_returns_more_than_the_delta_unless_it_is_open(rows, tmp_path, monkeypatch):
    changes = ['aggregator="scaffold"', "engine.attempts=1", "num_rounds=1"]
    with pytest.raises(FedmllmError, match=r"scaffold returns more than the delta; this site has allow\.extra_tensors"):
        over_the_wire(rows, tmp_path, changes, monkeypatch, allow="")
    last = list(read(tmp_path / "out" / "record.jsonl"))[-1]
    assert last["event"] == "stopped"


# ---- state at a site

RUN = "0123456789ab"


def test_state_of_rounds_that_did_not_count_is_removed(tmp_path: Path):
    state = SiteState(tmp_path, RUN, 3)
    assert state.read({}) == {}
    shas = {n: state.write(n, {"c": torch.full((2,), float(n))}) for n in (1, 2)}
    assert state.read({1: shas[1], 2: shas[2]})["c"].tolist() == [2, 2]
    assert state.read({1: shas[1]})["c"].tolist() == [1, 1]
    assert not list(tmp_path.rglob("round-0002*"))
    assert state.write(3, {}) == ""
    assert state.write(3, {"c": torch.tensor([float("nan")])}) == ""
    assert state.read({}) == {}
    assert not list(tmp_path.rglob("round-*"))


def test_state_that_another_run_replaced_or_that_is_missing_is_an_error(tmp_path: Path):
    state = SiteState(tmp_path, RUN, 0)
    sha = state.write(4, {"c": torch.ones(2)})
    assert sha == params_digest({"c": torch.ones(2)})
    state.write(4, {"c": torch.zeros(2)})
    for kept in ({4: sha}, {5: sha}):
        with pytest.raises(FedmllmError, match=f"the state of round {max(kept)} is missing or belongs to another run"):
            state.read(kept)


@pytest.mark.parametrize("run_id", ["../../../etc", "0123456789ab/..", "", "0123456789AB"])
def test_a_run_id_cannot_name_another_folder(run_id: str):
    table = json.loads(Request.of(EXPERIMENT, "base", "north", 0, 1).model_dump_json())
    with pytest.raises(FedmllmError, match=r"request\.run_id: got "):
        Request.read(json.dumps({**table, "run_id": run_id}))


EXPERIMENT = Experiment.parse({"data": "synthetic-irony", "cohort_size": 1})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kept": {"1": "no digest"}}, "request.kept"),
        ({"header": {"shapes": {"no-such-tensor": [1]}}}, "names of the adapter differ"),
    ],
)
def test_a_header_or_state_that_does_not_fit_is_refused(rows, tmp_path, change, says):
    head = 'name = "north"\nserver = "localhost:1"\nca = "ca.crt"\nkey = "site.key"\n[data]\nname = "synthetic-irony"\n'
    (tmp_path / "site.toml").write_text(head)
    site = InThisProcess(tmp_path)
    asked = Request.of(EXPERIMENT, "", "north", 0, Round(1, 0, 25, (0,), 1))
    base = site.trainer.backbone(asked).digest
    table = {**json.loads(asked.model_dump_json()), "base": base, **change}
    shapes = change.get("header", {}).get("shapes", {})
    like = {name: torch.zeros(shape) for name, shape in shapes.items()} or site.trainer._initial
    said, _ = site.ask(
        {"request": json.dumps(table), "manifest": manifest_digest(like)}, flatten(like).numpy().tobytes()
    )
    assert says in said["refused"]
