"""A site's process: Flower's SuperNode beside it, a resident trainer below it, and in between only what the site allows.

The SuperNode runs with `--isolation process`: it fetches messages and starts nothing. This process takes the messages from
it as Flower's own executor would, but never looks at the app that came with them: no code of the server runs at a site, no
process starts for a message, and the base model is loaded once. The two talk on loopback with a secret of this start.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedmllm.engines.flower_names import ABOUT, ADAPTER, FLAT, REFUSED
from fedmllm.engines.flower_processes import binary, die_with_parent, environment, free_port, stop
from fedmllm.sites import Site, quiet_environment

POLL_S = 0.2
RESTART_S = 5.0  # between two starts of a child that keeps dying


class ResidentTrainer:
    """The trainer's process: started by itself, started anew when it died, ended with the site."""

    def __init__(self, site: Site, path: Path) -> None:
        self._site, self._path = site, path
        self._lock = threading.Lock()
        self.num_starts = 0
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "fedmllm.engines.flower_trainer", str(theirs.fileno()), str(self._path)]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=quiet_environment())
        theirs.close()
        self._link = Connection(ours.detach())
        self.num_starts += 1

    def ask(self, head: dict[str, str], adapter: bytes) -> tuple[dict[str, Any], bytes]:
        """-> (what is said, the delta). A trainer that dies or hangs is a reason, and is replaced."""
        with self._lock:
            return self._ask(head, adapter)

    def _ask(self, head: dict[str, str], adapter: bytes) -> tuple[dict[str, Any], bytes]:
        if self.process.poll() is not None:
            self._restart()
        until = time.monotonic() + self._site.task_timeout_s
        try:
            self._link.send_bytes(json.dumps(head).encode())
            self._link.send_bytes(adapter)
            if not wait([self._link], timeout=max(0.0, until - time.monotonic())):
                raise TimeoutError
            return json.loads(self._link.recv_bytes()), self._link.recv_bytes()
        except (EOFError, OSError) as error:  # TimeoutError is one
            slow = isinstance(error, TimeoutError)
            code = "" if slow else f" (exit status {self._exit_status()})"
            self._restart()
            what = f"took longer than {self._site.task_timeout_s:g} s" if slow else f"died{code}"
            return {REFUSED: f"site {self._site.name}: the trainer {what}; it was started anew"}, b""

    def _exit_status(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(2)
        return None

    def _restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        self._link.close()
        stop(self.process)


class SuperNode:
    """Flower's part of a site, which fetches and sends; started anew when it died."""

    def __init__(self, site: Site, state: Path) -> None:
        self._site, self._state = site, state
        self._secret_file, self.secret = state / "runtime-secret", secrets.token_hex(32).encode()
        with open(os.open(self._secret_file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:  # noqa: PTH123
            file.write(self.secret)
        self.num_starts, self._started = 0, 0.0
        self.start()

    def start(self) -> None:
        self.port = free_port()
        command = [
            binary("flower-supernode"), "--superlink", self._site.server, "--root-certificates", str(self._site.ca),
            "--auth-supernode-private-key", str(self._site.key), "--isolation", "process",
            "--host", "127.0.0.1", "--port", str(self.port), "--superexec-auth-secret-file", str(self._secret_file),
        ]  # fmt: skip
        log = (self._state / "supernode.log").open("ab")
        env = environment(self._state / "flwr")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, preexec_fn=die_with_parent)
        log.close()
        self.num_starts, self._started = self.num_starts + 1, time.monotonic()

    def keep_alive(self) -> bool:
        """False where it had died; it is then started anew, but not more often than every RESTART_S."""
        if self.process.poll() is None:
            return True
        if time.monotonic() - self._started > RESTART_S:
            self.start()
        return False

    def client(self, token: str = "") -> RuntimeHttpClient:
        """Of its run-time API: to take a task, or, with the task's token, to serve it."""
        methods = frozenset({"/flwr.proto.Runtime/AcquireTask"})
        key = (
            RuntimeTokenHttpInterceptor(token) if token else
            SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods=methods)
        )  # fmt: skip
        version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
        return RuntimeHttpClient.from_server_address(
            f"127.0.0.1:{self.port}", insecure=True, root_certificates=None, interceptors=[version, key]
        )


def run_site(path: Path) -> None:
    """Serve the site of SITE.toml until SIGINT or SIGTERM. Children end with it, however it ends."""
    site = Site.load(path)
    state = path.absolute().parent / f"{path.stem}-state"
    state.mkdir(mode=0o700, exist_ok=True)
    signal.signal(signal.SIGTERM, _interrupt)
    trainer = ResidentTrainer(site, path)
    node = SuperNode(site, state)
    say(f"site {site.name}: serving {site.server}; log of the SuperNode: {state / 'supernode.log'}")
    try:
        for token in tasks(node):
            # A message of a run that died with its SuperLink has lost its content, and Flower looks for that for two hours:
            # every message has a thread of its own, so that the next one does not wait. The trainer takes one at a time.
            threading.Thread(target=serve_task, args=(node, token, trainer, site), daemon=True).start()
    except KeyboardInterrupt:
        say(f"site {site.name}: stopped")
    finally:
        stop(node.process)
        trainer.close()


def tasks(node: SuperNode) -> Iterator[str]:
    """The tokens of the tasks that the SuperNode holds for us, as they come; never ends by itself."""
    client = node.client()
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    while True:
        if not node.keep_alive():
            client = node.client()
        with contextlib.suppress(httpx.HTTPError):  # not up yet, or just died
            answer = client.AcquireTask(request)
            if answer.HasField("task") and answer.token:
                yield answer.token
                continue
        time.sleep(POLL_S)


def serve_task(node: SuperNode, token: str, trainer: ResidentTrainer, site: Site) -> None:
    """One message: from the SuperNode, through the trainer, back to the SuperNode. Flower's own errors cost the message."""
    client = node.client(token)
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    try:
        message, context, _, _ = pull_task_input(client)  # the app that came with it is not looked at
        content, said = answer(message, trainer)
        push_message(client, Message(content, reply_to=message), context)
        push_task_output(client, context, SubStatus.COMPLETED, "")
        say(f"site {site.name}: {said}")
    except Exception as error:  # the next message must find this process alive
        say(f"site {site.name}: a message was lost: {type(error).__name__}: {error}")
        push_task_output(client, None, SubStatus.FAILED, f"site {site.name}: {type(error).__name__}")
    finally:
        heartbeat.stop()
        client.close()


def answer(message: Message, trainer: ResidentTrainer) -> tuple[RecordDict, str]:
    """-> (the reply's content, a line for the site's own eyes)."""
    try:
        about, flat = message.content[ABOUT], message.content[ADAPTER][FLAT]
        head = {"request": str(about["request"]), "manifest": str(about["manifest"])}
        if flat.dtype != "float32":
            raise TypeError(f"the adapter came as {flat.dtype}")
        adapter = np.ascontiguousarray(flat.numpy()).tobytes()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return _refusal(f"request cannot be read: {type(error).__name__}: {error}")
    said, delta = trainer.ask(head, adapter)
    if REFUSED in said:
        return _refusal(said[REFUSED])
    line = f"trained on {said['num_examples']} rows in {said['busy_s']:.1f} s; sent {len(delta)} bytes, {said['metrics']}; "
    return reply_content(said, delta, head["manifest"]), f"{line}base loaded {said['num_loads']} time(s)"


def reply_content(said: dict[str, Any], delta: bytes, manifest: str) -> RecordDict:
    """All that leaves a site after a round: the delta, the row count, the metrics that the site allows."""
    words = {"manifest": manifest, "num_examples": said["num_examples"], "metrics": json.dumps(said["metrics"])}
    array = Array(np.frombuffer(delta, dtype=np.float32))
    return RecordDict({ADAPTER: ArrayRecord({FLAT: array}), ABOUT: ConfigRecord(words)})


def _refusal(reason: str) -> tuple[RecordDict, str]:
    return RecordDict({ABOUT: ConfigRecord({REFUSED: reason})}), reason


def say(line: str) -> None:
    """A line for the site's own people, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt(f"signal {signum}")
