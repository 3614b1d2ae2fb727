"""Peak memory of a round above the loaded model: cohorts of 2, 10, and 1,000 clients of the same number of rows in all.

python benchmarks/stacked_memory.py > results/stacked-memory.md

Each figure is the median of three processes, because a peak is a process's. The baseline is a round of one client of four
rows. A cohort of two has 8 rows a step, 400 tokens: no pass of it is full.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

import torch

ROWS = 1000
COHORTS = (2, 10, 1000)
BUDGETS = (512, 1024)
THREADS = 2


def child(num_clients: int, num_rows: int, token_budget: int) -> None:
    """Print peak bytes above the model, and what the aggregation keeps."""
    from stacked import federation

    from fedmllm.algorithms.server_optimizers import FedAvg
    from fedmllm.backbones.base import Tiny
    from fedmllm.config.engine import Stacked as Settings
    from fedmllm.config.train import UpdateFilter
    from fedmllm.core.types import Round, Sent
    from fedmllm.federation.engines.stacked.engine import StackedEngine
    from fedmllm.federation.rounds import Progress, federate
    from fedmllm.runs.costs import host_peak_bytes, reset_peaks

    torch.set_num_threads(THREADS)
    backbone = Tiny().load(0)
    start, aggregator = backbone.lora(), FedAvg()
    small = federation(backbone, 1, 4)  # type: ignore[arg-type]
    list(
        StackedEngine(Settings(), small)(Round(1, 0, 1, (0,), 1), {0: Sent(start)})
    )  # libraries have made their buffers
    clients = federation(backbone, num_clients, num_rows)  # type: ignore[arg-type]
    reset_peaks()
    before = host_peak_bytes()
    begin = Progress(0, start, aggregator.init(start))
    engine = StackedEngine(Settings(token_budget=token_budget), clients)
    (after,) = federate(begin, engine, aggregator, lambda _: list(range(num_clients)), 1, UpdateFilter())
    assert len(after.log["clients"]) == num_clients
    print(json.dumps({"before": before, "peak": host_peak_bytes()}))


def peak_mib(num_clients: int, token_budget: int) -> float:
    command = [sys.executable, __file__, "--child", *map(str, (num_clients, ROWS // num_clients, token_budget))]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
    found = json.loads(line)
    return float(found["peak"] - found["before"]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=3, type=int)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    from machine import describe

    torch.set_num_threads(THREADS)
    print(f"# Memory of a round of {ROWS} rows, tiny backbone, one round\n\nMachine: {describe()}. Medians of 3.\n")
    print(
        "| tokens a pass | cohort | peak above the model, MiB | against 2 clients | against 10 |\n|---|---|---|---|---|"
    )
    for budget in BUDGETS:
        mib = {cohort: statistics.median(peak_mib(cohort, budget) for _ in range(3)) for cohort in COHORTS}
        for cohort, peak in mib.items():
            print(f"| {budget:,} | {cohort:,} | {peak:.1f} | {peak / mib[2]:.2f} | {peak / mib[10]:.2f} |")


if __name__ == "__main__":
    main()
