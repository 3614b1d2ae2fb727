"""Gain of one stacked pass over the clients of several runs, against one pass a run.

python benchmarks/shared_pass.py [--rows 16] [--repeats 5] > results/shared_pass.md

An upper bound: `--runs` runs that share base, rows and scenario, with two clients a round each, as in experiments/verdict and
experiments/lora. All clients train in one engine, in passes of one run (each for itself) or of several together.
Each client does the same steps. The least CPU time of the repeats counts: it is what other processes distort least.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from machine import describe
from stacked import federation

from fedmllm.backbones.base import Tiny
from fedmllm.config.engine import Stacked
from fedmllm.config.train import Train
from fedmllm.core.types import Round, Sent
from fedmllm.federation.client import Clients
from fedmllm.federation.engines.stacked.engine import StackedEngine

COHORT = 2  # clients a round of a run


def round_s(clients: Clients, at_once: int, token_budget: int) -> float:
    """CPU seconds of the training of one round of all clients."""
    engine = StackedEngine(Stacked(clients=at_once, token_budget=token_budget), clients)
    start = clients.backbone.lora()
    sents = {shard.client: Sent(start) for shard in clients.shards}
    began = time.process_time()
    for update in engine(Round(1, 0, 1, tuple(sents), len(sents)), sents):
        assert update.num_examples
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backbone = Tiny().load(0)
    num_clients = COHORT * arguments.runs
    clients = federation(backbone, num_clients, arguments.rows)  # type: ignore[arg-type]
    clients = replace(clients, train=Train(lr=3e-3, batch_size=4, accumulation=1))
    cases = [(COHORT * runs, budget) for budget in (1024, 4096) for runs in (1, 2, 5, 10) if runs <= arguments.runs]
    round_s(clients, COHORT, 1024)  # rows are encoded, libraries have made their buffers
    seen: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for _ in range(arguments.repeats):
        for case in cases:
            seen[case].append(round_s(clients, *case))
    alone = min(seen[COHORT, 1024])
    print("# One stacked pass over several runs: an upper bound\n")
    print(
        f"`python benchmarks/shared_pass.py`, {arguments.runs} runs of {COHORT} clients, {arguments.rows} rows a client,"
    )
    print(f"batches of 4, embedded model, one thread.\n{describe()}\n")
    print(
        f"CPU s: least of {arguments.repeats}. Gain: against each run for itself with passes of 1,024 tokens (the default).\n"
    )
    print("| runs in a pass | tokens a pass | CPU s a round of all runs | ms a row | gain |")
    print("|---:|---:|---:|---:|---:|")
    for (at_once, budget), values in seen.items():
        least = min(values)
        a_row = 1000 * least / (num_clients * arguments.rows)
        print(f"| {at_once // COHORT} | {budget} | {least:.2f} | {a_row:.2f} | {alone / least:.2f} |")


if __name__ == "__main__":
    main()
