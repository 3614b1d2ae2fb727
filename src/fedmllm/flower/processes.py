"""Flower's own programs as child processes that end with us. Loads no Flower."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from fedmllm.core.errors import FedmllmError
from fedmllm.flower.site.config import quiet_environment

PR_SET_PDEATHSIG = 1  # linux/prctl.h
INSTALL = "pip install 'fedmllm[flower]'"


def binary(name: str) -> str:
    """The program `name` of the environment that runs us. Raises FedmllmError where Flower is not installed."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise FedmllmError(f"{name} is not installed: {INSTALL}")
    return found


def patient(name: str) -> list[str]:
    """The beginning of a command that runs one of Flower's programs as `flower_patient` does."""
    return [sys.executable, "-m", "fedmllm.flower.patient", name]


def need(*packages: str) -> None:
    """Raise FedmllmError where an optional package is not installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise FedmllmError(f"{' and '.join(missing)} not installed, which real sites and simulations need: {INSTALL}")


def environment(home: Path) -> dict[str, str]:
    """For Flower's programs: nothing phones home, `home` is theirs alone, and they find each other."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return quiet_environment() | {"FLWR_HOME": str(home), "PATH": path}


def die_with_parent() -> None:
    """In a child before it becomes its program: Linux then ends it when its parent dies, also by -9. Elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def exclusive_lock(folder: Path) -> IO[str]:
    """The lock of a site's state or a server's folder, which ends with this process. FedmllmError where another has it."""
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise FedmllmError(f"{folder}: another process serves it already; stop that one first") from None
    return file


def is_dead(process: subprocess.Popen[Any]) -> bool:
    """Whether a child has ended, without taking its process id away from those who look for that."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def stop(process: subprocess.Popen[Any], grace_s: float = 5.0) -> None:
    """End a child: asked first, then made to."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    if process.poll() is None:
        process.kill()
        process.wait()
