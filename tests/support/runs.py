"""A run of three clients and three rounds, its events, and a sink that stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.runs.events import Event
from fedmllm.runs.record import read
from fedmllm.runs.run import run

TABLE: dict[str, Any] = {
    "data": {"name": "synthetic-irony", "num_train": 36, "num_validation": 8, "num_test": 8},
    "partition": {"name": "iid", "num_clients": 3},
    "backbone": "tiny",
    "train": {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 1},
    "num_rounds": 3,
    "checkpoint": {"keep": 9},
}


def experiment(**changed: Any) -> Experiment:
    return Experiment.parse({**TABLE, **changed})


def events(folder: Path, kind: str = "") -> list[dict[str, Any]]:
    return [event for event in read(folder / "record.jsonl") if kind in ("", event["event"])]


class Stop:
    """A sink that stops the run at an event, as a kill would: whatever comes after it is never written."""

    def __init__(self, kind: str, number: int) -> None:
        self.kind, self.left = kind, number

    def __call__(self, event: Event) -> None:
        self.left -= event.kind == self.kind
        if self.left == 0:
            self.left = -1
            raise KeyboardInterrupt(f"stopped at {self.kind}")


def adam(**changed: Any) -> Experiment:
    return experiment(aggregator="fedadam", evaluate={"every": 1, "select": "validation"}, **changed)


def stopped(folder: Path, **changed: Any) -> Path:
    with pytest.raises(KeyboardInterrupt):
        run(experiment(**changed), folder, [Stop("round", 3)])
    return folder
