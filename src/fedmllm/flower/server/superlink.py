"""The server's processes: SuperLink, the executor of ServerApps, and the gate."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable

from fedmllm.core.errors import FedmllmError
from fedmllm.flower.keys import CA, CA_KEY, SERVER, SERVER_KEY, refuse_open_key
from fedmllm.flower.processes import binary, die_with_parent, environment, exclusive_lock, is_dead, patched, stop
from fedmllm.flower.server.folder import CONNECTION, Server

SECRET = "executor-secret"
LOG = "superlink.log"
START_S = 60.0  # limit for the start of SuperLink
CHECK_S = 1.0  # between checks whether the processes live


def serve(server: Server, say: Callable[[str], None]) -> None:
    """Keep SuperLink, the executor and the gate running until interrupted; restart those that die, on the same database.

    Args:
        server: Its folder; it can be served by one process at a time.
        say: Called with each line for the operator.

    Raises:
        FedmllmError: Another process serves the folder, a key has an unsafe mode, or SuperLink does not start.
    """
    for key in (CA_KEY, SERVER_KEY):
        if (server.folder / key).exists():  # the authority's key may be kept in another place
            refuse_open_key(server.folder / key)
    with contextlib.closing(exclusive_lock(server.folder)), contextlib.ExitStack() as children:
        with open(os.open(server.folder / SECRET, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:  # noqa: PTH123
            file.write(secrets.token_hex(32).encode())
        _watch(server, say, children)


def _watch(server: Server, say: Callable[[str], None], children: contextlib.ExitStack) -> None:
    def stopped_at_end(child: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        children.callback(stop, child)
        return child

    listen = server.listen
    process, executor = stopped_at_end(start_superlink(server)), stopped_at_end(start_executor(server))
    gate = stopped_at_end(start_gate(server)) if listen.gate else None
    door = f"; sites reach {listen.gate}" if gate else ""
    say(f"SuperLink on {listen.host}:{listen.port}{door}; log: {server.folder / LOG}")
    while True:
        if process.poll() is not None:
            say(f"SuperLink died (exit status {process.returncode}); restarting it")
            process = stopped_at_end(start_superlink(server))
        if is_dead(executor):  # left as a zombie: its ServerApp ends when its process id is free
            say("the executor died; restarting it; the current run continues")
            executor = stopped_at_end(start_executor(server))
        if gate and gate.poll() is not None:
            say(f"the gate died (exit status {gate.returncode}); restarting it")
            gate = stopped_at_end(start_gate(server))
        time.sleep(CHECK_S)


def start_superlink(server: Server) -> subprocess.Popen[bytes]:
    """Start SuperLink, which ends with this process.

    Args:
        server: Its folder.

    Returns:
        The process, once it responds.

    Raises:
        FedmllmError: It does not respond within `START_S`.
    """
    f, listen = server.folder, server.listen
    command = [
        binary("flower-superlink"), "--host", listen.host, "--port", str(listen.port), "--ssl-ca-certfile", str(f / CA),
        "--ssl-certfile", str(f / SERVER), "--ssl-keyfile", str(f / SERVER_KEY),
        "--enable-supernode-auth", "--database", str(f / "state.db"), "--disable-runtime-dependency-installation",
        "--isolation", "process", "--superexec-auth-secret-file", str(f / SECRET),
    ]  # fmt: skip
    process = _child(server, command, LOG)
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(FedmllmError):
            server.flwr("list", "--limit", "1", CONNECTION)
            return process
        time.sleep(0.5)
    stop(process)
    raise FedmllmError(f"SuperLink did not start on port {listen.port}; see {f / LOG}")


def start_executor(server: Server) -> subprocess.Popen[bytes]:
    """Start the executor, which starts ServerApps.

    SuperLink would start one by itself, but does not restart it after a crash: no run would start any more.
    """
    command = [
        *patched("flower-superexec"), "--runtime-api-address", f"127.0.0.1:{server.listen.port}",
        "--root-certificates", str(server.folder / CA), "--superexec-auth-secret-file", str(server.folder / SECRET),
    ]  # fmt: skip
    return _child(server, command, LOG)


def start_gate(server: Server) -> subprocess.Popen[bytes]:
    """Start the gate, which sites connect to."""
    host, _, port = server.listen.gate.rpartition(":")
    module = [sys.executable, "-m", "fedmllm.flower.server.gate", str(server.folder)]
    return _child(server, [*module, host, port, str(server.listen.port)], "gate.log")


def _child(server: Server, command: list[str], log: str) -> subprocess.Popen[bytes]:
    f = server.folder
    with (f / log).open("ab") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, env=environment(f / "flwr"), cwd=f, preexec_fn=die_with_parent
        )
