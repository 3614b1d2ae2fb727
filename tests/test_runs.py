"""Runs end to end on the embedded world: what is written, what is refused, and that a stop loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedmllm.cli.main import app
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.types import Shard
from fedmllm.runs.checkpoint import newest, read_run_state, sealed
from fedmllm.runs.events import Event
from fedmllm.runs.methods import equivalent_rounds
from fedmllm.runs.record import Record
from fedmllm.runs.run import run
from support.runs import TABLE, Stop, adam, events, experiment, stopped

METHODS = ["majority", "zero-shot", "federated", "local", "centralised"]


def adapter(folder: Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("availability", "expected"),
    [
        ({"name": "always"}, 25 * 2 / 9),
        ({"name": "unreliable", "drop_rate": 0.5}, 25 * 2 / 9 * 0.5),
        ({"name": "unreliable", "straggle_rate": 1.0, "straggle_share": 0.25}, 25 * 2 / 9 * 0.25),
    ],
)
def test_a_baseline_trains_as_much_as_a_client_that_is_asked_and_answers(availability: Any, expected: float) -> None:
    shards = [Shard(client, (client,) * (client > 0), (frozenset(),) * (client > 0)) for client in range(10)]
    settings = experiment(num_rounds=25, cohort_size=2, availability=availability)
    assert equivalent_rounds(settings, shards) == pytest.approx(
        expected, rel=0.15 if "drop_rate" in availability else 0
    )


def test_a_budget_of_half_a_round_is_half_of_its_steps(tmp_path: Path) -> None:
    train = {**TABLE["train"], "max_steps": 0}
    settings = experiment(method="local", num_rounds=5, cohort_size=1, train=train)  # 5 / 3 rounds of 3 steps
    run(settings, tmp_path / "run")
    steps = [[c["num_steps"] for c in e["clients"]] for e in events(tmp_path / "run", "round")]
    assert steps == [[3], [2]] * 3


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federated run that nothing stopped, FedAdam, evaluated every round and selected on validation."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(adam(), folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_with_a_summary_that_says_what_the_record_says(method: str, tmp_path: Path) -> None:
    seen: list[Event] = []
    settings = experiment(method=method, evaluate={"visible": ["all", "image"]})
    rows = run(settings, tmp_path / "run", [seen.append])
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"rows": list(rows)}
    written = events(tmp_path / "run")
    assert [{k: v for k, v in event.items() if k != "time"} for event in written] == json.loads(
        json.dumps([event.to_json() for event in seen])
    )
    assert [written[0]["event"], written[-1]["event"]] == ["experiment", "end"]
    assert written[0]["run_id"] == settings.run_id()
    assert Experiment.parse(written[0]["settings"]) == settings
    assert written[0]["digests"].keys() == {"rows", "partition", "base"}
    rounds, evals = events(tmp_path / "run", "round"), events(tmp_path / "run", "eval")
    num_rounds = {"federated": 3, "centralised": 2, "local": 3 * 2}.get(method, 0)
    assert len(rounds) == num_rounds
    for row in rows:
        values = [e["metrics"][row["metric"]] for e in evals if e["visible"] == row["visible"]]
        assert row["n"] == len(values) == (3 if method == "local" else 1)
        assert row["value"] == pytest.approx(sum(values) / len(values))
        assert row["num_tokens"] == sum(c["num_tokens"] for event in rounds for c in event["clients"])
        federated = method == "federated"
        assert row["up_bytes"] == (sum(event["up_bytes"] for event in rounds) if federated else 0)
        assert row["run_id"] == settings.run_id()
    assert {row["visible"] for row in rows} == ({"none"} if method == "majority" else {"all", "image"})


def test_the_adapter_is_one_that_peft_loads(whole: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    loaded = adam().backbone.load(seed=5)
    base = loaded.model.unload()
    again = PeftModel.from_pretrained(base, str(whole / "adapter"))
    saved = adapter(whole)
    live = {name.replace(".default.", "."): p for name, p in again.named_parameters() if "lora_" in name}
    assert live.keys() == saved.keys()
    assert all(torch.equal(live[name], saved[name]) for name in saved)
    PeftModel.from_pretrained(loaded.model.unload(), str(newest(whole / "checkpoints")))  # a checkpoint is one too


def test_the_adapter_chosen_is_the_best_on_validation_and_the_record_says_which(whole: Path) -> None:
    validations = events(whole, "validation")
    assert [event["round"] for event in validations] == [1, 2, 3]
    best = max(validations, key=lambda event: (event["value"], -event["round"]))
    assert validations[-1]["best_round"] == best["round"]
    assert same(adapter(whole), adapter(whole / "checkpoints", f"round-{best['round']:04d}"))


@pytest.mark.parametrize(
    ("kind", "number"), [("experiment", 1), ("round", 1), ("validation", 1), ("eval", 1), ("round", 3), ("eval", 3)]
)
def test_a_run_stopped_anywhere_ends_with_the_same_bytes(kind: str, number: int, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(adam(), folder, [Stop(kind, number)])
    assert events(folder)[-1]["event"] == "stopped"
    rows = run(adam(), folder, resume=True)
    assert same(adapter(folder), adapter(whole))
    for place in ("round-0002", "round-0003"):
        for name in ("adapter_model.safetensors", "state.safetensors"):
            assert (folder / "checkpoints" / place / name).read_bytes() == (
                whole / "checkpoints" / place / name
            ).read_bytes()
    assert (folder / "predictions.jsonl.gz").read_bytes() == (whole / "predictions.jsonl.gz").read_bytes()
    assert [event["round"] for event in events(folder, "round")] == [1, 2, 3]
    timeless = [[e["event"], e.get("round"), e.get("metrics"), e.get("value")] for e in events(folder)]
    assert [e for e in timeless if e[0] not in ("resumed", "stopped")] == [
        [e["event"], e.get("round"), e.get("metrics"), e.get("value")] for e in events(whole)
    ]
    before = {row["metric"]: row for row in json.loads((whole / "summary.json").read_text())["rows"]}
    for row in rows:
        for column in ("value", "num_rounds", "up_bytes", "down_bytes", "num_tokens"):
            assert row[column] == before[row["metric"]][column]


@pytest.mark.parametrize(("kind", "number"), [("round", 3), ("eval", 1), ("eval", 2)])
def test_local_keeps_the_clients_that_are_done(kind: str, number: int, tmp_path: Path) -> None:
    settings = experiment(method="local")
    one = run(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "run", [Stop(kind, number)])
    two = run(settings, tmp_path / "run", resume=True)
    assert [(r["metric"], r["value"], r["std"], r["n"]) for r in one] == [
        (r["metric"], r["value"], r["std"], r["n"]) for r in two
    ]
    for client in range(3):
        name = f"adapters/client-{client}"
        assert same(adapter(tmp_path / "run", name), adapter(tmp_path / "whole", name))
    rounds = [(event["cohort"], event["round"]) for event in events(tmp_path / "run", "round")]
    assert rounds == [([k], t) for k in range(3) for t in (1, 2)]


def test_a_finished_run_is_left_as_it_is(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert run(adam(), whole, resume=True) == json.loads((whole / "summary.json").read_text())["rows"]
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_folder_with_a_run_is_refused_with_the_way_on(whole: Path) -> None:
    with pytest.raises(FedmllmError, match=r"record\.jsonl exists; --resume continues that run"):
        run(adam(), whole)


def test_other_settings_are_refused_and_named(whole: Path) -> None:
    with pytest.raises(ConfigError, match=r"aggregator\.lr was 0\.001, is 0\.1"):
        run(
            adam().model_copy(update={"aggregator": adam().aggregator.model_copy(update={"lr": 0.1})}),
            whole,
            resume=True,
        )
    with pytest.raises(
        ConfigError, match=r"aggregator\.name was 'fedadam', is 'median'; .*tau was 0\.001, is not there"
    ):
        run(experiment(aggregator="median", cohort_size=3), whole, resume=True)


def test_where_and_how_fast_may_change(whole: Path) -> None:
    other_engine = adam(engine={"name": "stacked", "clients": 3}, checkpoint={"keep": 1})
    assert run(other_engine, whole, resume=True)


def test_other_rows_or_another_base_are_refused_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TABLE["data"] | {"name": "synthetic-irony", "seed": 3}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = stopped(tmp_path / "run", data=settings)
    picture = next((tmp_path / "cache").rglob("img/*.png"))
    picture.write_bytes(picture.read_bytes() + b"\0")  # the same name, one byte more
    with pytest.raises(ConfigError, match="the digest of its rows was"):
        run(experiment(data=settings), folder, resume=True)
    picture.write_bytes(picture.read_bytes()[:-1])
    place = newest(folder / "checkpoints")
    assert place is not None
    run_state = read_run_state(place)
    other = run_state.model_copy(update={"digests": {**run_state.digests, "base": "another"}})
    (place / "state.json").write_bytes(sealed(other))
    with pytest.raises(ConfigError, match="the digest of its base was 'another', is '"):
        run(experiment(data=settings), folder, resume=True)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(tmp_path: Path) -> None:
    one = run(experiment(), tmp_path / "whole")
    folder = stopped(tmp_path / "run")
    last = newest(folder / "checkpoints")
    assert last is not None
    tensors = last / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(FedmllmError, match=r"damaged.*continue from round-0001"):
        run(experiment(), folder, resume=True)
    shutil.rmtree(last)
    two = run(experiment(), folder, resume=True)
    assert [row["value"] for row in two] == [row["value"] for row in one]
    assert [event["round"] for event in events(folder, "round")] == [1, 2, 3]


def test_a_record_that_was_cut_is_refused(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "run")
    (folder / "record.jsonl").write_text("")
    with pytest.raises(FedmllmError, match=r"record\.jsonl: has 0 bytes, but had \d+ when the checkpoint was written"):
        run(experiment(), folder, resume=True)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    record = Record(tmp_path / "run" / "record.jsonl")
    with pytest.raises(FedmllmError, match="another run is writing it"):
        run(experiment(), tmp_path / "run")
    record.close()


def test_an_output_that_cannot_be_written_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedmllmError, match=r"file/run/record\.jsonl: cannot be written: Not a directory"):
        run(experiment(), tmp_path / "file" / "run")


def test_selecting_on_validation_needs_rounds_to_select_from() -> None:
    with pytest.raises(ConfigError, match="needs every >= 1"):
        experiment(evaluate={"select": "validation"})


def test_clients_that_drop_out_or_straggle(tmp_path: Path) -> None:
    table = {"train": {**TABLE["train"], "max_steps": 0}, "num_rounds": 6}
    rates = {"name": "unreliable", "drop_rate": 0.4, "straggle_rate": 0.5, "straggle_share": 0.34}
    run(experiment(**table, availability=rates), tmp_path / "run")
    rounds = events(tmp_path / "run", "round")
    steps = {c["num_steps"] for event in rounds for c in event["clients"]}
    assert steps == {2, 3}  # 12 rows, 4 a step; a straggler gets ceil(0.34 * 3) done
    away = [event.get("dropped_out", []) for event in rounds]
    assert 1 <= sum(map(len, away)) < 12
    for event, absent in zip(rounds, away, strict=True):
        assert sorted([*absent, *(c["client"] for c in event["clients"])]) == event["cohort"]
        assert event["down_bytes"] == 2 * rounds[0]["down_bytes"] / 2  # whoever drops out has received the adapter
    run(experiment(**table, availability=rates), tmp_path / "again")
    assert same(adapter(tmp_path / "run"), adapter(tmp_path / "again"))


def script(folder: Path) -> list[str]:
    path = folder / "x.toml"
    path.write_text(
        'backbone = "tiny"\nnum_rounds = 40\npartition = { name = "iid", num_clients = 3 }\n'
        'data = { name = "synthetic-irony", num_train = 36, num_validation = 8, num_test = 8 }\n'
    )
    return [sys.executable, "-m", "fedmllm.cli", "run", str(path), "--out", str(folder / "run")]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_a_readable_record_and_a_way_on(number: int, tmp_path: Path) -> None:
    # a shell that starts the tests in the background has them ignore Ctrl-C; this process must not
    def heard() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        script(tmp_path), stderr=subprocess.PIPE, text=True, env={**os.environ}, preexec_fn=heard
    )
    deadline = time.monotonic() + 120
    while not newest(tmp_path / "run" / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume continues" in said
    assert "Traceback" not in said
    assert events(tmp_path / "run")[-1]["event"] == "stopped"
    last = newest(tmp_path / "run" / "checkpoints")
    assert last is not None
    assert read_run_state(last).round >= 1


def test_the_command_line_resumes(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(
        'backbone = "tiny"\nnum_rounds = 2\npartition = { name = "iid", num_clients = 3 }\n'
        'data = { name = "synthetic-irony", num_train = 36, num_validation = 8, num_test = 8 }\n'
        "train = { max_steps = 1 }\n"
    )
    line = ["run", str(path), "--out", str(tmp_path / "run")]
    with pytest.raises(KeyboardInterrupt):
        run(Experiment.load(path), tmp_path / "run", [Stop("round", 1)])
    refused = CliRunner().invoke(app, line)
    assert isinstance(refused.exception, FedmllmError)
    done = CliRunner().invoke(app, [*line, "--resume"])
    assert done.exit_code == 0, done.output
    assert [event["round"] for event in events(tmp_path / "run", "round")] == [1, 2]


IN_A_SMALL_DISK = """
import subprocess, sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from fedmllm.core.errors import FedmllmError
from fedmllm.runs.run import run
from support.runs import events, experiment
place = Path({place!r})
settings = experiment(num_rounds=6, aggregator="fedadam", checkpoint={{"keep": 2}})
try:
    run(settings, place / "run")
