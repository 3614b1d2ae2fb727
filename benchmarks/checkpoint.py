"""What a checkpoint costs: seconds that a round waits for it, and seconds until it is on the disk.

python benchmarks/checkpoint.py > results/checkpoint.md
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from machine import describe

from fedmllm import Experiment
from fedmllm.aggregators import FedAdam
from fedmllm.checkpoint import Book, Checkpoints
from fedmllm.quickstart import SUITE
from fedmllm.record import read
from fedmllm.running import Run
from fedmllm.runs import run
from fedmllm.tensors import num_bytes
from fedmllm.totals import Totals

BASE: dict[str, Any] = tomllib.loads(SUITE.read_text(encoding="utf-8"))["base"]
REPEATS = 9


def adapter(megabytes: float) -> dict[str, torch.Tensor]:
    """As many LoRA pairs of rank 8 on width 3584 as fill it: 28 layers x 4 projections are 22 MB and more."""
    pairs = max(1, round(megabytes * 1e6 / (2 * 8 * 3584 * 4)))
    names = [
        f"base_model.model.layers.{i // 4}.self_attn.p{i % 4}.lora_{ab}.weight" for i in range(pairs) for ab in "AB"
    ]
    return {name: torch.randn(8, 3584) if name.endswith("A.weight") else torch.randn(3584, 8) for name in names}


def book(number: int) -> Book:
    empty: dict[str, Any] = {"client": None, "results": (), "best": None, "settings": {}, "digests": {}, "versions": {}}
    totals = Totals(num_rounds=number)
    return Book(round=number, totals=totals, wall_s=0.0, record_bytes=0, **empty)


def payload(megabytes: float, folder: Path) -> str:
    """Milliseconds: handed over; on the disk."""
    params = adapter(megabytes)
    state = FedAdam().init(params)
    checkpoints = Checkpoints(folder, 2, b"{}", lambda: None)
    handed, written = [], []
    for number in range(1, REPEATS + 1):
        began = time.perf_counter()
        checkpoints.save(book(number), params, state)
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


def rounds(every: int, folder: Path, waits: list[float]) -> list[float]:
    """Milliseconds of each round of the quickstart's federation, from one line of the record to the next."""
    table = {**BASE, "aggregator": "fedadam", "checkpoint": {"every": every}, "num_rounds": 8}
    save = Run._save_checkpoint

    def timed(self: Run, *arguments: Any) -> None:
        began = time.perf_counter()
        save(self, *arguments)
        waits.append(1e3 * (time.perf_counter() - began))

    Run._save_checkpoint = timed  # type: ignore[method-assign]
    try:
        run(Experiment.parse(table), folder)
    finally:
        Run._save_checkpoint = save  # type: ignore[method-assign]
    times = [event["time"] for event in read(folder / "record.jsonl") if event["event"] == "round"]
    return [1e3 * (b - a) for a, b in itertools.pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="runs with and without checkpoints")
    pairs = parser.parse_args().pairs
    print(f"# Checkpoints\n\nMachine: {describe()}.\n")
    print("FedAdam: the adapter and two moments as large as it.\n")
    print(
        "| adapter MB | written MB | round waits, ms (median) | on the disk, ms (median) | slowest, ms |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for megabytes in (0.2, 5.0, 22.0):
            print(payload(megabytes, Path(folder) / str(megabytes)), flush=True)
        each: list[float] = []
        with_, without, waits = [], [], []
        for pair in range(pairs):  # interleaved: the machine is not ours alone
            with_ += rounds(1, Path(folder) / f"with-{pair}", waits)
            without += rounds(1000, Path(folder) / f"without-{pair}", each)
    one, other, wait = (statistics.median(values) for values in (with_, without, waits[1:]))
    print(f"\nRounds of the quickstart (tiny backbone, FedAdam), {pairs} runs of 8 rounds each, interleaved:\n")
    print(
        "| a checkpoint every round | ms a round (median) | ms that a round waits for it (median) | share |\n|---|---|---|---|"
    )
    print(f"| yes | {one:.0f} | {wait:.1f} | {100 * wait / one:.2f} % |\n| no | {other:.0f} | | |")


if __name__ == "__main__":
    main()
