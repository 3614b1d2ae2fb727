"""Every tracker takes a run's events without a network and gives back the numbers that it was given."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError
from fedmllm.runs.events import Ended, Event, Resumed, RoundEnd, Started
from fedmllm.runs.record import read
from fedmllm.runs.trackers import TRACKERS, Tracker, tracker
from support.made_up import write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    settings = {"data": "synthetic-irony", "num_rounds": 3, "evaluate": {"every": 1, "visible": ["both", "text"]}}
    write_run(tmp_path / "run", Experiment.parse(settings))
    return tmp_path / "run"


def play(name: str, folder: Path) -> list[dict[str, object]]:
    pytest.importorskip(TRACKERS[name].needs.split(".")[0], reason=f"the extra {name!r} is not installed")
    events = list(read(folder / "record.jsonl"))
    sink = tracker(name, folder)
    for event in events:
        sink(Event.from_json(event))
    return events


def test_tensorboard_holds_every_number_by_round(run_folder: Path):
    events = play("tensorboard", run_folder)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_folder / "tensorboard"))
    board.Reload()
    last = [e for e in events if e["event"] == "eval" and e["visible"] == "text"][-1]
    assert board.Scalars("text/auc")[-1].value == pytest.approx(last["metrics"]["auc"])
    assert [s.step for s in board.Scalars("round/loss")] == [1, 2, 3]
    assert board.Scalars("cost/sent_bytes")[-1].value == 3 * 2 * 262144


def test_mlflow_writes_into_the_run_folder(run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(run_folder)
    play("mlflow", run_folder)
    with sqlite3.connect(run_folder / "mlflow.db") as base:
        steps = base.execute("select step from metrics where key = 'round/loss' order by step").fetchall()
        status = base.execute("select status from runs").fetchall()
        assert base.execute("select value from params where key = 'num_rounds'").fetchall() == [("3",)]
    assert (steps, status) == ([(1,), (2,), (3,)], [("FINISHED",)])


def test_wandb_is_offline_unless_asked(run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    play("wandb", run_folder)
    assert list((run_folder / "wandb").glob("offline-run-*/*.wandb"))


def test_trackio_keeps_local_files(run_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    play("trackio", run_folder)
    assert [p for p in (tmp_path / "trackio").rglob("*") if p.is_file()]


def replay_after_round_2(name: str, folder: Path) -> None:
    """The events of a run that is killed after round 3 and resumed from the checkpoint of round 2."""
    first, second = tracker(name, folder), tracker(name, folder)
    events = [Event.from_json(line) for line in read(folder / "record.jsonl")]
    start = events[0]
    assert isinstance(start, Started)
    for event in events:
        if isinstance(event, Started | RoundEnd):
            first(event)  # then it is killed: nothing closes it
    sent = sum(e.up_bytes + e.down_bytes for e in events if isinstance(e, RoundEnd) and e.round <= 2)
    second(start)
    second(Resumed(2, 2, start.versions, start.device, [], sent))
    for event in events:
        if (isinstance(event, RoundEnd) and event.round > 2) or isinstance(event, Ended):
            second(event)


def test_tensorboard_counts_on_after_a_resume(run_folder: Path):
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    replay_after_round_2("tensorboard", run_folder)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_folder / "tensorboard"))
    board.Reload()
    assert [s.value for s in board.Scalars("cost/sent_bytes")][-1] == 3 * 2 * 262144


def test_mlflow_continues_the_run_that_was_killed(run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(run_folder)
    real = mlflow.start_run
    monkeypatch.setattr(
        mlflow, "start_run", lambda **named: (mlflow.tracking.fluent._active_run_stack.set([]), real(**named))[1]
    )
    replay_after_round_2("mlflow", run_folder)
    with sqlite3.connect(run_folder / "mlflow.db") as base:
        assert base.execute("select status from runs").fetchall() == [("FINISHED",)]
        sent = base.execute("select value from metrics where key = 'cost/sent_bytes' and step = 3").fetchall()
    assert {value for (value,) in sent} == {3.0 * 2 * 262144}


def test_an_unknown_or_missing_tracker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"got 'tensorbord'; allowed: .*did you mean 'tensorboard'"):
        tracker("tensorbord", tmp_path)
    monkeypatch.setattr(TRACKERS["wandb"], "needs", "no_such_module")
    with pytest.raises(ConfigError, match=r"pip install 'fedmllm\[wandb\]'"):
        tracker("wandb", tmp_path)


def test_a_tracker_of_ones_own_is_a_sink(run_folder: Path):
    class Kept(Tracker):
        needs, extra = "json", "kept"

        def begin(self, run_id, settings):
            self.kept = {"run_id": run_id, "alpha": settings["partition.alpha"]}

        def log(self, round_, values):
            self.kept |= {f"{round_}:{k}": v for k, v in values.items()}

        def finish(self, failed):
            self.kept["failed"] = failed

    kept = Kept(run_folder)
    for event in read(run_folder / "record.jsonl"):
        kept(Event.from_json(event))
    assert kept.kept["alpha"] == 0.5
    assert {"1:both/auc", "3:both/auc", "2:round/norm"} <= kept.kept.keys()
    assert kept.kept["failed"] is False
    assert json.dumps(kept.kept)
    assert os.environ.get("HF_HUB_OFFLINE") == "1"


class Library:
    """In place of wandb or trackio: keeps the arguments of `init` and what is logged."""

    __spec__ = ModuleSpec("library", None)

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []

    def init(self, **named: Any) -> Library:
        self.runs.append(named)
        return self

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.logged.append((int(values["round"]) if step is None else step, values))

    def finish(self, **_: Any) -> None: ...


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name")])
def test_wandb_and_trackio_continue_the_run_that_was_killed(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, key: str
):
    library = Library()
    monkeypatch.setitem(sys.modules, name, cast("ModuleType", library))
    replay_after_round_2(name, run_folder)
    first, second = library.runs
    assert first[key] == second[key] != ""
    assert {run["resume"] for run in library.runs} == {"allow"}
    sent = [(step, values["cost/sent_bytes"]) for step, values in library.logged]
    assert sent == [*((i, i * 2 * 262144) for i in (1, 2, 3)), (3, 3 * 2 * 262144)]
