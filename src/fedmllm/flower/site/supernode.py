"""Flower's SuperNode as a child process of a site.

It fetches and sends messages, and is restarted when it dies. Its parent connects to it over TLS on loopback, with a
certificate and a secret of this start: another user of the machine can neither fetch the SuperNode's messages nor
impersonate it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient

from fedmllm.flower.keys import CA, CA_KEY, SERVER, SERVER_KEY, make_authority
from fedmllm.flower.processes import die_with_parent, environment, free_port, patched
from fedmllm.flower.site.config import Site

RESTART_S, LONGEST_PAUSE_S = 5.0, 20.0  # before a restart: the first one, and after many
REJECTED = "Failed to activate SuperNode"  # Flower's words for an unknown key and for one that is connected already
KEY_REJECTED = (
    " The key is not registered at the server (send site.key.pub to its operator for `fedmllm server add`), or it was removed"
    " there, or another process is connected with it, also one that was killed within the last minute."
)
HOST = "127.0.0.1"


class SuperNode:
    """A running SuperNode, and clients of its run-time API.

    Args:
        site: Its own file.
        state: Folder for the log and for the keys of this start.
        say: Called with each line for the operator.
    """

    def __init__(self, site: Site, state: Path, say: Callable[[str], None]) -> None:
        self._site, self._state, self._say = site, state, say
        self._runtime, self._secret = state / "runtime", secrets.token_hex(32).encode()
        shutil.rmtree(self._runtime, ignore_errors=True)
        make_authority(self._runtime, [HOST])
        (self._runtime / CA_KEY).unlink()  # no further certificate is signed
        self._ca = (self._runtime / CA).read_bytes()
        secret = os.open(self._runtime / "secret", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(secret, "wb") as file:  # noqa: PTH123
            file.write(self._secret)
        self._started, self._pause = 0.0, RESTART_S / 2
        self._ended: float | None = None
        self.start()

    def start(self) -> None:
        """Start the process on a free port."""
        self.port = free_port()
        r = self._runtime
        command = [
            *patched("flower-supernode"), "--superlink", self._site.server, "--root-certificates", str(self._site.ca),
            "--auth-supernode-private-key", str(self._site.key), "--isolation", "process",
            "--host", HOST, "--port", str(self.port), "--superexec-auth-secret-file", str(r / "secret"),
            "--ssl-certfile", str(r / SERVER), "--ssl-keyfile", str(r / SERVER_KEY), "--ssl-ca-certfile", str(r / CA),
        ]  # fmt: skip
        env = environment(self._state / "flwr")
        with (self._state / "supernode.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, preexec_fn=die_with_parent)
        self._started, self._ended = time.monotonic(), None

    def keep_alive(self) -> bool:
        """Restart the process if it has died, after a pause that grows while it keeps dying.

        Returns:
            Whether it was alive; otherwise its port may have changed.
        """
        if self.process.poll() is None:
            return True
        if self._ended is None:
            self._ended, lived = time.monotonic(), time.monotonic() - self._started
            self._pause = RESTART_S if lived > LONGEST_PAUSE_S else min(2 * self._pause, LONGEST_PAUSE_S)
            said = reason((self._state / "supernode.log").read_bytes()[-4000:].decode(errors="replace"))
            what = f"exit status {self.process.returncode}{f': {said}' if said else ''}"
            self._say(f"the SuperNode ended ({what}); restarting it in {self._pause:.0f} s")
        if time.monotonic() - self._ended > self._pause:
            self.start()
        return False

    def client(self, token: str = "") -> RuntimeHttpClient:
        """A client of the run-time API.

        Args:
            token: Of the task to serve; "" = for acquiring tasks.
        """
        methods = frozenset({"/flwr.proto.Runtime/AcquireTask"})
        key = (
            RuntimeTokenHttpInterceptor(token) if token else
            SuperExecAuthHttpInterceptor(master_secret=self._secret, protected_methods=methods)
        )  # fmt: skip
        version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
        return RuntimeHttpClient.from_server_address(
            f"{HOST}:{self.port}", insecure=False, root_certificates=self._ca, interceptors=[version, key]
        )


def reason(log: str) -> str:
    """The last error of a SuperNode's log.

    Args:
        log: Its end.

    Returns:
        One line, with the fix if Flower rejected the key; "" without an error.
    """
    _, found, tail = log.rpartition("ERROR")
    if not found:
        return ""
    said = " ".join(tail.partition("For more information")[0].replace("\x1b[0m:", "").split())[:300]
    if REJECTED in said:
        said += KEY_REJECTED
    return said
