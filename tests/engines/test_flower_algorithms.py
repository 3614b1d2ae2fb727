"""Algorithms over real sites: the bytes of one process, and state that stays at the sites. Trainers and messages are real;
only Flower's transport is replaced by a call.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flower_federation import NAMES, Federation
from safetensors.torch import load_file

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.core.tensors import flatten, manifest_digest, params_digest
from fedmllm.core.types import Round, Sent
from fedmllm.federation.exchange import Header
from fedmllm.flower.request import Request
from fedmllm.flower.site.state import LostState, SiteState
from fedmllm.flower.site.trainer import Trainer
from fedmllm.runs.events import RoundEnd
from fedmllm.runs.record import read
from support.sites_in_process import InThisProcess, adapter, in_process, over_the_wire, write_sites


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


# A = V' of unit rows passes the default limits of a site at every learning rate; sqrt(S) V' does not.
SPECTRAL = [
    'aggregator={name="flexlora",split="orthonormal"}',
    'aggregator={name="raflora",split="orthonormal"}',
    'aggregator="florist"',
    'aggregator="fedsvd"',
]


@pytest.mark.parametrize("aggregator", SPECTRAL)
def test_products_by_svd_pass_the_limits_of_a_site_at_a_small_learning_rate(rows, tmp_path, monkeypatch, aggregator):
    changes = [aggregator, "train.lr=1e-4"]
    over_the_wire(rows, tmp_path, changes, monkeypatch, allow="")
    assert adapter(tmp_path / "out") == in_process(rows, tmp_path, changes)
    rounds = [event for event in read(tmp_path / "out" / "record.jsonl") if event["event"] == "round"]
    assert [(len(event["clients"]), event["dropped"]) for event in rounds] == [(len(NAMES), [])] * 3


def test_a_small_rank_passes_the_limits_of_a_site_too(rows, tmp_path, monkeypatch):
    changes = [SPECTRAL[0], "backbone.lora.ranks=[2,4,8]"]
    over_the_wire(rows, tmp_path, changes, monkeypatch, allow="")
    rounds = [event for event in read(tmp_path / "out" / "record.jsonl") if event["event"] == "round"]
    assert [(len(event["clients"]), event["dropped"]) for event in rounds] == [(len(NAMES), [])] * 3


# ---- tensors that a site makes itself


def test_a_site_that_makes_other_tensors_than_the_server_refuses(rows, tmp_path, monkeypatch):
    load = Trainer.backbone

    def loaded(self, request):
        backbone = load(self, request)
        if self.site.name == NAMES[0]:
            self._initial = {name: -t if "lora_A" in name else t for name, t in self._initial.items()}
        return backbone

    monkeypatch.setattr(Trainer, "backbone", loaded)
    over_the_wire(rows, tmp_path, ['aggregator="ffa-lora"', "engine.attempts=1", "num_rounds=1"], monkeypatch)
    (one,) = [event for event in read(tmp_path / "out" / "record.jsonl") if event["event"] == "round"]
    assert [d["client"] for d in one["dropped"]] == [0]
    says = r"refused by site east: header\.known_digest: got [0-9a-f]{12}; 16 tensors .*another base model, seed, or version"
    assert re.search(says, one["dropped"][0]["reason"])


def test_the_digest_of_what_both_sides_make_travels_only_where_something_is_made():
    a, b = "m.lora_A.weight", "m.lora_B.weight"
    initial = {a: torch.ones(4, 3), b: torch.zeros(5, 4)}
    low = {a: initial[a][:2], b: initial[b][:, :2]}
    whole = Header.of(Sent(low))
    assert "known_digest" not in json.loads(whole.model_dump_json())  # a site of an earlier version reads it
    header = Header.of(Sent(low, trains=frozenset({b}), known=frozenset({a})))
    read_back = Header(**json.loads(header.model_dump_json()))
    assert read_back == header
    assert torch.equal(read_back.sent({b: low[b]}, initial).start[a], low[a])
    with pytest.raises(FedmllmError, match=r"1 tensors are not sent but made here from the seed .* another base model"):
        header.sent({b: low[b]}, {**initial, a: initial[a] + 1e-7})
    earlier = header.model_copy(update={"known_digest": ""})
    with pytest.raises(FedmllmError, match=r"known_digest: missing; .* the same version of fedmllm on both sides"):
        earlier.sent({b: low[b]}, initial)
    odd = header.model_copy(update={"own": {}, "shapes": {**header.shapes, a: (2, 3)}})
    with pytest.raises(FedmllmError, match="known_digest: got "):
        odd.sent(low, initial)


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


# ---- ranks that sites limit


def settings(limit: str) -> str:
    return f'[allow.settings]\n"lora.r" = {limit}\n'


@pytest.mark.parametrize(
    ("name", "assigned", "limits", "ranks"),
    [
        ("fedilora", "", ("{ max = 3 }", "[2, 4]", "{ max = inf }"), [3, 4, 8]),
        ("flora", "ranks=[2,8]", ("{ max = 4 }", "{ max = 5 }", ""), [2, 5, 2]),
        ('{name="hetlora",tail_penalty=10.0,tail_from=0.7}', "", ("{ max = 3 }", "", ""), [3, 8, 8]),
    ],
)
def test_a_site_gets_an_adapter_of_its_own_limit_or_its_assigned_rank(
    rows, tmp_path, monkeypatch, name, assigned, limits, ranks
):
    aggregator = f"aggregator={name if name.startswith('{') else repr(name)}"
    given = [f"backbone.lora.{assigned}"] if assigned else []
    own = {site: settings(limit) for site, limit in zip(NAMES, limits, strict=True) if limit}
    wire = over_the_wire(rows, tmp_path, [aggregator, *given], monkeypatch, own=own)
    rounds = [event for event in read(tmp_path / "out" / "record.jsonl") if event["event"] == "round"]
    assert [c["rank"] for c in rounds[0]["clients"]] == ranks
    requests = [wire.sites[node].requests[0] for node in wire.sites]
    assert [one["lora"]["r"] for one in requests] == [
        min(8, site.trainer.site.largest_rank() or 8) for site in wire.sites.values()
    ]
    assert {one["lora"]["alpha"] / one["lora"]["r"] for one in requests} == {1.0}
    assert [one["ranks"] for one in requests] == [[rank] for rank in ranks]  # no site learns another's limit
    if "flora" in name:
        assert max(event["aggregation_error"] for event in rounds) < 1e-5
    else:
        in_process(rows, tmp_path, [aggregator, f"backbone.lora.ranks={ranks}"])
        one, two = (load_file(tmp_path / out / "adapter" / "adapter_model.safetensors") for out in ("out", "one"))
        # A site trains its own rank, one process pads it to 8, and a product of another width rounds otherwise. AdamW amplifies
        # that where a gradient is near 0: in three weights of 32,768 on an AMD EPYC, in none on an Intel Xeon.
        apart = torch.cat([(one[n] - two[n]).flatten() for n in two])
        assert int((apart.abs() > 1e-5).sum()) <= 3
        assert float(apart.norm()) < 1e-5 * float(torch.cat([t.flatten() for t in two.values()]).norm())
        assert max(float(t.abs().max()) for t in two.values()) > 0.05
    if "hetlora" in name:
        assert min(c["rank"] for event in rounds for c in event["clients"]) < 3
        assert rounds[1]["down_bytes"] > rounds[2]["down_bytes"]


def test_without_limits_below_the_rank_nothing_changes_and_without_unequal_ranks_nobody_is_asked(
    rows, tmp_path, monkeypatch
):
    wire = over_the_wire(rows, tmp_path, ['aggregator="fedilora"', "num_rounds=1"], monkeypatch)
    assert len(wire.replies) == 2 * len(NAMES)
    assert [site.requests[0]["ranks"] for site in wire.sites.values()] == [[]] * len(NAMES)
    assert adapter(tmp_path / "out") == in_process(rows, tmp_path, ['aggregator="fedilora"', "num_rounds=1"])
    changes = ["num_rounds=1", "engine.attempts=1", "engine.min_sites=1"]
    over_the_wire(rows, tmp_path / "two", changes, monkeypatch, own={NAMES[0]: settings("{ max = 4 }")})
    (one,) = [event for event in read(tmp_path / "two" / "out" / "record.jsonl") if event["event"] == "round"]
    assert [d["client"] for d in one["dropped"]] == [0]
    assert "lora.r = 8; this site allows at most 4" in one["dropped"][0]["reason"]


def test_a_site_that_does_not_know_the_question_has_the_assigned_rank(rows, tmp_path, monkeypatch):
    """A site of an earlier release refuses it as a request without settings, and has the default limit of 8."""
    from fedmllm.flower.site import process

    monkeypatch.setattr(process, "LARGEST_RANK", "another key")
    changes = ['aggregator="fedilora"', "num_rounds=2", "backbone.lora.r=4"]
    wire = over_the_wire(rows, tmp_path, changes, monkeypatch)
    assert len(wire.replies) == 3 * len(NAMES)  # asked once
    assert adapter(tmp_path / "out") == in_process(rows, tmp_path, changes)


def test_the_dry_run_trains_the_rank_that_the_site_would_get(rows, tmp_path):
    from fedmllm.flower.site.dry_run import dry_run

    write_sites(rows, tmp_path, own={NAMES[0]: settings("{ max = 3 }")})
    text = (rows.folder / "experiment.toml").read_text()
    (tmp_path / "unequal.toml").write_text(f'aggregator = "fedilora"\n{text}')
    lines = []
    dry_run(tmp_path / NAMES[0] / "site.toml", tmp_path / "unequal.toml", tmp_path / "sent", lines.append)
    whole = sum(t.numel() for t in Experiment.load(rows.folder / "experiment.toml").backbone.load(0).lora().values())
    assert (tmp_path / "sent").stat().st_size == 4 * whole * 3 // 8


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
    for kept, says in (
        ({4: sha}, "state of round 4 belongs to another run"),
        ({5: sha}, "state of round 5 is missing"),
    ):
        with pytest.raises(LostState, match=says):
            state.read(kept)
    sha = state.write(6, {"c": torch.ones(2)})
    (path,) = tmp_path.rglob("round-0006*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LostState, match="state of round 6 is damaged") as error:
        state.read({6: sha})
    assert str(tmp_path) not in str(error.value)


class Lose:
    """Deletes what a site keeps, after round 1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, event) -> None:
        if isinstance(event, RoundEnd) and event.round == 1:
            shutil.rmtree(self.folder)


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_a_site_that_lost_its_state_says_so_and_the_others_continue(rows, tmp_path, monkeypatch, name):
    lose = Lose(tmp_path / NAMES[0] / "site-state" / "clients")
    over_the_wire(rows, tmp_path, [f'aggregator="{name}"', "engine.attempts=1"], monkeypatch, sinks=[lose])
    rounds = [event for event in read(tmp_path / "out" / "record.jsonl") if event["event"] == "round"]
    assert [len(event["clients"]) for event in rounds] == [3, 2, 2]
    for event in rounds[1:]:
        (left_out,) = event["dropped"]
        assert f"the state of round 1 is missing, which {name} keeps here" in left_out["reason"]
        assert str(tmp_path) not in left_out["reason"]


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
