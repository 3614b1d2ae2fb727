"""What travels over Flower, what a site owns and refuses, and the trainer behind it. No server is started here."""

from __future__ import annotations

import json
import socket
import ssl
import stat
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedmllm.aggregators import FedAvg
from fedmllm.config import Experiment
from fedmllm.engines import flower_processes, flower_trainer
from fedmllm.engines.flower import ask, pack, read_update, refusal, unpack, update_content
from fedmllm.engines.flower_keys import make_authority, make_site_key
from fedmllm.engines.flower_names import ABOUT, ADAPTER, FLAT
from fedmllm.engines.flower_superlink import is_written
from fedmllm.engines.flower_trainer import serve
from fedmllm.record import Record
from fedmllm.sites import AtSites, Range, Request, Site, over_sites
from fedmllm.types import ClientFailure, ClientUpdate, ConfigError, FedmllmError

PARAMS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1.5])}
EXPERIMENT = Experiment.parse({"data": "synthetic-irony", "cohort_size": 1, "train": {"lr": 1e-3, "max_steps": 3}})


def reply(content: RecordDict) -> SimpleNamespace:
    return SimpleNamespace(has_error=lambda: False, content=content)


# ---- the wire


def test_an_adapter_is_one_float32_array_in_manifest_order_and_comes_back_as_it_was():
    content = pack(PARAMS, {})
    assert content[ADAPTER][FLAT].numpy().tolist() == [1.5, 0, 1, 2, 3, 4, 5]  # "a" before "b"
    assert len(content[ADAPTER]) == 1
    back = unpack(content, PARAMS)
    assert list(back) == ["b", "a"]
    assert all(torch.equal(back[name], PARAMS[name]) for name in PARAMS)


def test_other_names_or_shapes_are_refused_by_the_manifest():
    with pytest.raises(FedmllmError, match=r"manifest .* names or shapes differ"):
        unpack(pack({**PARAMS, "c": torch.zeros(1)}, {}), PARAMS)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros(6, np.float32), r"shape \(6,\)"),
        (np.zeros(7, np.float64), "float64"),
        (np.zeros((7, 1), np.float32), r"shape \(7, 1\)"),
    ],
)
def test_an_array_that_does_not_fit_its_manifest_is_a_failure_of_that_client(array, says):
    content = update_content(ClientUpdate(3, PARAMS, 5, {"loss": 1.0}))
    content[ADAPTER] = ArrayRecord({FLAT: Array(array)})
    failure = read_update(3, reply(content), PARAMS)
    assert isinstance(failure, ClientFailure)
    assert says.replace("\\", "") in failure.reason


def test_an_update_comes_back_with_its_rows_and_metrics():
    update = ClientUpdate(3, PARAMS, 5, {"loss": 1.0, "num_steps": 2})
    back = read_update(3, reply(update_content(update)), PARAMS)
    assert isinstance(back, ClientUpdate)
    assert (back.client, back.num_examples, dict(back.metrics)) == (3, 5, {"loss": 1.0, "num_steps": 2.0})
    assert all(torch.equal(back.delta[name], PARAMS[name]) for name in PARAMS)


def test_a_refusal_arrives_with_its_reason():
    assert read_update(1, reply(refusal("not today")), PARAMS) == ClientFailure(1, "not today")


words = st.one_of(st.text(max_size=20), st.integers(-(2**63), 2**63 - 1), st.floats(), st.binary(max_size=20))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # a busy machine is no fault
@given(st.dictionaries(st.sampled_from(["manifest", "num_examples", "metrics", "refused", "x"]), words), st.binary())
def test_nothing_in_a_reply_can_raise(about, data):
    content = RecordDict({ABOUT: ConfigRecord(about)})
    content[ADAPTER] = ArrayRecord({FLAT: Array("float32", (3,), "numpy.ndarray", data)})
    assert isinstance(read_update(0, reply(content), PARAMS), ClientFailure)


def test_an_array_is_never_unpickled():
    import io

    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    content = update_content(ClientUpdate(0, PARAMS, 1, {}))
    content[ADAPTER] = ArrayRecord({FLAT: Array("float32", (7,), "numpy.ndarray", file.getvalue())})
    assert "cannot be" in read_update(0, reply(content), PARAMS).reason


class Silent:
    """A grid on which nobody answers."""

    def push_messages(self, messages):
        return [f"m{i}" for i in range(len(messages))]

    def pull_messages(self, ids):
        return []


def test_asking_ends_when_time_is_up_and_when_a_site_is_lost():
    messages = {4: object(), 7: object()}
    answers = dict(ask(Silent(), messages, 0.2, 0.01, lambda: {7: "gone"}))
    assert answers == {4: "no answer within 0.2 s", 7: "gone"}


def test_nobody_to_ask_is_no_answer():
    assert list(ask(Silent(), {}, 1.0, 0.01, dict)) == []


# ---- requests


def test_a_request_holds_no_path_and_reads_back_as_it_was(tmp_path):
    wording = tmp_path / "wording.txt"
    wording.write_text("{question}\n{options}")
    prompt = {"name": "file", "template": str(wording)}
    experiment = Experiment.parse({"data": "synthetic-irony", "prompt": prompt, "cohort_size": 1})
    text = Request.of(experiment, "base", "north", 2, 1).model_dump_json()
    assert str(tmp_path) not in text
    assert Request.read(text).prompt.wording == "{question}\n{options}"


