"""One experiment from its settings to its summary, begun or gone on with: what `fedmllm run` does."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.storage import write_atomically
from fedmllm.runs import checkpoint
from fedmllm.runs.checkpoint import Checkpoint
from fedmllm.runs.costs import reset_peaks
from fedmllm.runs.fingerprint import differences
from fedmllm.runs.inputs import Inputs, device, heading, versions
from fedmllm.runs.methods import METHODS
from fedmllm.runs.record import Record, Sink, read
from fedmllm.runs.session import CHECKPOINTS, Session

SUMMARY = "summary.json"
RECORD = "record.jsonl"


def run(
    experiment: Experiment, out: str | Path | None = None, sinks: Sequence[Sink] = (), resume: bool = False
) -> list[dict[str, Any]]:
    """Run one experiment; write `record.jsonl`, `checkpoints/`, `adapter/` and `summary.json` into `out` (default runs/RUN_ID).

    Returns the rows of the summary. With `resume` a run that was stopped in `out`, in whatever way, goes on from its last
    checkpoint and ends with the bytes of one that was never stopped; one that had ended is left as it is; and a folder
    without a run gets a new one.

    Raises FedmllmError with a message for a user; whatever stops a run, also Ctrl-C, is the record's last line.
    ConfigError where `resume` is asked for and the settings, rows or base model are not those that the run began with.
    """
    folder = Path(out or Path("runs") / experiment.run_id())
    record = Record(folder / RECORD)
    everyone: tuple[Sink, ...] = (record, *sinks)
    with contextlib.closing(record):
        if record.num_bytes() and not resume and begun(folder):
            raise FedmllmError(
                f"{folder / RECORD} exists; --resume goes on with that run; or choose another --out, or delete the folder"
            )
        if resume:
            refuse_other_settings(folder, experiment)
            if rows := finished(folder):
                return rows
        try:
            return attempt(experiment, folder, record, sinks)
        except BaseException as error:
            for sink in everyone:
                with contextlib.suppress(Exception):  # a full disk, a closed pipe: the error at hand is what matters
                    sink({"event": "stopped", "reason": f"{type(error).__name__}: {error}"})
            raise


def begun(folder: Path) -> bool:
    """False where a run was stopped before its first line, by an error in its input: nothing is lost by a new one."""
    first = next(read(folder / RECORD), {})
    return bool(first.get("event") != "stopped")


def attempt(experiment: Experiment, folder: Path, record: Record, sinks: Sequence[Sink]) -> list[dict[str, Any]]:
    """From the last checkpoint, if there is one, to the summary."""
    reset_peaks()
    inputs = Inputs.load(experiment)
    at = last_checkpoint(folder, inputs)
    record.truncate(at.run_state.record_bytes if at else 0)
    session = Session(inputs, folder, record, sinks, at)
    head = {"event": "experiment", **heading(inputs)}
    if not at:  # a record that goes on has it already
        record(head)
    for sink in sinks:
        sink(head)
    if at:
        before = {"versions": at.run_state.versions, "device": at.run_state.device}
        now: dict[str, Any] = {"versions": versions(), "device": device(inputs.backbone)}
        changed = differences(before, now)  # where there is anything, the last bits of what follows may be others
        session.emit(
            "resumed", round=at.run_state.round, num_rounds_done=at.run_state.totals.num_rounds, **now, changed=changed
        )
    elif empty := [shard.client for shard in inputs.shards if not shard.rows]:
        session.emit("empty_clients", clients=empty, note="these clients hold no row and are never asked")
    try:
        rows = METHODS[experiment.method](session)
    finally:
        session.close()
    session.emit("end", num_rows=len(rows))
    write_atomically(folder / SUMMARY, json.dumps({"rows": rows}, indent=1))
    return rows


def finished(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run that has ended; [] of any other. Raises FedmllmError where its summary is not one of ours."""
    path = folder / SUMMARY
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_bytes())["rows"]
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise ValueError("no rows")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FedmllmError(
            f"{path}: not a summary ({type(error).__name__}: {error}); delete it to end the run anew"
        ) from None
    return list(rows)


def refuse_other_settings(folder: Path, experiment: Experiment) -> None:
    """Raise ConfigError naming every setting that differs from those of the run in `folder`, if there is one."""
    place = checkpoint.newest(folder / CHECKPOINTS)
    if place:
        before = checkpoint.read_run_state(place).settings
    else:  # stopped before its first checkpoint: the record's first line says what it was
        first = next(read(folder / RECORD), {})
        if not first and (folder / SUMMARY).exists():
            raise FedmllmError(f"{folder / SUMMARY}: {RECORD} does not say what it is of; choose another --out")
        if first.get("event") != "experiment":
            return
        settings = first.get("settings")
        if not isinstance(settings, dict):
            raise FedmllmError(
                f"{folder / RECORD}:1: no settings in it, so it cannot be continued; choose another --out"
            )
        before = Experiment.parse(settings, str(folder / RECORD)).identity()
    if odd := differences(before, experiment.identity()):
        raise ConfigError(f"{folder}: cannot be resumed with other settings: {'; '.join(odd)}. Choose another --out")


def last_checkpoint(folder: Path, inputs: Inputs) -> Checkpoint | None:
    """The checkpoint to go on from; None = from the beginning. Raises ConfigError where rows or base model differ."""
    place = checkpoint.newest(folder / CHECKPOINTS)
    if not place:
        return None
    at = checkpoint.read(place, inputs.start, inputs.experiment.server().init(inputs.start))
    if odd := differences(at.run_state.digests, inputs.digests):
        raise ConfigError(
            f"{folder}: cannot be resumed: the digest of its {'; of its '.join(odd)}. Choose another --out"
        )
    return at
