"""Peak memory and time of the server in a round of a model of 28 layers of 3584 channels, by aggregator.

    python benchmarks/server_memory.py [--clients 50] [--rank 8] [--rounds 1] [--methods fedavg flexlora]

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


def child(method: str, num_clients: int, rank: int, num_rounds: int) -> None:
    """Print peak bytes above the start and seconds of the server."""
    torch.set_num_threads(1)
    federation = {"cohort_size": num_clients, "partition": {"name": "iid", "num_clients": num_clients}}
    aggregator = Experiment.parse({"data": "synthetic-irony", "aggregator": method, **federation}).aggregator
    start = adapter(rank, 0)

    def engine(at: Round, sends: Mapping[int, Sent]) -> Iterator[ClientUpdate]:
        for client in sends:
            fresh = adapter(rank, client + 1)
            delta = {name: 1e-2 * fresh[name] for name in sends[client].returned()}
            yield ClientUpdate(client, delta, num_examples=10 + client, metrics={"loss": 1.0})

    begin = Progress(0, start, aggregator.init(start))
    reset_peaks()
    before, began = host_peak_bytes(), time.process_time()
    cohort = list(range(num_clients))
    rounds = federate(begin, engine, aggregator, lambda _: cohort, num_rounds, UpdateFilter(), num_clients=num_clients)
    for _ in rounds:
        pass
    print(
        json.dumps(
            {
                "bytes": host_peak_bytes() - before,
                "cpu_s": time.process_time() - began,
                "update": num_bytes(start),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--rounds", type=int, default=1, help="the frozen adapter of a growing method exists from round 2 on"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--child", action="store_true", help="run the first method here")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.methods[0], arguments.clients, arguments.rank, arguments.rounds)
        return
    print(f"# Server memory in {arguments.rounds} round(s)\n")
    print(f"`python benchmarks/server_memory.py --clients {arguments.clients} --rank {arguments.rank} --rounds "
          f"{arguments.rounds}`: {LAYERS} layers of "
          f"{CHANNELS} channels, LoRA on {', '.join(MODULES)}.\n{describe()}\n")  # fmt: skip
    print("| method | peak, MB | in updates of one client | CPU s |\n|---|---:|---:|---:|")
    for method in arguments.methods:
        sizes = f"--clients {arguments.clients} --rank {arguments.rank} --rounds {arguments.rounds}"
        options = [*sizes.split(), "--methods", method, "--child"]
        done = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        peak = f"{found['bytes'] / 1e6:,.0f} | {found['bytes'] / found['update']:.1f}"
        print(f"| {method} | {peak} | {found['cpu_s']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
