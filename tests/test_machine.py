"""Cores and memory are those of the process: its affinity and control groups, and the load of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedmllm.cli.threads import num_threads
from fedmllm.core import machine
from fedmllm.core.machine import default_threads, usable_bytes, usable_cores
from fedmllm.runs.record import recorded_threads


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.0, 0.0))
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)


def groups(root: Path, own: str, **files: str) -> tuple[Path, Path]:
    """(mount of control groups, /proc/self/cgroup); keys are paths with __ for / and _DOT_ for a dot."""
    for name, text in files.items():
        path = root / "cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (root / "self").write_text(f"{own}\n")
    return root / "cgroup", root / "self"


def test_version_2_the_smallest_limit_of_the_group_and_those_above_it_counts(tmp_path: Path):
    at = groups(
        tmp_path,
        "0::/jobs/mine",
        cpu_DOT_max="max 100000",
        jobs__cpu_DOT_max="350000 100000",
        jobs__mine__cpu_DOT_max="600000 100000",
        jobs__memory_DOT_max="3000000",
        jobs__mine__memory_DOT_max="max",
    )
    assert (usable_cores(*at), usable_bytes(*at)) == (3, 3_000_000)  # 3.5 cores, rounded down


def test_version_1_has_a_folder_for_each_controller(tmp_path: Path):
    own = "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n3:cpuset:/\n0::/"
    at = groups(
        tmp_path,
        own,
        **{
            "cpu,cpuacct__docker__a__cpu_DOT_cfs_quota_us": "50000",
            "cpu,cpuacct__docker__a__cpu_DOT_cfs_period_us": "100000",
            "memory__memory_DOT_limit_in_bytes": "9223372036854771712",
            "memory__docker__a__memory_DOT_limit_in_bytes": "2000000",
        },
    )
    assert (usable_cores(*at), usable_bytes(*at)) == (1, 2_000_000)  # half a core is one thread


def test_in_a_container_the_path_is_of_the_host_and_the_mount_is_the_group(tmp_path: Path):
    at = groups(tmp_path, "0::/kubepods/pod1", cpu_DOT_max="200000 100000", memory_DOT_max="1000000")
    assert (usable_cores(*at), usable_bytes(*at)) == (2, 1_000_000)


@pytest.mark.parametrize("own", ["0::/", "1:cpu:/\n2:memory:/", "", "no line"])
def test_without_a_limit_they_are_those_of_the_affinity_and_the_machine(tmp_path: Path, own: str):
    at = groups(tmp_path, own, cpu__cpu_DOT_cfs_quota_us="-1", cpu__cpu_DOT_cfs_period_us="100000")
    assert (usable_cores(*at), usable_bytes(*at)) == (8, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    missing = tmp_path / "missing", tmp_path / "missing"
    assert usable_cores(*missing) == 8


def test_processes_share_the_cores_and_a_busy_machine_gets_one_thread(monkeypatch: pytest.MonkeyPatch):
    assert [default_threads(jobs) for jobs in (1, 3, 20)] == [8, 2, 1]
    monkeypatch.setattr(os, "getloadavg", lambda: (8.0, 0.0, 0.0))
    assert default_threads() == 1
    monkeypatch.delattr(os, "getloadavg")  # as on Windows
    assert default_threads() == 8


def test_an_option_wins_over_the_environment_and_that_over_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fedmllm.cli.threads.usable_cores", lambda: 8)
    record = tmp_path / "record.jsonl"
    record.write_text('{"event": "experiment", "device": {"threads": 3}}\n')
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert num_threads(7, [record], 1, 1) == 7
    assert num_threads(0, [record], 1, 1) == 5
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert num_threads(0, [tmp_path / "none", record], 1, 1) == 3
    assert num_threads(0, [record], 4, 2) == 2  # four processes of 3 threads do not fit into 8 cores


@pytest.mark.parametrize("text", ["", '{"event": "stopped"}\n', '{"event": "experiment", "device": "cpu"}\n', "x\ny\n"])
def test_a_record_without_threads_gives_none(tmp_path: Path, text: str):
    (tmp_path / "record.jsonl").write_text(text)
    assert recorded_threads(tmp_path / "record.jsonl") == 0
