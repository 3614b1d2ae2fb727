"""Cells of a suite over several devices: which process goes where, and which cell fits next to which.

No test has two cards. Devices are CPUs with made-up sizes, and the names of cards are followed up to the variables and
settings of a process.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError
from fedmllm.runs.record import read
from fedmllm.runs.run import run
from fedmllm.runs.suites.devices import CUDA_VISIBLE, CellMemory, Device, find_devices
from fedmllm.runs.suites.scheduler import CellState, Job, next_cell, run_suite
from fedmllm.runs.suites.suite import Cell, Suite
from fedmllm.runs.suites.worker import limit_device, placed

SMALL = """
[base]
data = { name = "synthetic-irony", num_train = 40, num_validation = 10, num_test = 12 }
partition = { name = "dirichlet", alpha = 5.0, num_clients = 3 }
train = { lr = 1e-3, batch_size = 4, accumulation = 1, max_steps = 2 }
num_rounds = 1
[matrix]
seeds = [0, 1]
[matrix.tokens]
"short" = {}
"long" = { backbone = { name = "tiny", max_tokens = 4000 } }
"""


def cells(tmp_path: Path) -> list[Cell]:
    (tmp_path / "suite.toml").write_text(SMALL)
    return list(Suite.load(tmp_path / "suite.toml").cells)


def idle(device: Device | None) -> Job:
    return Job(process=None, pipe=None, device=device)  # type: ignore[arg-type]


class Placement:
    """Records which device each cell ran on, and how many ran side by side on each."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}
        self.shares: dict[str, set[int]] = {}

    def update(self, state: CellState) -> None:
        busy: dict[str, int] = {}
        for job in state.jobs:
            if job.cell and job.device:
                self.of[job.cell.label] = job.device.name
                busy[job.device.name] = busy.get(job.device.name, 0) + job.shares
        for name, shares in busy.items():
            self.shares.setdefault(name, set()).add(shares)

    def finished(self, cell: Cell, seconds: float, error: str) -> None:
        assert not error, error


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv(CUDA_VISIBLE, raising=False)


def test_a_cell_takes_the_shares_that_hold_its_memory():
    device = Device("cuda:0", num_shares=4, num_bytes=80e9)
    assert [device.shares(gb * 1e9) for gb in (1, 20, 21, 40, 79, 500)] == [1, 1, 2, 2, 4, 4]
    assert device.shares(math.inf) == 4  # not known: alone
    assert Device("cuda:0", 4).shares(1e9) == 4  # the first cell shows how large the device is
    assert Device("cpu", 4, math.inf).shares(1e9) == 1  # the host's budget counts


def test_a_process_is_limited_to_its_shares_of_what_was_free(monkeypatch: pytest.MonkeyPatch):
    assert Device("cuda:0", num_shares=4, num_bytes=60e9).limit_bytes(2) == 30e9
    assert Device("cuda:0", 4).limit_bytes(4) == Device("cpu", 4, math.inf).limit_bytes(1) == 0
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    assert limit_device(30e9) == limit_device(0) == 60 * 10**9
    assert limits == [0.375, 1.0]  # 30 GB of 80, and no limit


def test_without_a_name_open_cells_are_spread_over_all_cards(two_cards: None):
    def found(device: str, jobs: int) -> list[tuple[str, int]]:
        backbone = {"name": "tiny", "device": device}
        experiment = Experiment.parse({"data": {"name": "synthetic-irony"}, "backbone": backbone})
        return [(d.name, d.num_shares) for d in find_devices([], [experiment], jobs)]

    assert found("auto", 0) == found("cuda", 2) == [("cuda:0", 1), ("cuda:1", 1)]
    assert found("auto", 3) == [("cuda:0", 2), ("cuda:1", 2)]
    assert found("auto", 1) == [("cuda:0", 1)]
    assert found("cuda:1", 2) == found("cpu", 2) == []  # the experiment names its own


def test_names_are_checked(two_cards: None):
    assert [d.name for d in find_devices(["cuda:1", "cuda", "cpu"], [], 0)] == ["cuda:1", "cuda:0", "cpu"]
    with pytest.raises(ConfigError, match=r"^--device: got 'cuda:2', but this machine has 2 CUDA devices"):
        find_devices(["cuda:2"], [], 0)
    with pytest.raises(ConfigError, match=r"^--device: got 'mps', which is not supported; allowed: 'auto', 'cpu'"):
        find_devices(["mps"], [], 0)


