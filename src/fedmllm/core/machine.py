"""Cores and memory that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
SELF = Path("/proc/self/cgroup")


def usable_cores(cgroup: Path = CGROUP, own: Path = SELF) -> int:
    """Return the cores of this process: its CPU affinity, at most the quota of its control groups, at least 1.

    A quota is rounded down: with more threads than it has cores, each waits for one that is throttled.

    Args:
        cgroup: Where control groups are mounted.
        own: The control groups of this process, as in /proc/self/cgroup.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cores, *_quotas(cgroup, own)])))


def usable_bytes(cgroup: Path = CGROUP, own: Path = SELF) -> int:
    """Return the memory of this process in bytes: the machine's, at most the limit of its control groups.

    Args:
        cgroup: Where control groups are mounted.
        own: The control groups of this process, as in /proc/self/cgroup.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_number(folder / "memory.max") for folder in _folders("", cgroup, own)]
    limits += [_number(folder / "memory.limit_in_bytes") for folder in _folders("memory", cgroup, own)]
    return min([physical, *(limit for limit in limits if limit is not None and limit > 0)])


def default_threads(num_processes: int = 1, cores: int | None = None) -> int:
    """Return the threads of each of several processes: the usable cores divided by them, or 1 on a busy machine.

    Threads of a matrix product wait for the slowest: on a busy machine, two threads on two cores take 5 to 15 times as
    long as one.

    Args:
        num_processes: Processes that compute side by side.
        cores: Cores for all of them; by default `usable_cores()`.
    """
    cores = usable_cores() if cores is None else cores
    return 1 if _load() >= cores else max(1, cores // num_processes)


def _load() -> float:
    """Processes that ran or waited for a core, as a mean over the last minute; 0 if the system does not count them."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


def _quotas(cgroup: Path, own: Path) -> Iterator[float]:
    """Cores of each control group that has a quota."""
    for folder in _folders("", cgroup, own):  # "QUOTA PERIOD" in microseconds, or "max PERIOD"
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)
    for folder in _folders("cpu", cgroup, own):  # a quota of -1 is none
        v1_quota, v1_period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if v1_quota and v1_period and v1_quota > 0:
            yield v1_quota / v1_period


def _folders(controller: str, cgroup: Path, own: Path) -> Iterator[Path]:
    """Folders of this process's control group and of those above it, each of which can limit it.

    In a container the path may be that of the host. Its folders do not exist here, and the mount is the container's group.

    Args:
        controller: Name of a controller of version 1; "" = version 2, whose line in `own` has none.
    """
    for line in _text(own).splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if controller not in names.split(","):
            continue
        mounts = [cgroup / names, cgroup / controller] if controller else [cgroup, cgroup / "unified"]
        for mount in dict.fromkeys(mounts):
            group = mount / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _number(path: Path) -> int | None:
    """The file's number; None if there is no file, or another word such as "max"."""
    text = _text(path)
    return int(text) if text.removeprefix("-").isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
