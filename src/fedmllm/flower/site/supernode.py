"""Flower's part of a site, which fetches and sends: a child process, started anew when it died.

The two talk over TLS on loopback, with a certificate and a secret of this start: another user of the machine can neither
take the SuperNode's messages nor pose as it.
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
from fedmllm.flower.processes import die_with_parent, environment, free_port, patient
from fedmllm.flower.site.config import Site

RESTART_S, LONGEST_PAUSE_S = 5.0, 20.0  # before another start, at first and where it keeps dying
NOT_LET_IN = "Failed to activate SuperNode"  # Flower's words where a key is connected already
HOST = "127.0.0.1"


class SuperNode:
    """A running SuperNode, and clients of its run-time API."""

    def __init__(self, site: Site, state: Path, say: Callable[[str], None]) -> None:
        self._site, self._state, self._say = site, state, say
        self._runtime, self._secret = state / "runtime", secrets.token_hex(32).encode()
        shutil.rmtree(self._runtime, ignore_errors=True)
        make_authority(self._runtime, [HOST])
        (self._runtime / CA_KEY).unlink()  # nobody signs anything more
        self._ca = (self._runtime / CA).read_bytes()
        secret = os.open(self._runtime / "secret", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(secret, "wb") as file:  # noqa: PTH123
            file.write(self._secret)
        self._started, self._pause = 0.0, RESTART_S / 2
        self._ended: float | None = None
        self.start()

    def start(self) -> None:
        self.port = free_port()
        r = self._runtime
        command = [
            *patient("flower-supernode"), "--superlink", self._site.server, "--root-certificates", str(self._site.ca),
            "--auth-supernode-private-key", str(self._site.key), "--isolation", "process",
            "--host", HOST, "--port", str(self.port), "--superexec-auth-secret-file", str(r / "secret"),
            "--ssl-certfile", str(r / SERVER), "--ssl-keyfile", str(r / SERVER_KEY), "--ssl-ca-certfile", str(r / CA),
        ]  # fmt: skip
        env = environment(self._state / "flwr")
        with (self._state / "supernode.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, preexec_fn=die_with_parent)
        self._started, self._ended = time.monotonic(), None

    def keep_alive(self) -> bool:
        """False where it had died; it is then started anew: at once where it had lived, ever more rarely where it had not."""
        if self.process.poll() is None:
            return True
        if self._ended is None:
            self._ended, lived = time.monotonic(), time.monotonic() - self._started
            self._pause = RESTART_S if lived > LONGEST_PAUSE_S else min(2 * self._pause, LONGEST_PAUSE_S)
            said = reason((self._state / "supernode.log").read_bytes()[-4000:].decode(errors="replace"))
            what = f"exit status {self.process.returncode}{f': {said}' if said else ''}"
            self._say(f"the SuperNode ended ({what}); starting it again in {self._pause:.0f} s")
        if time.monotonic() - self._ended > self._pause:
            self.start()
        return False

    def client(self, token: str = "") -> RuntimeHttpClient:
        """Of its run-time API: to take a task, or, with the task's token, to serve it."""
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
    """The last error of a SuperNode's log in one line, with ours where Flower's says too little; "" where there is none."""
    _, found, tail = log.rpartition("ERROR")
    if not found:
        return ""
    said = " ".join(tail.partition("For more information")[0].replace("\x1b[0m:", "").split())[:300]
    if NOT_LET_IN in said:
        said += " Its key is connected already: by another process, or by one that was killed within the last minute."
    return said
