"""Record of a run: its events as JSON lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from fedmllm.core.errors import FedmllmError
from fedmllm.runs.append import AppendFile
from fedmllm.runs.events import Event, renamed

Line: TypeAlias = dict[str, Any]  # an event as it stands in a record, under the present names of its keys


class Record(AppendFile):
    """`record.jsonl` in a run's folder. Each line is written at once, so a stopped run leaves a readable file.

    Raises:
        FedmllmError: The file cannot be written, or another process is writing it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not _lock(self.fileno()):
            self.close()
            raise FedmllmError(f"{path}: another run is writing it; wait for that one, or choose another --out")

    def __call__(self, event: Event) -> None:
        """Append an event with the time."""
        line = json.dumps({**event.to_json(), "time": round(time.time(), 3)}, default=str, allow_nan=False)
        self.append(line.encode() + b"\n")

    def truncate(self, num_bytes: int) -> None:
        """Cut the file after the first `num_bytes` bytes, which must be whole lines.

        Raises:
            FedmllmError: The file is shorter than that, or no line ends there.
        """
        with self.path.open("rb") as file:
            file.seek(max(0, num_bytes - 1))
            if 0 < num_bytes <= self.num_bytes() and file.read(1) != b"\n":
                raise FedmllmError(
                    f"{self.path}: was replaced since the checkpoint was written, so it cannot be continued"
                )
        super().truncate(num_bytes)


def recorded_threads(path: Path) -> int:
    """Return the threads with which a run started; 0 if its record cannot be read or does not hold them."""
    try:
        device = next(read(path), {}).get("device")
    except FedmllmError:  # no record, or a damaged one, which the run itself reports
        return 0
    return int(device.get("threads", 0)) if isinstance(device, dict) else 0


def _lock(descriptor: int) -> bool:
    """Lock the file for this process; the lock ends with the process. False if another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs in one folder are not detected
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def finite(value: float | None) -> float | None:
    """Return the value, or None if it is NaN or infinite: JSON has neither."""
    return value if value is None or math.isfinite(value) else None


def read(path: Path) -> Iterator[Line]:
    """Yield the lines of a record. A half-written last line, left by a kill, is skipped.

    Raises:
        FedmllmError: The file cannot be read, or another line is not an event.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise FedmllmError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or too deep
            if number == len(lines):
                return
            raise FedmllmError(f"{path}:{number}: not a JSON line: {error}") from None
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            raise FedmllmError(f"{path}:{number}: not an event: {line[:80]!r}")
        yield renamed(event)