def test_cells_that_have_all_cards_are_not_placed(two_cards: None):
    def cell(devices: object, device: str) -> Experiment:
        engine, backbone = {"name": "stacked", "devices": devices}, {"name": "tiny", "device": device}
        return Experiment.parse({"data": {"name": "synthetic-irony"}, "engine": engine, "backbone": backbone})

    other = cell([], "auto")
    assert (
        find_devices([], [other, cell("all", "auto")], 0) == find_devices([], [cell("all", "cuda:1"), other], 1) == []
    )
    with pytest.raises(ConfigError, match=r"^--device: cells have engine\.devices"):
        find_devices(["cuda"], [other, cell("all", "auto")], 0)
    with pytest.raises(ConfigError, match=r"^--jobs: got 2; cells have engine\.devices = \['cuda:0', 'cuda:1'\]"):
        find_devices([], [cell(["cuda:0", "cuda:1"], "cuda")], 2)
    assert find_devices([], [cell(["cpu", "cpu"], "cpu")], 2) == []


def test_a_process_sees_its_card_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(CUDA_VISIBLE, raising=False)
    assert Device("cuda:1").environment() == {CUDA_VISIBLE: "1"}
    monkeypatch.setenv(CUDA_VISIBLE, "3, GPU-8f2a")  # the user's own choice is kept
    assert Device("cuda:1").environment() == {CUDA_VISIBLE: "GPU-8f2a"}
    assert Device("cpu").environment() == {}
    experiment = Experiment.parse({"data": {"name": "synthetic-irony"}})
    there = placed(experiment, "cuda")
    assert (there.backbone.device, there.run_id()) == ("cuda", experiment.run_id())
    assert placed(experiment, "") is experiment


def test_the_memory_of_a_cell_is_estimated_from_its_settings(tmp_path: Path):
    short, long = cells(tmp_path)[:2]
    memory = CellMemory()
    assert 2e9 < memory.needed_bytes(short.experiment) < memory.needed_bytes(long.experiment) < 20e9
    lost = Experiment.parse(
        {"data": {"name": "synthetic-irony"}, "backbone": {"name": "hf", "path": str(tmp_path / "no")}}
    )
    assert memory.needed_bytes(lost) == math.inf


def test_a_cell_that_does_not_fit_waits_for_the_device_and_a_smaller_one_goes_first(tmp_path: Path):
    short, long = cells(tmp_path)[:2]
    memory = CellMemory()
    device = Device("cuda:0", 2, 2 * memory.needed_bytes(short.experiment) + 1e6)
    assert device.shares(memory.needed_bytes(long.experiment)) == 2
    first, second = idle(device), idle(device)
    state = CellState(waiting=[long, short], jobs=[first, second])
    first.cell, first.shares = short, 1
    assert next_cell(state, second) is short
    state.waiting = [long]
    assert next_cell(state, second) is None
    first.cell = None
    assert next_cell(state, second) is long
    assert second.shares == 2
    assert next_cell(CellState(waiting=[long]), idle(None)) is long


def test_cells_run_on_two_devices_with_the_results_of_one(tmp_path: Path):
    all_cells = cells(tmp_path)
    short, long = (CellMemory().needed_bytes(cell.experiment) for cell in all_cells[:2])
    small, large = Device("cpu:0", 1, short), Device("cpu:1", 2, short + long)
    seen = Placement()
    suite = Suite.load(tmp_path / "suite.toml")
    state = run_suite(suite, tmp_path / "out", 2, 1, 10**12, seen, devices=[small, large])
    assert (state.finished, state.failed) == (4, {})
    assert set(seen.of.values()) == {"cpu:0", "cpu:1"}
    for device in (small, large):
        assert max(seen.shares[device.name]) <= device.num_shares
    run(all_cells[0].experiment, tmp_path / "alone")
    ours, alone = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in (f"out/{all_cells[0].run_id}", "alone")
    )
    assert ours == alone


def test_the_command_replaces_the_device_of_cells(tmp_path: Path):
    from typer.testing import CliRunner

    from fedmllm.cli.main import app

    (tmp_path / "suite.toml").write_text(
        SMALL.replace("[base]", '[base]\nbackbone = { name = "tiny", device = "cuda" }').replace("[0, 1]", "[0]")
    )
    done = CliRunner().invoke(
        app,
        ["suite", str(tmp_path / "suite.toml"), "--out", str(tmp_path / "out"), "--device", "cpu", "--only", "short"],
    )
    assert done.exit_code == 0, done.output
    heads = [next(read(record), {}) for record in (tmp_path / "out").glob("*/record.jsonl")]
    assert [head["settings"]["backbone"]["device"] for head in heads] == ["cpu"]
