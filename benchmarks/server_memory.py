"""Peak memory and time of the server in one round of a model of 28 layers of 3584 channels, by aggregator.

    python benchmarks/server_memory.py [--clients 50] [--rank 8] [--methods fedavg flexlora] > results/server_memory.md

One process a method. The engine yields one random update at a time, as sites do; the base model is not there, because the
server never needs it. Memory is the peak of the process above that before the round, in units of one client's update too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

import torch
from machine import describe

from fedmllm.config.experiment import Experiment
from fedmllm.config.train import UpdateFilter
from fedmllm.core.tensors import num_bytes
from fedmllm.core.types import ClientUpdate, Params, Round, Sent
from fedmllm.federation.rounds import Progress, federate
from fedmllm.runs.costs import host_peak_bytes, reset_peaks

LAYERS, CHANNELS = 28, 3584
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
METHODS = ("fedavg", "fedavgm", "median", "flexlora", "raflora", "florist", "flora", "fedex-lora")


def adapter(rank: int, seed: int) -> Params:
    """A random adapter; B as small as after some rounds."""
    generator, tree = torch.Generator().manual_seed(seed), {}
    for layer in range(LAYERS):
        for module in MODULES:
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tree[f"{name}.lora_A.weight"] = torch.randn(rank, CHANNELS, generator=generator) / CHANNELS**0.5
            tree[f"{name}.lora_B.weight"] = torch.randn(CHANNELS, rank, generator=generator) * 1e-3
    return tree


def child(method: str, num_clients: int, rank: int) -> None:
    """Print peak bytes above the start and seconds of the server."""
    torch.set_num_threads(1)
    cohort = {"cohort_size": num_clients, "partition": {"name": "iid", "num_clients": num_clients}}
    aggregator = Experiment.parse({"data": "synthetic-irony", "aggregator": method, **cohort}).aggregator
    start = adapter(rank, 0)

    def engine(at: Round, sends: Mapping[int, Sent]) -> Iterator[ClientUpdate]:
        for client in sends:
            fresh = adapter(rank, client + 1)
            delta = {name: 1e-2 * fresh[name] for name in sends[client].returned()}
            yield ClientUpdate(client, delta, num_examples=10 + client, metrics={"loss": 1.0})

    begin = Progress(0, start, aggregator.init(start))
    reset_peaks()
    before, began = host_peak_bytes(), time.process_time()
    (after,) = federate(
        begin, engine, aggregator, lambda _: list(range(num_clients)), 1, UpdateFilter(), num_clients=num_clients
    )
    print(
        json.dumps(
            {
                "bytes": host_peak_bytes() - before,
                "cpu_s": time.process_time() - began,
                "update": num_bytes(start),
                "error": after.log.get("aggregation_error"),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--child", action="store_true", help="run the first method here")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.methods[0], arguments.clients, arguments.rank)
        return
    print("# Server memory in one round\n")
    print(f"`python benchmarks/server_memory.py --clients {arguments.clients} --rank {arguments.rank}`: {LAYERS} layers of "
          f"{CHANNELS} channels, LoRA on {', '.join(MODULES)}.\n{describe()}\n")  # fmt: skip
    print("| method | peak, MB | in updates of one client | CPU s |\n|---|---:|---:|---:|")
    for method in arguments.methods:
        options = ["--clients", str(arguments.clients), "--rank", str(arguments.rank), "--methods", method, "--child"]
        done = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        peak = f"{found['bytes'] / 1e6:,.0f} | {found['bytes'] / found['update']:.1f}"
        print(f"| {method} | {peak} | {found['cpu_s']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
