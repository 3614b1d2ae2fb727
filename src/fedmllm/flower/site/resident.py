"""Parent's end of the resident trainer: start, requests, restart."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedmllm.flower.processes import quiet_environment, stop
from fedmllm.flower.site.config import Site
from fedmllm.flower.wire import REFUSED


class ResidentTrainer:
    """The trainer's process, connected by an anonymous socket pair.

    Args:
        site: Its own file.
        path: Of that file, which the trainer reads.
        imports: Plug-ins that it loads in addition to the file's own.
    """

    def __init__(self, site: Site, path: Path, imports: Sequence[str] = ()) -> None:
        self.site, self._path, self._imports = site, path, imports
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [
            sys.executable,
            "-m",
            "fedmllm.flower.site.trainer",
            str(theirs.fileno()),
            str(self._path),
            *self._imports,
        ]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=quiet_environment())
        theirs.close()
        self._link = Connection(ours.detach())

    def ask(self, head: dict[str, str], adapter: bytes) -> tuple[dict[str, Any], bytes]:
        """Send a request and wait for the reply. A trainer that dies or exceeds its time limit is restarted.

        Args:
            head: "request" and "manifest", as text.
            adapter: Raw float32.

        Returns:
            The reply's head, with `REFUSED` if there is no update, and the delta's raw float32.
        """
        with self._lock:
            if self.process.poll() is not None:
                self._restart()
            began, limit = time.monotonic(), self.site.task_timeout_s
            # Reads and writes of the socket have no time limit; killing the trainer ends them.
            watch = threading.Timer(limit, self.process.kill)
            watch.start()
            try:
                self._link.send_bytes(json.dumps(head).encode())
                self._link.send_bytes(adapter)
                return json.loads(self._link.recv_bytes()), self._link.recv_bytes()
            except (EOFError, OSError):
                slow = time.monotonic() - began >= limit
                what = f"took longer than {limit:g} s" if slow else f"died (exit status {self._exit_status()})"
                self._restart()
                return {REFUSED: f"site {self.site.name}: the trainer {what}; it was restarted"}, b""
            finally:
                watch.cancel()

    def _exit_status(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(2)
        return None

    def _restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        """End the trainer."""
        self._link.close()
        stop(self.process)
