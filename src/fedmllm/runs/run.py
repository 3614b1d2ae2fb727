"""One experiment from its settings to its result: `fedmllm run`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmllm.config.experiment import UNTRAINED, Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.runs.costs import reset_peaks
from fedmllm.runs.events import EmptyClients, Ended, Extended, Resumed, Sink, Stopped
from fedmllm.runs.fingerprint import differences
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.inputs import Inputs, device, heading, versions
from fedmllm.runs.learning import learned
from fedmllm.runs.methods import METHODS
from fedmllm.runs.progress import NotebookBar, in_notebook
from fedmllm.runs.record import Record, read
from fedmllm.runs.result import RunResult
from fedmllm.runs.resume import Resume
from fedmllm.runs.session import Session


def run(
    experiment: Experiment,
    out: str | Path | None = None,
    sinks: Sequence[Sink] = (),
    resume: bool = False,
    compare_baselines: bool = False,
    progress: bool | None = None,
) -> RunResult:
    """Run one experiment; write record, predictions, checkpoints, adapter and summary into a folder.

    Args:
        experiment: What to run.
        out: The folder; by default `runs/RUN_ID`.
        sinks: Functions that receive each event of the run (`fedmllm.runs.events`).
        resume: Continue a run that was stopped in the folder from its last checkpoint; the result has the bytes of a run
            that was never stopped. A finished run is left as it is, unless the experiment has more rounds and nothing else
            differs: then it trains on, if `train.round_schedule` is "constant". A folder without a run gets a new one.
        compare_baselines: Evaluate the frozen model in addition, and record whether the result is better than it and than the
            most frequent training answer: the event `learned`.
        progress: Draw a progress bar. By default one is drawn in notebooks, unless `sinks` are given.

    Returns:
        The result: a sequence of the summary's rows, with the adapter and the history of the rounds.

    Raises:
        ConfigError: `experiment` is not an `Experiment`; or `resume` is set, and the settings, the rows or the base model are
            not those of the run in the folder.
        FedmllmError: The folder holds a run and `resume` is not set; or the run failed. Whatever stops a run, Ctrl-C
            included, is the last line of its record.
    """
    if not isinstance(experiment, Experiment):
        raise ConfigError(
            f"experiment: got {experiment!r:.60}; allowed: an Experiment, as Experiment.load(path) reads from a file"
        )
    if progress or (progress is None and not sinks and in_notebook()):
        sinks = (*sinks, NotebookBar())
    folder = RunFolder(Path(out or Path("runs") / experiment.run_id()))
    record = Record(folder.record)
    everyone: tuple[Sink, ...] = (record, *sinks)
    with contextlib.closing(record):
        if record.num_bytes() and not resume and has_begun(folder):
            raise FedmllmError(
                f"{folder.record} exists; --resume continues that run; or choose another --out, or delete the folder"
            )
        begin = Resume.find(folder, experiment)
        if begin.extends or not (resume and folder.is_finished):
            try:
                execute(experiment, begin, record, sinks, compare_baselines)
            except BaseException as error:
                for sink in everyone:
                    with contextlib.suppress(
                        Exception
                    ):  # a full disk, a closed pipe: the error at hand is what matters
                        sink(Stopped.by(error))
                raise
        return RunResult(folder.path, tuple(folder.read_rows()))


def has_begun(folder: RunFolder) -> bool:
    """False if a run was stopped before its first line by an error in its input: a new run loses nothing."""
    first = next(read(folder.record), {})
    return bool(first.get("event") != "stopped")


def execute(
    experiment: Experiment, begin: Resume, record: Record, sinks: Sequence[Sink], compare_baselines: bool = False
) -> None:
    """Run from the last checkpoint, if there is one, to the summary."""
    reset_peaks()
    inputs = Inputs.load(experiment)
    start = begin.check(inputs)
    if begin.extends:
        begin.folder.remove_summary()  # of the shorter run: a stop from here on leaves an unfinished one
    record.truncate(start.run_state.record_bytes if start else 0)
    session = Session(inputs, begin.folder, record, sinks, start)
    head = heading(inputs)
    if not start:  # a record that continues has it already
        record(head)
    for sink in sinks:
        sink(head)
    if start:
        state = start.run_state
        before = {"versions": state.versions, "device": state.device}
        sent = state.totals.up_bytes + state.totals.down_bytes
        now: dict[str, Any] = {"versions": versions(), "device": device(inputs)}
        session.emit(
            Resumed(state.round, state.totals.num_rounds, **now, changed=differences(before, now), sent_bytes=sent)
        )
        if begin.extends:
            session.emit(Extended(state.round, experiment.num_rounds, experiment.run_id()))
    elif empty := [shard.client for shard in inputs.shards if not shard.rows]:
        session.emit(EmptyClients(empty, "these clients hold no row and are never asked"))
    try:
        session.learn_completion()
        rows = METHODS[experiment.method](session)
        if compare_baselines and experiment.method not in UNTRAINED:
            session.sync()
            if found := learned(inputs, session.evaluator, begin.folder.predictions):
                session.emit(found)
        session.emit(Ended(len(rows)))
        session.sync()
    finally:
        session.close()
    begin.folder.write_rows(rows)
