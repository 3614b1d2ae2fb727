"""The parts of a deployment on this machine, one by one: keys, gate, lock, trainer, and what outlives what."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import stat
import threading
import time
import tomllib
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.flower import patches
from fedmllm.flower.keys import make_authority, make_site_key, refuse_open_key
from fedmllm.flower.processes import exclusive_lock
from fedmllm.flower.request import Request
from fedmllm.flower.server import watch as flower_watch
from fedmllm.flower.server.folder import Server
from fedmllm.flower.server.watch import Watch, is_written
from fedmllm.flower.site import trainer as flower_trainer
from fedmllm.flower.site.config import Site
from fedmllm.flower.site.process import run_site
from fedmllm.flower.site.resident import ResidentTrainer
from fedmllm.flower.site.supernode import reason
from fedmllm.flower.site.trainer import serve_trainer
from fedmllm.runs.record import Record

EXPERIMENT = Experiment.parse({"data": "synthetic-irony", "cohort_size": 1, "train": {"lr": 1e-3, "max_steps": 3}})


def site(tmp_path: Path, extra: str = "") -> Site:
    head = f'name = "north"\nserver = "localhost:1"\nca = "ca.crt"\nkey = "site.key"\n{extra}\n'
    (tmp_path / "site.toml").write_text(f"{head}[data]\nname = 'synthetic-irony'\n")
    return Site.load(tmp_path / "site.toml")


# ---- plug-ins

PLUGIN = """
from typing import Literal
from fedmllm.algorithms.objectives import Objective
class OfThisSite(Objective):
    name: Literal["of-this-site"] = "of-this-site"
    def prox_mu(self, name, view):
        return 0.0
