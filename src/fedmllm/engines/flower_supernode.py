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

from fedmllm.engines.flower_keys import CA, CA_KEY, SERVER, SERVER_KEY, make_authority
from fedmllm.engines.flower_processes import binary, die_with_parent, environment, free_port
from fedmllm.sites import Site

RESTART_S = 5.0  # between two starts of one that keeps dying
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
        self._started = 0.0
        self.start()

    def start(self) -> None:
        self.port = free_port()
        r = self._runtime
        command = [
            binary("flower-supernode"), "--superlink", self._site.server, "--root-certificates", str(self._site.ca),
            "--auth-supernode-private-key", str(self._site.key), "--isolation", "process",
            "--host", HOST, "--port", str(self.port), "--superexec-auth-secret-file", str(r / "secret"),
            "--ssl-certfile", str(r / SERVER), "--ssl-keyfile", str(r / SERVER_KEY), "--ssl-ca-certfile", str(r / CA),
        ]  # fmt: skip
        env = environment(self._state / "flwr")
        with (self._state / "supernode.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, preexec_fn=die_with_parent)
        self._started = time.monotonic()

    def keep_alive(self) -> bool:
        """False where it had died; it is then started anew, but not more often than every RESTART_S."""
        if self.process.poll() is None:
            return True
        if time.monotonic() - self._started > RESTART_S:
            log = self._state / "supernode.log"
            last = next(
                (line for line in reversed(log.read_text(errors="replace")[-2000:].splitlines()) if line.strip()), ""
            )
            self._say(
                f"the SuperNode ended (exit status {self.process.returncode}): {last.strip()[:300]}; starting it again"
            )
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
