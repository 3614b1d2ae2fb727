"""The server's folder and runs: resume, sites, keys and reachability. No SuperLink is started here."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from fedmllm.cli.federation import line_of
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.flower import patches
from fedmllm.flower.keys import make_authority, make_site_key, replace_site_key
from fedmllm.flower.processes import environment, free_port
from fedmllm.flower.server.experiment import over_sites
from fedmllm.flower.server.folder import Server
from fedmllm.flower.server.runs import run_over_sites, write_job
from fedmllm.flower.site.config import Site
from fedmllm.flower.site.probe import report_reachability, unreachable

TABLE = {"data": "synthetic-irony", "cohort_size": 1, "num_rounds": 8}
EXPERIMENT = Experiment.parse(TABLE)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    made = Server.new(tmp_path / "server", ["localhost"], free_port())
    (made.folder / "sites.json").write_text('{"a": 1, "b": 2}')
    return made


def finished(out: Path, experiment: Experiment) -> None:
    """Write what a finished run over the sites a and b leaves."""
    out.mkdir()
    first = {"event": "experiment", "settings": over_sites(experiment, ("a", "b"), test=True).dump()}
    (out / "record.jsonl").write_text(json.dumps(first) + '\n{"event": "end", "num_rows": 1}\n')
    (out / "summary.json").write_text('{"rows": [{"metric": "auc"}]}')


# ---- resume


def test_a_finished_run_is_left_as_it_is_and_says_so(server: Server, tmp_path: Path):
    finished(tmp_path / "out", EXPERIMENT)
    events = list(run_over_sites(server, EXPERIMENT, tmp_path / "out", resume=True, test=True))
    assert [event["event"] for event in events] == ["finished"]
    assert "nothing to do" in line_of(events[0], [])
    assert not (tmp_path / "out" / "job.json").exists()


@pytest.mark.parametrize(
    ("changes", "only", "says"),
    [
        ({"num_rounds": 12}, (), "num_rounds was 8, is 12"),
        ({"seed": 7}, (), "seed was 0, is 7"),
        ({}, ("a",), r"data\.sites was \['a', 'b'\], is \['a'\]"),
        ({"aggregator": "fedadam"}, (), "aggregator.name was 'fedavg', is 'fedadam'"),
    ],
)
def test_a_finished_run_is_not_resumed_with_other_settings_or_sites(server, tmp_path, changes, only, says):
    finished(tmp_path / "out", EXPERIMENT)
    other = Experiment.parse({**TABLE, **changes})
    with pytest.raises(ConfigError, match=f"out: cannot be resumed with other settings: .*{says}"):
        list(run_over_sites(server, other, tmp_path / "out", resume=True, test=True, only=only))


def test_a_run_in_the_folder_is_not_overwritten_without_resume(server: Server, tmp_path: Path):
    finished(tmp_path / "out", EXPERIMENT)
    with pytest.raises(FedmllmError, match=r"exists\. Pass --resume to continue that run"):
        list(run_over_sites(server, EXPERIMENT, tmp_path / "out", resume=False, test=True))


def test_sites_that_are_not_registered_are_named(server: Server, tmp_path: Path):
    with pytest.raises(ConfigError, match="--site: got c; registered: a, b"):
        list(run_over_sites(server, EXPERIMENT, tmp_path / "out", False, True, only=("a", "c")))
    (tmp_path / "file").write_text("")
    with pytest.raises(FedmllmError, match=r"--out: .*file/out: cannot be made: Not a directory"):
        list(run_over_sites(server, EXPERIMENT, tmp_path / "file" / "out", False, True))


def test_a_superlink_that_does_not_respond_is_reported_before_the_wait(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "flwr", lambda *_, **__: pytest.fail("asked before the report"))
    first = next(run_over_sites(server, EXPERIMENT, tmp_path / "out", resume=False, test=True))
    assert line_of(first, []) == (
        f"SuperLink does not respond on port {server.listen.port}: start `fedmllm server start`; waiting for 120 s"
    )


# ---- own rows

CSV = "image,text,answer,site\n,it is,no,a\n,it was,yes,b\n"
COLUMNS = {"text": "text", "answer": "answer", "client": "site", "question": "", "choices": ""}


@pytest.mark.parametrize("question", [{"question": "Is it?", "choices": ["no", "yes"]}])
def test_own_rows_keep_their_meaning_on_the_way_to_the_server_app(tmp_path: Path, question: dict):
    from fedmllm.flower.server.server_app import ServerJob

    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text(CSV)
    data = {"name": "table", "root": str(tmp_path), "train": "train.csv", "test": "test.csv", "columns": COLUMNS}
    experiment = Experiment.parse({"data": {**data, **question}, "cohort_size": 1})
    job = ServerJob.read(write_job(tmp_path, over_sites(experiment, ("a", "b"), test=True), {"a": 1, "b": 2}, False))
    there, here = job.experiment.data.load("test").examples, experiment.data.load("test").examples
    assert len(here) == 2
    assert [(e.question, e.choices, e.answer, e.fields) for e in there] == [
        (e.question, e.choices, e.answer, e.fields) for e in here
    ]
    assert job.experiment.run_id() == over_sites(experiment, ("a", "b"), test=True).run_id()


# ---- keys


def test_a_removed_key_that_comes_back_is_refused_with_what_to_do(server, tmp_path, monkeypatch):
    public = make_site_key(tmp_path / "site.key")

    def flwr(self: Server, *words: str, **_: float) -> dict:
        raise FedmllmError("flwr supernode register: [code: 23] Public key already in use.")

    monkeypatch.setattr(Server, "flwr", flwr)
    with pytest.raises(
        FedmllmError, match=r"was removed; .* Make a new one at the site with `fedmllm site key SITE.toml`"
    ):
        server.add("c", public)


def test_a_site_key_is_replaced_and_the_old_one_kept(tmp_path: Path):
    first = make_site_key(tmp_path / "site.key").read_text()
    assert replace_site_key(tmp_path / "site.key").read_text() != first
    assert (tmp_path / "site.key.pub.old").read_text() == first
    assert (tmp_path / "site.key.old").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FedmllmError, match=r"site\.key\.old exists; move it away first"):
        replace_site_key(tmp_path / "site.key")


@pytest.mark.parametrize("gate", ["here", 'x"\nhost = "0.0.0.0:1'])
def test_a_gate_that_is_not_an_address_leaves_no_folder(tmp_path: Path, gate: str):
    with pytest.raises(ConfigError, match="gate: got "):
        Server.new(tmp_path / "new", ["localhost"], 8000, gate)
    assert not (tmp_path / "new").exists()


# ---- reachability


def test_a_server_on_another_port_is_reported_at_once(tmp_path: Path):
    make_authority(tmp_path, ["localhost"])
    lines, stop = [], threading.Event()
    thread = threading.Thread(
        target=report_reachability, args=(f"127.0.0.1:{free_port()}", tmp_path / "ca.crt", lines.append, stop)
    )
    began = time.monotonic()
    thread.start()
    while not lines and time.monotonic() < began + 10:
        time.sleep(0.01)
    stop.set()
    thread.join(10)
    assert len(lines) == 1
    assert "cannot be reached: " in lines[0]
    assert "Connection refused" in lines[0]
    assert time.monotonic() - began < 5


def test_a_server_with_another_authority_is_named_by_its_certificate(tmp_path: Path):
    pytest.importorskip("uvicorn")
    from starlette.applications import Starlette

    from support.tls import served

    make_authority(tmp_path / "one", ["127.0.0.1"])
    make_authority(tmp_path / "two", ["127.0.0.1"])
    with served(Starlette(), tmp_path / "one") as port:
        assert unreachable(f"127.0.0.1:{port}", tmp_path / "one" / "ca.crt") == ""
        assert "certificate verify failed" in unreachable(f"127.0.0.1:{port}", tmp_path / "two" / "ca.crt")


# ---- the environment of Flower's programs


def test_programs_of_flower_write_utf_8_whatever_the_terminal_is(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert environment(tmp_path)["PYTHONIOENCODING"] == "utf-8"


def test_a_supernode_looks_for_the_next_message_soon_after_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode import start_client_internal as node

    slept, now = list[float](), [100.0]
    monkeypatch.setattr(node, "_push_messages", lambda **given: None)
    monkeypatch.setattr(node, "time", node.time)
    monkeypatch.setattr(patches, "time", SimpleNamespace(sleep=slept.append, monotonic=lambda: now[0]))
    patches.look_for_messages_often()
    node.time.sleep(3)
    node._push_messages(state=None)
    node.time.sleep(3)
    now[0] += patches.ROUND_S
    node.time.sleep(3)
    assert slept == [3, patches.NEXT_S, 3]
    source = Path(node.__file__).read_text()
    assert set(re.findall(r"\btime\.(\w+)", source)) == {"sleep"}


def test_another_version_of_flower_is_refused(monkeypatch):
    monkeypatch.setattr(patches.importlib.metadata, "version", lambda name: "1.42.0")
    with pytest.raises(FedmllmError, match=r"flwr: got version 1.42.0; .* as in 1.41: pip install"):
        patches.check_installed("flwr")
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f"flwr[simulation]>={patches.FLWR}," in pyproject


# ---- plug-ins of a site

PLUGIN = """
from typing import Literal
from fedmllm.algorithms.objectives import Objective
class Mine(Objective):
    name: Literal["{name}"] = "{name}"
    def prox_mu(self, name, view):
        return 0.0
