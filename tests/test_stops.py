"""A kill at every point, and files that somebody touched in between: a run resumes to the same bytes, or says why not."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmllm.core.errors import DataError, FedmllmError
from fedmllm.federation.evaluation import predict
from fedmllm.runs import checkpoint
from fedmllm.runs.checkpoint import Checkpoints
from fedmllm.runs.inputs import Inputs
from fedmllm.runs.record import Record
from fedmllm.runs.run import run
from support.checkpoints import LIKE, run_state, values, write
from support.runs import Stop, adam, events, experiment, stopped


class Killed(BaseException):
    """Nothing between it and the end of the process runs."""


class Fuse:
    """Ends the process, as it were, at the n-th operation on files; a write is then half done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        for owner, name in ((Path, "mkdir"), (Path, "write_bytes"), (Path, "rename"), (shutil, "rmtree")):
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name)))
        monkeypatch.setattr(checkpoint, "sync", self.wrapped(checkpoint.sync))

    def wrapped(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                if operation.__name__ == "write_bytes":
                    operation(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Killed
            return operation(*arguments, **named)

        return instead


def test_a_checkpoint_survives_a_kill_at_every_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuse = Fuse(monkeypatch)
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        write(folder, run_state(1), run_state(2), keep=1)
        checkpoints = Checkpoints(folder, 1, b"{}", lambda: None)
        fuse.left = number
        checkpoints.save(run_state(3), values(3), {})
        try:
            checkpoints.wait()
            break  # more operations than there are
        except Killed:
            fuse.left = 0
        for left in checkpoint.numbers(folder):  # one that is there is whole
            back = checkpoint.read_checkpoint(folder / f"round-{left:04d}", LIKE, {})
            assert all(torch.equal(back.params[name], t) for name, t in values(left).items())
        last = max(checkpoint.numbers(folder))
        assert last in (2, 3)
        write(folder, run_state(last + 1), keep=1)
        assert [entry.name for entry in folder.iterdir()] == [f"round-{last + 1:04d}"]
    assert number > 10


def test_a_damaged_best_one_is_refused_though_the_last_one_is_whole(tmp_path: Path) -> None:
    """Its adapter would be the result of the run."""
    with pytest.raises(KeyboardInterrupt):
        run(adam(), tmp_path, [Stop("validation", 3)])
    last = checkpoint.newest(tmp_path / "checkpoints")
    assert last is not None
    best = checkpoint.read_run_state(last).best
    assert best is not None
    path = tmp_path / "checkpoints" / f"round-{best.number:04d}" / checkpoint.ADAPTER_FILE
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    with pytest.raises(FedmllmError, match=rf"round-000{best.number}/.*damaged.*names it as the best so far"):
        run(adam(), tmp_path, resume=True)


def test_a_summary_of_nobody_knows_what_is_not_handed_out(tmp_path: Path) -> None:
    run(experiment(method="majority"), tmp_path)
    (tmp_path / "record.jsonl").unlink()
    with pytest.raises(FedmllmError, match=r"summary\.json: record\.jsonl does not say what it is of"):
        run(experiment(method="majority", seed=1), tmp_path, resume=True)


def test_a_record_that_was_replaced_is_refused(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "run")
    record = folder / "record.jsonl"
    record.write_bytes(b" " + record.read_bytes())  # longer than it was: the lines end at other places
    with pytest.raises(FedmllmError, match=r"record\.jsonl: was replaced since the checkpoint was written"):
        run(experiment(), folder, resume=True)
    record.write_bytes(record.read_bytes()[1:])
    run(experiment(), folder, resume=True)
    assert [event["round"] for event in events(folder, "round")] == [1, 2, 3]


def test_scores_that_are_nan_are_no_prediction() -> None:
    """A finite adapter whose products are not: the largest of NaN would be an answer like any other."""
    inputs = Inputs.load(experiment())
    e = inputs.experiment
    inputs.backbone.set_lora({name: torch.full_like(t, 1e30) for name, t in inputs.start.items()})
    with pytest.raises(DataError, match="the model's scores are NaN"):
        predict(inputs.backbone, e.prompt, inputs.test, frozenset(("image", "text")), e.evaluate)


PARENT = """
    import multiprocessing, sys, time
    sys.path[:0] = [{tests!r}]
    from fedmllm.runs.suites.worker import Order, work
    from support.runs import TABLE

    if __name__ == "__main__":
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, 1), daemon=True).start()
        theirs.close()  # so that a worker that fails ends this process, too
        ours.send(Order({{**TABLE, "train": {{"epochs": 10_000, "batch_size": 4}}}}, {folder!r}))  # a round of minutes
        print(ours.recv().event.kind, flush=True)
        time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_suite_that_was_killed_leaves_no_process_that_holds_a_cell(tmp_path: Path) -> None:
    folder = tmp_path / "cells" / "cell"
    folder.parent.mkdir()
    (tmp_path / "parent.py").write_text(
        textwrap.dedent(PARENT).format(tests=str(Path(__file__).parent), folder=str(folder))
    )
    with subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "experiment\n"
        with pytest.raises(FedmllmError, match="another run is writing it"):
            Record(folder / "record.jsonl")
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            Record(folder / "record.jsonl").close()
            return
        except FedmllmError:
            time.sleep(0.05)
    raise AssertionError("the worker still holds the cell")