"""


def test_import_of_site_start_reaches_the_trainer(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from fedmllm.algorithms.objectives import Objective
    from fedmllm.cli.main import app
    from fedmllm.flower.site import process

    site(tmp_path)
    (tmp_path / "mine.py").write_text(PLUGIN)
    called = []
    monkeypatch.setattr(process, "run_site", lambda *arguments: called.append(arguments))
    words = ["site", "start", str(tmp_path / "site.toml"), "--import", str(tmp_path / "mine.py")]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert called == [(tmp_path / "site.toml", (str((tmp_path / "mine.py").resolve()),))]
    Objective.members.pop("of-this-site")  # what this process loaded does not help its child

    asked = json.loads(Request.of(EXPERIMENT, "", "south", 0, 1).model_dump_json()) | {"objective": "of-this-site"}
    with pytest.raises(ConfigError, match=r"request\.objective\.name: got 'of-this-site'"):
        Request.read(json.dumps(asked))
    with contextlib.closing(ResidentTrainer(site(tmp_path), tmp_path / "site.toml", called[0][1])) as trainer:
        said, _ = trainer.ask({"request": json.dumps(asked), "manifest": ""}, b"")
    assert "this is north, not south" in said["refused"]


# ---- keys


def test_keys_are_private_never_overwritten_and_fit_the_certificate(tmp_path):
    make_authority(tmp_path, ["localhost", "127.0.0.1"])
    public = make_site_key(tmp_path / "site.key")
    assert public.read_text().startswith("ecdsa-sha2-nistp384 ")
    for name in ("ca.key", "server.key", "site.key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    with pytest.raises(FedmllmError, match=r"site\.key exists"):
        make_site_key(tmp_path / "site.key")
    ours, theirs = socket.socketpair()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    client = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    thread = threading.Thread(target=lambda: server.wrap_socket(ours, server_side=True).close())
    thread.start()
    with client.wrap_socket(theirs, server_hostname="localhost") as trusted:
        assert trusted.version() == "TLSv1.3"
    thread.join(10)


def test_a_private_key_that_others_can_read_is_refused_with_the_command_that_mends_it(tmp_path):
    make_site_key(tmp_path / "new" / "site.key")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    key = tmp_path / "new" / "site.key"
    refuse_open_key(key)
    key.chmod(0o640)
    with pytest.raises(FedmllmError, match=r"site\.key: has mode 0640; .*: chmod 600 "):
        refuse_open_key(key)


# ---- a site's process


def test_a_site_or_a_servers_folder_is_served_by_one_process_exclusive_lock(tmp_path):
    first = exclusive_lock(tmp_path)
    with pytest.raises(FedmllmError, match="another process serves it already"):
        exclusive_lock(tmp_path)
    first.close()
    exclusive_lock(tmp_path).close()


def test_a_site_without_its_files_or_with_an_open_key_starts_nothing(tmp_path):
    site(tmp_path)
    with pytest.raises(FedmllmError, match=r"site\.toml: ca: .*ca\.crt: no such file"):
        run_site(tmp_path / "site.toml")
    (tmp_path / "ca.crt").write_text("")
    with pytest.raises(FedmllmError, match=r"site\.toml: key: .*site\.key: no such file"):
        run_site(tmp_path / "site.toml")
    make_site_key(tmp_path / "site.key")
    (tmp_path / "site.key").chmod(0o644)
    with pytest.raises(FedmllmError, match="chmod 600"):
        run_site(tmp_path / "site.toml")
    assert not (tmp_path / "site-state").exists()


def test_a_trainer_that_hangs_before_it_has_read_its_message_is_replaced_in_time(tmp_path):
    trainer = ResidentTrainer(site(tmp_path, "task_timeout_s = 0.5"), tmp_path / "site.toml")
    try:
        hung = trainer.process
        os.kill(hung.pid, signal.SIGSTOP)
        began = time.monotonic()
        said, delta = trainer.ask({"request": "", "manifest": ""}, bytes(4 * 10**6))  # more than a socket holds
        assert time.monotonic() - began < 20
        assert said["refused"] == "site north: the trainer took longer than 0.5 s; it was restarted"
        assert delta == b""
        assert hung.returncode == -signal.SIGKILL
        assert trainer.process.pid != hung.pid
    finally:
        trainer.close()
    assert trainer.process.returncode is not None


def test_a_trainer_that_is_killed_is_named_with_its_exit_status_and_replaced(tmp_path):
    trainer = ResidentTrainer(site(tmp_path, "task_timeout_s = 60"), tmp_path / "site.toml")
    try:
        killed = trainer.process
        os.kill(killed.pid, signal.SIGSTOP)
        threading.Timer(0.2, killed.kill).start()
        said, _ = trainer.ask({"request": "", "manifest": ""}, bytes(4))
        assert said["refused"] == "site north: the trainer died (exit status -9); it was restarted"
        assert trainer.process.poll() is None
        assert trainer.process.pid != killed.pid
    finally:
        trainer.close()


def test_a_name_or_key_that_cannot_be_registered_is_named(tmp_path):
    server = Server.new(tmp_path / "server", ["localhost"], 8000)
    assert stat.S_IMODE((tmp_path / "server").stat().st_mode) == 0o700  # SuperLink's database lies there
    with pytest.raises(ConfigError, match="site '-x': a name has 1 to 100 printable"):
        server.add("-x", tmp_path / "site.key.pub")
    with pytest.raises(ConfigError, match=r"site\.key\.pub: no such file"):
        server.add("x", tmp_path / "site.key.pub")


def test_a_servers_folder_that_was_moved_finds_its_own_certificate_and_port(tmp_path):
    Server.new(tmp_path / "server", ["localhost"], 8000)
    moved = (tmp_path / "server").rename(tmp_path / "moved")
    (moved / "server.toml").write_text('host = "127.0.0.1"\nport = 8001\n')
    Server(moved)
    connection = tomllib.loads((moved / "flwr" / "config.toml").read_text())["superlink"]["fedmllm"]
    assert connection == {"address": "127.0.0.1:8001", "root-certificates": str(moved / "ca.crt")}


def test_a_heartbeat_that_a_busy_server_fails_is_sent_again_and_does_not_end_them_all():
    def answers(status: int) -> bool:
        httpx.Response(status, request=httpx.Request("POST", "https://here")).raise_for_status()
        return True

    assert patches.retried_heartbeat(lambda: answers(200))()
    assert not patches.retried_heartbeat(lambda: answers(500))()
    with pytest.raises(httpx.HTTPStatusError):
        patches.retried_heartbeat(lambda: answers(401))()


def test_of_a_supernodes_log_the_last_error_is_told():
    log = """INFO: a