"""


def test_a_site_loads_its_own_plug_ins_and_none_that_a_request_names(tmp_path: Path):
    from fedmllm.algorithms.objectives import Objective
    from fedmllm.flower.request import Request

    for name in ("own-objective", "servers-objective"):
        (tmp_path / f"{name}.py").write_text(PLUGIN.format(name=name))
    head = 'name = "north"\nserver = "localhost:1"\nca = "ca.crt"\nkey = "site.key"\nimports = ["own-objective.py"]\n'
    (tmp_path / "site.toml").write_text(f"{head}[data]\nname = 'synthetic-irony'\n")
    Site.load(tmp_path / "site.toml")
    assert "own-objective" in Objective.members
    table = json.loads(Request.of(EXPERIMENT, "base", "north", 0, 1).model_dump_json())
    with pytest.raises(ConfigError, match=r"request\.imports: unknown key"):
        Request.read(json.dumps({**table, "imports": [str(tmp_path / "servers-objective.py")]}))
    with pytest.raises(ConfigError, match=r"request\.objective\.name: got 'servers-objective'"):
        Request.read(json.dumps({**table, "objective": "servers-objective"}))
    assert Request.read(json.dumps({**table, "objective": "own-objective"})).objective.name == "own-objective"
    del Objective.members["own-objective"]
