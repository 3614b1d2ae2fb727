"""Cost of a checkpoint: seconds that a round waits for it, and seconds until it is on the disk.

python benchmarks/checkpoint.py > results/checkpoint.md
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe

from fedmllm import Experiment
from fedmllm.algorithms.server_optimizers import FedAdam
from fedmllm.cli.quickstart import QUICKSTART_SUITE
from fedmllm.core.tensors import num_bytes
from fedmllm.runs.checkpoint import Checkpoints, RunState
from fedmllm.runs.checkpointer import Checkpointer
from fedmllm.runs.costs import Totals
from fedmllm.runs.events import Event, RoundEnd
from fedmllm.runs.run import run

BASE: dict[str, Any] = tomllib.loads(QUICKSTART_SUITE.read_text(encoding="utf-8"))["base"]
REPEATS = 9


def adapter(megabytes: float) -> dict[str, torch.Tensor]:
    """As many LoRA pairs of rank 8 on width 3584 as fill it: 28 layers x 4 projections are 22 MB and more."""
    pairs = max(1, round(megabytes * 1e6 / (2 * 8 * 3584 * 4)))
    names = [
        f"base_model.model.layers.{i // 4}.self_attn.p{i % 4}.lora_{ab}.weight" for i in range(pairs) for ab in "AB"
    ]
    return {name: torch.randn(8, 3584) if name.endswith("A.weight") else torch.randn(3584, 8) for name in names}


def run_state(number: int) -> RunState:
    empty: dict[str, Any] = {"client": None, "results": (), "best": None, "settings": {}, "digests": {}, "versions": {}}
    totals = Totals(num_rounds=number)
    return RunState(round=number, totals=totals, wall_s=0.0, record_bytes=0, **empty)


def payload(megabytes: float, folder: Path) -> str:
    """Milliseconds: handed over; on the disk."""
    params = adapter(megabytes)
    state = FedAdam().init(params)
    checkpoints = Checkpoints(folder, 2, b"{}", lambda: None)
    handed, written = [], []
    for number in range(1, REPEATS + 1):
        began = time.perf_counter()
        checkpoints.save(run_state(number), params, state)
        handed.append(1e3 * (time.perf_counter() - began))
        checkpoints.wait()
        written.append(1e3 * (time.perf_counter() - began))
    checkpoints.close()
    whole = num_bytes(params) + sum(num_bytes(tree) for tree in state.values())
    middle = statistics.median
    return (
        f"| {num_bytes(params) / 1e6:.1f} | {whole / 1e6:.1f} | {middle(handed):.1f} | {middle(written):.0f} | "
        f"{max(written):.0f} |"
    )


def rounds(folder: Path) -> list[tuple[float, float]]:
    """Of each round of the quickstart's federation, milliseconds from one event to the next: passed; of all threads' work."""
    times: list[tuple[float, float]] = []

    def sink(event: Event) -> None:
        if isinstance(event, RoundEnd):
            times.append((1e3 * time.perf_counter(), 1e3 * time.process_time()))

    table = {**BASE, "aggregator": "fedadam", "checkpoint": {"every": 1}, "num_rounds": 8}
    run(Experiment.parse(table), folder, [sink])
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(times)]


def timed(owner: type, name: str, clock: Callable[[], float], into: list[float]) -> None:
    """Note the milliseconds of each call of a method."""
    method = getattr(owner, name)

    def instead(*arguments: Any) -> None:
        began = clock()
        method(*arguments)
        into.append(1e3 * (clock() - began))

    setattr(owner, name, instead)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    num_runs = parser.parse_args().runs
    print(f"# Checkpoints\n\n`python benchmarks/checkpoint.py`\n\nMachine: {describe()}.")
    print(f"Shared: {os.getloadavg()[0]:.0f} processes wanted to run when it began.\n")
    print("FedAdam: the adapter and two moments as large as it.\n")
    print(
        "| adapter MB | written MB | round waits, ms (median) | on the disk, ms (median) | slowest, ms |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for megabytes in (0.2, 5.0, 22.0):
            print(payload(megabytes, Path(folder) / str(megabytes)), flush=True)
        waits: list[float] = []
        work: list[float] = []
        timed(Checkpointer, "save", time.perf_counter, waits)
        timed(Checkpoints, "_write", time.thread_time, work)
        each = [times for number in range(num_runs) for times in rounds(Path(folder) / f"run-{number}")]
    passed, cpu, wait, writing = (statistics.median(v) for v in (*zip(*each, strict=True), waits, work))
    print(
        f"\nRounds of the quickstart (tiny backbone, FedAdam, a checkpoint each), medians of {num_runs} runs of 8 rounds:\n"
    )
    print(
        "| ms a round | ms that it waits for a checkpoint | share | CPU ms a round | CPU ms of its checkpoint | share |"
    )
    print("|---|---|---|---|---|---|")
    print(f"| {passed:.0f} | {wait:.1f} | {wait / passed:.2%} | {cpu:.0f} | {writing:.1f} | {writing / cpu:.2%} |")


if __name__ == "__main__":
    main()