\x1b[91mERROR \x1b[0m:     Exit Code: 305
Failed to initialize the connection to the SuperLink.
[code: 2004] Failed to activate SuperNode.

For more information, visit: <https://...>
INFO:     Finished server process [10206]
"""
    assert reason(log).startswith("Exit Code: 305 Failed to initialize the connection to the SuperLink. [code: 2004]")
    assert "The key is not registered at the server" in reason(log)
    assert "or another process is connected with it" in reason(log)
    assert reason("INFO: all is well") == ""


# ---- whether a run lives


def test_a_run_lives_as_long_as_its_record_is_locked(tmp_path):
    record = Record(tmp_path / "record.jsonl")
    assert is_written(tmp_path / "record.jsonl")
    record.close()
    assert not is_written(tmp_path / "record.jsonl")


def test_a_run_of_which_nothing_is_heard_is_lost_and_one_that_never_begins_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(flower_watch, "STATUS_S", 0.0)
    record, now = tmp_path / "record.jsonl", [0.0]
    monkeypatch.setattr(flower_watch, "time", SimpleNamespace(monotonic=lambda: now[0]))
    said = {"status": ("unreachable", "")}
    watch = Watch(lambda run: said["status"], "7", record)
    now[0] = flower_watch.SILENT_S - 1
    assert not watch.ended()
    now[0] = flower_watch.SILENT_S + 1
    assert watch.ended()
    with contextlib.closing(Record(record)):
        said["status"] = ("finished:failed", "of another time")
        assert not watch.ended()  # it holds its record, so SuperLink is not queried
        assert watch.status == "unreachable"
    said["status"] = ("unreachable", "")
    assert watch.ended()  # it has released its record
    now[0], said["status"] = now[0] + 1, ("finished:failed", "why")
    assert watch.ended()
    assert (watch.status, watch.details) == ("finished:failed", "why")
    now[0], said["status"] = 0.0, ("pending", "")
    watch = Watch(lambda run: said["status"], "7", record)
    now[0] = flower_watch.PENDING_S + 1
    with pytest.raises(FedmllmError, match="has not started run 7 within 300 s"):
        watch.ended()


# ---- without the extra


def test_an_engine_whose_packages_are_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(patches.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FedmllmError, match=r"flwr and ray not installed; .* pip install 'fedmllm\[flower\]'"):
        patches.check_installed("flwr", "ray")


# ---- the trainer


class Broken:
    """A trainer whose first message fails."""

    num_loads = 1

    def __init__(self, site: Site, folder: Path) -> None:
        self.calls = 0

    def train(self, request: Request, flat: np.ndarray, manifest: str) -> tuple:
        self.calls += 1
        if self.calls == 1:
            raise RuntimeError("row 17 of /secret/table.csv")
        return {"a": torch.tensor([float(self.calls)])}, {"num_examples": 4, "metrics": {"loss": 1.0}}


@pytest.fixture
def link(tmp_path, monkeypatch):
    monkeypatch.setattr(flower_trainer, "Trainer", Broken)
    ours, theirs = socket.socketpair()
    ours_end, theirs_end = Connection(ours.detach()), Connection(theirs.detach())
    thread = threading.Thread(target=serve_trainer, args=(site(tmp_path), theirs_end), daemon=True)
    thread.start()
    yield ours_end
    ours_end.close()
    thread.join(10)
    assert not thread.is_alive()


def asked(link: Connection, request: str, adapter: bytes = bytes(4)) -> tuple[dict, bytes]:
    link.send_bytes(json.dumps({"request": request, "manifest": "m"}).encode())
    link.send_bytes(adapter)
    return json.loads(link.recv_bytes()), link.recv_bytes()


def test_the_trainer_survives_what_fails_and_keeps_the_reason_at_the_site(link, capfd):
    request = Request.of(EXPERIMENT, "base", "north", 0, 1).model_dump_json()
    said, delta = asked(link, request)
    assert said["refused"] == "site north: training failed with RuntimeError; its own log says why"
    assert delta == b""
    assert "row 17 of /secret/table.csv" in capfd.readouterr().err
    said, delta = asked(link, request)
    assert (said["num_examples"], delta) == (4, np.float32(2).tobytes())


@pytest.mark.parametrize(("request_text", "adapter"), [("no json", bytes(4)), (None, bytes(3))])
def test_the_trainer_answers_nonsense_with_a_reason(link, request_text, adapter):
    text = request_text or Request.of(EXPERIMENT, "base", "north", 0, 1).model_dump_json()
    said, _ = asked(link, text, adapter)
    assert "request" in said["refused"] or "float32" in said["refused"]
