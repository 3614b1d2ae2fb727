"""Record of a run: its events as JSON lines. Loads no torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import make_folder
from fedmllm.runs.events import Event, renamed

Line: TypeAlias = dict[str, Any]  # an event as it stands in a record, under the present names of its keys


class Record:
    """`record.jsonl` in a run's folder. Each line is written at once, so a stopped run leaves a readable file.

    Raises:
        FedmllmError: The file cannot be written, or another process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            make_folder(path.parent)
            self._file = path.open("ab")
        except OSError as error:
            raise FedmllmError(f"{path}: cannot be written: {error.strerror}") from error
        if not _lock(self._file.fileno()):
            self._file.close()
            raise FedmllmError(f"{path}: another run is writing it; wait for that one, or choose another --out")

    def __call__(self, event: Event) -> None:
        line = json.dumps({**event.to_json(), "time": round(time.time(), 3)}, default=str, allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise FedmllmError(f"{self.path}: cannot be written: {error.strerror}") from error

    def num_bytes(self) -> int:
        """Return the length of the file."""
        return os.fstat(self._file.fileno()).st_size

    def truncate(self, num_bytes: int) -> None:
        """Cut the file after the first `num_bytes` bytes: one operation of the file system, done or not done.

        Raises:
            FedmllmError: The file is not the one that had so many bytes.
        """
        if num_bytes > self.num_bytes():
            raise FedmllmError(
                f"{self.path}: has {self.num_bytes()} bytes, but had {num_bytes} when the checkpoint was written: "
                "it was cut or replaced since, so it cannot be continued"
            )
        with self.path.open("rb") as file:
            file.seek(max(0, num_bytes - 1))
            if num_bytes and file.read(1) != b"\n":
                raise FedmllmError(
                    f"{self.path}: was replaced since the checkpoint was written, so it cannot be continued"
                )
        self._file.truncate(num_bytes)

    def sync(self) -> None:
        """Wait until the file is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # a full disk was reported by the write that failed
            self._file.close()


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
