"""Child processes of Flower's programs, which end with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from fedmllm.core.errors import FedmllmError
from fedmllm.flower.patches import INSTALL

PR_SET_PDEATHSIG = 1  # linux/prctl.h
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}


def quiet_environment() -> dict[str, str]:
    """This process's environment without telemetry, update checks, installations at run time and model hub."""
    return {**os.environ, **QUIET}


def environment(home: Path) -> dict[str, str]:
    """The environment of Flower's programs.

    Args:
        home: Their own folder of settings (FLWR_HOME).

    Returns:
        `quiet_environment` with the programs' own PATH, and UTF-8 output: names of sites and Flower's messages are not ASCII.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return quiet_environment() | {"FLWR_HOME": str(home), "PATH": path, "PYTHONIOENCODING": "utf-8"}


def binary(name: str) -> str:
    """The path of a program of this Python environment.

    Raises:
        FedmllmError: Flower is not installed.
    """
    own = Path(sys.executable).with_name(name)
    found = str(own) if own.exists() else shutil.which(name)
    if not found:
        raise FedmllmError(f"{name} is not installed: {INSTALL}")
    return found


def patched(name: str) -> list[str]:
    """The first words of a command that runs one of Flower's programs with `flower.patches`."""
    return [sys.executable, "-m", "fedmllm.flower.patches", name]


def die_with_parent() -> None:
    """Let the kernel kill this child when its parent dies, also by SIGKILL. Call it between fork and exec. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def exclusive_lock(folder: Path) -> IO[str]:
    """Lock a site's state or a server's folder until the returned file is closed or this process ends.

    Raises:
        FedmllmError: Another process has the lock, or the folder cannot be written.
    """
    try:
        file = (folder / "lock").open("w")
    except OSError as error:
        raise FedmllmError(f"{folder / 'lock'}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise FedmllmError(f"{folder}: another process serves it already; stop that one first") from None
    return file


def is_dead(process: subprocess.Popen[Any]) -> bool:
    """Return whether a child has ended. It stays a zombie, so that its process id is not given to another process."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def stop(process: subprocess.Popen[Any], grace_s: float = 5.0) -> None:
    """End a child: SIGTERM, and SIGKILL after `grace_s` seconds."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    if process.poll() is None:
        process.kill()
        process.wait()
