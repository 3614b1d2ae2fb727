"""Seconds of a round of each LoRA method, relative to FedAvg in the same process.

python benchmarks/lora_methods.py [--clients 10] [--rows 12] [--repeats 3] > results/lora_methods.md

Stacked engine, embedded model. Methods take turns; each repeat has three rounds, so that frozen adapters and client state are
there, and the least CPU time of the last round counts. It is what other processes distort least.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from machine import describe
from stacked import federation

from fedmllm.algorithms.base import Aggregator
from fedmllm.backbones.base import Tiny
from fedmllm.config.engine import Stacked as Settings
from fedmllm.config.train import UpdateFilter
from fedmllm.core.tensors import num_bytes
from fedmllm.federation.client import Clients
from fedmllm.federation.client_state import ClientStateStore
from fedmllm.federation.engines.stacked.engine import StackedEngine
from fedmllm.federation.rounds import Progress, federate

KINDS = {
    "plain": ("fedavg", "scaffold", "feddyn", "fednova"),
    "sharing": ("ffa-lora", "rolora", "fedsa-lora"),
    "rotation, correction": ("fedrot-lora", "lora-fair"),
    "spectral": ("flexlora", "raflora", "florist", "fedsvd"),
    "frozen path": ("fedex-lora", "flora", "fed-plora", "fedalt"),
    "by direction": ("hetlora", "fedilora"),
}
RANKS = (2, 8, 4)
UNEQUAL = ("fed-plora", "hetlora", "fedilora", "raflora", "flexlora")
NUM_ROUNDS = 3


def last_round(clients: Clients, name: str) -> tuple[float, float, dict[str, object]]:
    """(CPU seconds, seconds, log) of the third round."""
    aggregator, start = Aggregator.pick(name, "aggregator"), clients.backbone.lora()
    cohort = list(range(len(clients.shards)))
    with tempfile.TemporaryDirectory() as folder:
        state = ClientStateStore(Path(folder)) if "client-state" in aggregator.needs else None
        engine = StackedEngine(Settings(), replace(clients, aggregator=aggregator, state=state))
        begin = Progress(0, start, aggregator.init(start))
        rounds = federate(
            begin, engine, aggregator, lambda _: cohort, NUM_ROUNDS, UpdateFilter(), seed=0, num_clients=len(cohort),
            ranks=RANKS if name in UNEQUAL else (),
        )  # fmt: skip
        for _ in range(NUM_ROUNDS - 1):
            next(rounds)
        cpu, wall = time.process_time(), time.perf_counter()
        log = next(rounds).log
        return time.process_time() - cpu, time.perf_counter() - wall, log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backbone = Tiny().load(0)
    clients = federation(backbone, arguments.clients, arguments.rows)  # type: ignore[arg-type]
    plain = num_bytes(backbone.lora())
    last_round(clients, "fedavg")  # rows are encoded, libraries have made their buffers
    names = [name for group in KINDS.values() for name in group]
    seen: dict[str, list[tuple[float, float, dict[str, object]]]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name in names:
            seen[name].append(last_round(clients, name))
    base = min(cpu for cpu, _, _ in seen["fedavg"])
    print("# Round time of the LoRA methods\n")
    print(f"`python benchmarks/lora_methods.py`, {arguments.clients} clients of {arguments.rows} rows, stacked, rank 8, "
          f"round {NUM_ROUNDS}.\n{describe()}\n")  # fmt: skip
    print(f"Ranks {list(RANKS)} in turn: {', '.join(UNEQUAL)}. CPU s: least of {arguments.repeats}. Bytes: mean of a client, "
          f"in units of the adapter ({plain} B).\n")  # fmt: skip
    print("| kind | method | CPU s | x FedAvg | s | down | up | aggregation error | rank |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for kind, group in KINDS.items():
        for name in group:
            cpu, wall, log = min(seen[name], key=lambda found: found[0])
            down, up = (float(log[key]) / arguments.clients / plain for key in ("down_bytes", "up_bytes"))  # type: ignore[arg-type]
            error, rank = log.get("aggregation_error"), log.get("result_rank")
            error_text = "-" if error is None else f"{error:.1e}"
            cells = (kind, name, f"{cpu:.2f}", f"{cpu / base:.2f}", f"{wall:.2f}", f"{down:.2f}", f"{up:.2f}")
            print("|", " | ".join([*cells, error_text, str(rank or "-")]), "|")


if __name__ == "__main__":
    main()
