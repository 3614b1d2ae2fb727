"""Changes to internals of Flower and Ray, each with its reason.

They fit the version that `check_installed` requires, and none other. Functions import what they change, so that a process
loads only what it uses. `python -m fedmllm.flower.patches flower-supernode|flower-superexec ARGUMENTS` runs one of Flower's
programs with the changes that it needs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fedmllm.core.errors import FedmllmError

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

FLWR = "1.41"  # minor version; pyproject.toml has the same bound
INSTALL = "pip install 'fedmllm[flower]'"
PROGRAMS = {"flower-supernode": "flwr.supernode.cli", "flower-superexec": "flwr.supercore.cli"}
PULL_S, PULL_FIRST_S, PULL_CAP_S = 600.0, 0.05, 0.5  # for a message's objects: in total, first pause, longest pause
NEXT_S, ROUND_S = 0.2, 15.0  # between a SuperNode's looks for a message, and for how long after a reply
# Set before ray is imported: actors get a plain environment, and Ray keeps the devices that the user made visible.
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": without a cluster Ray stays on loopback


def check_installed(*packages: str) -> None:
    """Check the optional packages before any of them is imported.

    Args:
        packages: Import names. For "flwr" the version is checked too, because this module depends on it.

    Raises:
        FedmllmError: A package is missing, or flwr has another version than `FLWR`.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise FedmllmError(f"{' and '.join(missing)} not installed; real sites and simulations need it: {INSTALL}")
    if "flwr" in packages and not (found := importlib.metadata.version("flwr")).startswith(f"{FLWR}."):
        raise FedmllmError(f"flwr: got version {found}; its internals are used as in {FLWR}: {INSTALL}")


def retry_server_errors() -> None:
    """Make Flower's HTTP clients of this process retry a 500 as they retry a 503.

    SuperLink answers 500 while its database is locked, which lasts for seconds on a busy machine. Flower's programs would end.
    """
    import httpx
    from flwr.supercore.retry import http_retry

    http_retry._RETRYABLE_STATUS_CODES = http_retry._RETRYABLE_STATUS_CODES | {httpx.codes.INTERNAL_SERVER_ERROR}


def retried_heartbeat(send: Callable[[], bool]) -> Callable[[], bool]:
    """A heartbeat that fails on a server error, and is sent again, instead of raising, which ends all heartbeats."""
    import httpx

    def beat() -> bool:
        try:
            return send()
        except httpx.HTTPStatusError as error:
            if error.response.is_server_error:
                return False
            raise

    return beat


def pull_replies_often() -> None:
    """Look for the parts of a reply every half second, ten minutes at most.

    A reply is announced before its parts are stored. Flower looks for them after 1, 2, 4, ... s, for up to two hours.
    """
    from flwr.superlink.grid import http_grid

    http_grid.pull_objects = partial(
        http_grid.pull_objects,
        max_time=PULL_S,
        max_tries_per_object=None,
        initial_backoff=PULL_FIRST_S,
        backoff_cap=PULL_CAP_S,
    )


def look_for_messages_often() -> None:
    """Let a SuperNode look for the next message every `NEXT_S` s during a round: for `ROUND_S` s after each reply.

    Flower looks every 3 s. A secure sum with shares is four messages to each site, so that was most of its time.
    """
    from flwr.supernode import start_client_internal as node

    push, replied = node._push_messages, -ROUND_S

    def pushed(**given: Any) -> None:
        nonlocal replied
        push(**given)
        replied = time.monotonic()

    def sleep(seconds: float) -> None:
        soon = time.monotonic() - replied < ROUND_S
        time.sleep(min(seconds, NEXT_S) if soon else seconds)

    node._push_messages = pushed
    node.time = SimpleNamespace(sleep=sleep)  # all that the module uses of it


def limit_retries(grid: Grid, seconds: float) -> None:
    """Bound the retries of a ServerApp's grid, which have no end: its threads would outlive a SuperLink that was killed."""
    grid._retry_invoker.max_time = seconds


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message that was assembled from objects its id, which is not among them."""
    message.metadata.__dict__["_message_id"] = message_id


def prepare_ray() -> None:
    """Set the environment for Ray. Call it before `flwr.simulation` or `ray` is imported for the first time.

    Without a cluster (RAY_ADDRESS) Ray would listen on all interfaces, whatever address it is given.
    """
    for name, value in RAY.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault(LOOPBACK, "0")


def keep_ray_on_loopback() -> None:
    """Apply `LOOPBACK` also if somebody imported ray before `prepare_ray` was called."""
    from ray._private import ray_constants

    if os.environ.get(LOOPBACK) == "0":
        ray_constants.ENABLE_RAY_CLUSTER = False


def ray_is_connected() -> bool:
    """Return whether this process has a Ray worker; its creation replaces the handler of SIGTERM."""
    import ray

    return bool(ray.is_initialized())


def restore_sigterm() -> None:
    """Install Python's handler of SIGTERM again; Ray's native one prints a C++ stack and aborts with status 134."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def call_before_threads_are_joined(function: Callable[[], None]) -> None:
    """Call `function` when the interpreter ends, before it waits for threads; `atexit` runs after that, too late for Ray's."""
    threading._register_atexit(function)  # type: ignore[attr-defined]


def main() -> None:
    """Run the program of Flower that the first argument names."""
    from flwr.supernode import fleet_http_connection

    name, sys.argv = sys.argv[1], sys.argv[1:]
    retry_server_errors()
    look_for_messages_often()
    sender = fleet_http_connection.HeartbeatSender
    fleet_http_connection.HeartbeatSender = lambda send: sender(retried_heartbeat(send))
    sys.exit(getattr(importlib.import_module(PROGRAMS[name]), name.replace("-", "_"))())


if __name__ == "__main__":
    main()