except FedmllmError as error:
    print(error)
subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
run(settings, place / "run", resume=True)
print("rounds", [event["round"] for event in events(place / "run", "round")])
subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
try:
    run(settings, place / "other")
except FedmllmError as error:
    print(error)
"""


def test_a_full_disk_loses_nothing_and_a_read_only_one_is_said(tmp_path: Path) -> None:
    """A real file system of a fixed size, in a mount namespace of its own."""
    inside = tmp_path / "disk"
    inside.mkdir()
    one = tmp_path / "one"
    run(experiment(num_rounds=1, aggregator="fedadam"), one)
    checkpoint_bytes = sum(f.stat().st_size for f in (one / "checkpoints" / "round-0001").iterdir())
    size = int(2.5 * checkpoint_bytes)  # two fit, a third does not
    code = IN_A_SMALL_DISK.format(tests=str(Path(__file__).parent), place=str(inside))
    (tmp_path / "small_disk.py").write_text(code)
    mount = f"mount -t tmpfs -o size={size} tmpfs {inside} && exec {sys.executable} {tmp_path / 'small_disk.py'}"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no mount namespaces for this user")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    full, rounds, read_only = done.stdout.splitlines()[-3:]
    assert "No space left on device" in full, done.stderr
    assert "cannot be written" in full
    assert rounds == "rounds [1, 2, 3, 4, 5, 6]", done.stderr
    assert "cannot be written: Read-only file system" in read_only


def test_centralised_training_sees_as_many_rows_a_round_as_all_clients_together(tmp_path: Path) -> None:
    """36 rows in batches of 4: three steps of each of 3 clients; `max_steps` = 1 leaves 3 of the 9 steps."""
    for max_steps, expected in ((0, 9), (1, 3), (2, 6)):
        table = {"train": {**TABLE["train"], "max_steps": max_steps}, "cohort_size": 3, "num_rounds": 1}
        run(experiment(**table, method="centralised"), tmp_path / str(max_steps))
        (event,) = events(tmp_path / str(max_steps), "round")
        assert [c["num_steps"] for c in event["clients"]] == [expected]
