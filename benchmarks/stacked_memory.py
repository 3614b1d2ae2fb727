"""Peak memory of a round above the loaded model: cohorts of 2, 10, and 1,000 clients of the same number of rows in all.

python benchmarks/stacked_memory.py > results/stacked-memory.md

Each line is a process of its own, because a peak is a process's. The baseline is a round of one client of four rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch

ROWS = 1000
CASES = {"2 clients": (2, ROWS // 2), "10 clients": (10, ROWS // 10), "1,000 clients": (1000, ROWS // 1000)}


def child(num_clients: int, num_rows: int) -> None:
    """Print peak bytes above the model, and what the aggregation keeps."""
    from stacked import federation

    from fedmllm.aggregators import FedAvg
    from fedmllm.backbones import Tiny
    from fedmllm.config import Screen
    from fedmllm.costs import host_peak_bytes, reset_peaks
    from fedmllm.engine import Stacked as Settings
    from fedmllm.engines.stacked import Stacked
    from fedmllm.federate import Progress, federate

    torch.set_num_threads(2)
    backbone = Tiny().load(0)
    start, aggregator = backbone.lora(), FedAvg()
    small = federation(backbone, 1, 4)  # type: ignore[arg-type]
    list(Stacked(Settings(), small)(start, 1, [0]))  # libraries have made their buffers
    clients = federation(backbone, num_clients, num_rows)  # type: ignore[arg-type]
    reset_peaks()
    before = host_peak_bytes()
    begin = Progress(0, start, aggregator.init(start))
    rounds = federate(begin, Stacked(Settings(), clients), aggregator, lambda _: list(range(num_clients)), 1, Screen())
    (after,) = rounds
    assert len(after.log["clients"]) == num_clients
    print(json.dumps({"before": before, "peak": host_peak_bytes()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, type=int)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    from machine import describe

    print(f"# Memory of a round of {ROWS} rows, tiny backbone, one round\n\nMachine: {describe()}.\n")
    print("| cohort | peak above the model, MiB | against 10 clients |\n|---|---|---|")
    found = {}
    for name, case in CASES.items():
        command = [sys.executable, __file__, "--child", *map(str, case)]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
        peak = json.loads(line)
        found[name] = (peak["peak"] - peak["before"]) / 2**20
    for name, mib in found.items():
        print(f"| {name} | {mib:.1f} | {mib / found['10 clients']:.2f} |")


if __name__ == "__main__":
    main()