def test_a_server_cannot_make_a_site_read_a_file(tmp_path):
    table = json.loads(Request.of(EXPERIMENT, "base", "north", 0, 1).model_dump_json())
    table["prompt"] = {"name": "file", "template": "/etc/passwd"}
    with pytest.raises(ConfigError, match=r"template: names a file; a server may send a wording, never a path"):
        Request.read(json.dumps(table))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"train": {"lr": -1}}', "[" * 10**5, "x" * (2**20 + 1), '{"data": {}}']
)
def test_a_request_that_is_none_is_a_settings_error(text):
    with pytest.raises(ConfigError, match="request"):
        Request.read(text)


# ---- what a site allows


def site(tmp_path: Path, extra: str = "", data: str = "") -> Site:
    head = 'name = "north"\nserver = "localhost:1"\nca = "ca.crt"\nkey = "site.key"\n'
    (tmp_path / "site.toml").write_text(f"{head}[data]\nname = 'synthetic-irony'\n{data}\n{extra}")
    return Site.load(tmp_path / "site.toml")


def refused(here: Site, num_steps: int = 3, **changes: object) -> str:
    request = Request.of(EXPERIMENT, "base", "north", 0, 1).model_copy(update=changes)
    return here.refuse(request, "base", num_steps)


def test_a_request_within_the_limits_is_not_refused(tmp_path):
    assert refused(site(tmp_path)) == ""


@pytest.mark.parametrize(
    ("allow", "changes", "says"),
    [
        ("", {"site": "south"}, "this is north, not south"),
        ("", {"base": "other"}, "base model other is not the one here, base"),
        ('base = "pinned"', {}, "the site has pinned pinned"),
        ("max_steps = 2", {}, "3 optimiser steps; this site allows 2"),
        ("max_rounds = 10", {}, "round 1 of 25; this site allows 10"),
        ("", {"round": 26}, "round 26 of 25"),
        ('settings = { "train.lr" = { max = 1e-4 } }', {}, "train.lr = 0.001; this site allows at most 0.0001"),
        ('settings = { "prompt.name" = ["agnostic"] }', {}, "prompt.name = 'plain'; this site allows 'agnostic'"),
        ("", {"lora": EXPERIMENT.backbone.lora.model_copy(update={"targets": ".*"})}, "lora.targets = '.*'"),
    ],
)
def test_a_request_outside_is_refused_with_the_reason(tmp_path, allow, changes, says):
    reason = refused(site(tmp_path, f"[allow]\n{allow}"), **changes)
    assert reason.startswith("refused by site north: ")
    assert says in reason


def test_a_site_may_open_what_is_closed(tmp_path):
    opened = site(tmp_path, '[allow.settings]\n"lora.targets" = [".*"]')
    assert refused(opened, lora=EXPERIMENT.backbone.lora.model_copy(update={"targets": ".*"})) == ""


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("[allow.settings]\n'train.rate' = [1]", "unknown setting 'train.rate'"),
        ("[allow]\nmetrics = ['names']", "allow.metrics"),
        ("[alow]", "did you mean 'allow'"),
    ],
)
def test_a_site_file_with_a_bad_key_names_it(tmp_path, extra, says):
    with pytest.raises(ConfigError, match=r"site\.toml") as error:
        site(tmp_path, extra)
    assert says in str(error.value)


def test_a_range_holds_numbers_only():
    limits = Range(min=1, max=2)
    assert 1.5 in limits
    assert all(odd not in limits for odd in (0, 3, "1.5", None))


# ---- the server's view


def test_over_sites_every_site_is_a_client_in_the_order_of_names():
    experiment = over_sites(EXPERIMENT, ("a", "b"), test=False)
    rows = experiment.data.load("train").examples
    assert [row.columns["site"] for row in rows] == ["a", "b"]
    assert experiment.partition.split(rows, 0) == [[0], [1]]
    assert experiment.data.load("test").examples == ()
    assert experiment.engine.name == "flower-sites"
    assert experiment.screen.on_bad_update == "drop_client"


def test_the_servers_experiment_reads_back_from_its_record():
    experiment = over_sites(EXPERIMENT, ("a", "b"), test=True)
    assert isinstance(experiment.data, AtSites)
    assert Experiment.parse(json.loads(experiment.model_dump_json())) == experiment


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "local"}, "method"),
        ({"scenario": "missing"}, "scenario"),
        ({"cohort_size": 3}, "2 sites are known: a, b"),
    ],
)
def test_what_only_a_simulation_can_do_is_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        over_sites(Experiment.parse({"data": "synthetic-irony", **change}), ("a", "b"), test=True)


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


# ---- whether a run lives


def test_a_run_lives_as_long_as_its_record_is_locked(tmp_path):
    record = Record(tmp_path / "record.jsonl")
    assert is_written(tmp_path / "record.jsonl")
    record.close()
    assert not is_written(tmp_path / "record.jsonl")


# ---- without the extra


def test_an_engine_whose_packages_are_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(flower_processes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FedmllmError, match=r"flwr and ray not installed, .* pip install 'fedmllm\[flower\]'"):
        flower_processes.need("flwr", "ray")


# ---- the trainer


class Broken:
    """A trainer whose first message fails."""

    num_loads = 1

    def __init__(self, site: Site) -> None:
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
    thread = threading.Thread(target=serve, args=(site(tmp_path), theirs_end), daemon=True)
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


def test_aggregation_does_not_depend_on_who_answers_first():
    updates = [ClientUpdate(k, {"a": torch.tensor([0.1 * k + 0.3])}, k + 1, {}) for k in range(3)]
    start = {"a": torch.zeros(1)}
    params, _ = FedAvg().apply(start, {}, updates)
    with pytest.raises(FedmllmError, match="ascending client order"):
        FedAvg().apply(start, {}, updates[::-1])
    assert float(params["a"]) == pytest.approx((0.3 * 1 + 0.4 * 2 + 0.5 * 3) / 6)
