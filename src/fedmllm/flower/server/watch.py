"""Liveness of a run: the lock of its record, and SuperLink's status."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from pathlib import Path

from fedmllm.core.errors import FedmllmError

STATUS_S = 5.0  # between two queries of SuperLink
SILENT_S = 120.0  # without a response from SuperLink and a record: then the run counts as lost
PENDING_S = 300.0  # for SuperLink to start a run


class Watch:
    """Watcher of a run, which may end.

    A run is alive while it holds its record's lock; SuperLink is queried only otherwise, because the query is slow.

    Args:
        ask: Maps a run's id to its status and details, as `Server.status`.
        run_id: Flower's id of the run.
        record: The run's `record.jsonl`, which may not exist yet.
    """

    def __init__(self, ask: Callable[[str], tuple[str, str]], run_id: str, record: Path) -> None:
        self._ask, self._run_id, self._record = ask, run_id, record
        self.status, self.details = "running", ""
        self._began = self._heard = time.monotonic()
        self._check, self._wrote = self._began + STATUS_S, False

    def ended(self) -> bool:
        """Return whether the run has ended; `status` and `details` are then its last ones.

        Raises:
            FedmllmError: SuperLink has not started the run within `PENDING_S`.
        """
        now = time.monotonic()
        if self._record.exists() and is_written(self._record):
            self._heard, self._wrote = now, True
            return False
        if now > self._check:
            self.status, self.details = self._ask(self._run_id)
            self._check = time.monotonic() + STATUS_S
        if self.status == "unreachable":  # SuperLink may be busy; a run that released its lock has ended
            return self._wrote or now - self._heard > SILENT_S
        self._heard = now
        if self.status in ("pending", "starting") and now - self._began > PENDING_S:
            raise FedmllmError(
                f"SuperLink has not started run {self._run_id} within {PENDING_S:.0f} s; restart `fedmllm server start`"
            )
        return self.status.startswith("finished")


def is_written(record: Path) -> bool:
    """Return whether a running process has the lock of this record."""
    with record.open("ab") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
