"""What happened, as JSON lines; tables are readings of it. Loads no torch."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from fedmllm.types import FedmllmError

Event: TypeAlias = dict[str, Any]
Sink: TypeAlias = Callable[[Event], None]  # a record file, a progress bar, a tracker: all see the same events


class Record:
    """`record.jsonl` in a run's folder. A line is written whole and at once, so a stopped run leaves a readable file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        line = json.dumps({**event, "time": round(time.time(), 3)}, default=str, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def finite(value: float | None) -> float | None:
    """JSON has no NaN: a metric that is not a number is recorded as null."""
    return value if value is None or math.isfinite(value) else None


def read(path: Path) -> Iterator[Event]:
    """The events of a record. A half-written last line, left by a kill, is passed over; any other bad line is an error."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise FedmllmError(f"{path}:{number}: not a JSON line: {error}") from None


def write_atomically(path: Path, text: str) -> None:
    """All of `text` or none of it: a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
