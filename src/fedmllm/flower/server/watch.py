"""Whether a run of a real federation goes on: what SuperLink says of it, and where it says nothing, the run's record."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from pathlib import Path

from fedmllm.core.errors import FedmllmError

STATUS_S = 5.0  # between two questions to SuperLink how a run is
SILENT_S = 120.0  # without an answer of SuperLink or a sign of the run, until the run counts as lost
PENDING_S = 300.0  # for SuperLink to begin a run


class Watch:
    """Whether a run has ended. It lives while it holds its record; only where it does not is SuperLink asked, which is dear."""

    def __init__(self, ask: Callable[[str], tuple[str, str]], run_id: str, record: Path) -> None:
        self._ask, self._run_id, self._record = ask, run_id, record
        self.status, self.details = "running", ""
        self._began = self._heard = time.monotonic()
        self._check, self._wrote = self._began + STATUS_S, False

    def ended(self) -> bool:
        """Raises FedmllmError where SuperLink never begins the run."""
        now = time.monotonic()
        if self._record.exists() and is_written(self._record):
            self._heard, self._wrote = now, True
            return False
        if now > self._check:
            self.status, self.details = self._ask(self._run_id)
            self._check = time.monotonic() + STATUS_S
        if (
            self.status == "unreachable"
        ):  # it may just be busy; but a run that held its record and does so no more is gone
            return self._wrote or now - self._heard > SILENT_S
        self._heard = now
        if self.status in ("pending", "starting") and now - self._began > PENDING_S:
            raise FedmllmError(
                f"SuperLink has not begun run {self._run_id} for {PENDING_S:.0f} s; start `fedmllm server start` anew"
            )
        return self.status.startswith("finished")


def is_written(record: Path) -> bool:
    """Whether a run holds the lock of this record, which ends with its process."""
    with record.open("ab") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
