"""Time of a round with each completion, after what it does once, over that of a round without one.

python benchmarks/completion.py [--rounds 9] > results/completion.md

All federations are in one process and take their rounds in turns, in an order that is reversed each time. A ratio has both
rounds of one turn in it, in CPU seconds of the process. The first round, in which rows are filled and encoded, is given apart.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from machine import describe

from fedmllm import Experiment
from fedmllm.federation.rounds import Progress, federate
from fedmllm.runs.completing import learn_completion
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.inputs import Inputs, start_engine

BASE: dict[str, Any] = {
    "data": {"name": "synthetic-verdict", "num_train": 120, "num_validation": 40, "num_test": 8},
    "partition": {"name": "iid", "num_clients": 10},
    "scenario": {"name": "missing", "rate": 0.5},
    "backbone": {"name": "tiny", "keep_image_features_mb": 64},
    "train": {"lr": 3e-3, "batch_size": 4, "accumulation": 1},
}
RUNS: dict[str, dict[str, Any]] = {
    "none": {},
    "oracle": {"completion": "oracle"},
    "retrieve": {"completion": "retrieve", "public": {"rows": 40}},
    "imagine, mean": {"completion": {"name": "imagine", "kind": "mean"}},
    "imagine, cvae": {"completion": {"name": "imagine", "rounds": 1, "steps": 20}},
    "describe": {"completion": {"name": "describe", "ask": ["What is the face?", "What is the sky?"]}},
    "modality gate": {"backbone": {**BASE["backbone"], "lora": {"modality_gate": True}}},
    "uniform dropout": {"modality_dropout": "uniform"},
    "importance dropout": {"modality_dropout": "importance"},
}


def rounds(name: str, number: int) -> Iterator[tuple[float, int]]:
    """CPU seconds and tokens of each round, after the rounds in which a completion is learned."""
    inputs = Inputs.load(Experiment.parse({**BASE, **RUNS[name], "num_rounds": number}))
    learn_completion(inputs, RunFolder(Path(mkdtemp())), False, lambda _: None)
    e, clients = inputs.experiment, inputs.clients(number)
    engine = start_engine(e.engine, clients)
    members = [shard.client for shard in inputs.shards if shard.rows]
    turns = federate(
        Progress(0, inputs.start, inputs.initial_state()),
        engine,
        inputs.aggregator(),
        lambda _: members,
        number,
        e.update_filter,
        seed=e.seed,
    )
    clients.store.warm(clients.shards)
    while True:
        began = time.process_time()
        progress = next(turns, None)
        if progress is None:
            return
        yield time.process_time() - began, sum(client["num_tokens"] for client in progress.log["clients"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    a = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    running = {name: rounds(name, a.rounds) for name in RUNS}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in RUNS}
    for turn in range(a.rounds):
        for name in list(RUNS)[:: 1 if turn % 2 else -1]:
            found[name].append(next(running[name]))
    print(f"# A round with each strategy\n\nMachine: {describe()}. `{BASE}`.\n")
    print(
        f"CPU seconds of rounds 2 to {a.rounds}, in turns; the ratios are medians over the turns, with their range. Filled "
        "rows have more tokens; `oracle` trains on the hidden content without completing any.\n"
    )
    print(
        "| strategy | first round s | a round s | over none | over oracle | tokens over none |\n|---|---|---|---|---|---|"
    )
    for name, turns in found.items():
        cells = []
        for other in ("none", "oracle"):
            pairs = zip(turns[1:], found[other][1:], strict=True)
            ratios = [own / base for (own, _), (base, _) in pairs]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        tokens = sum(t for _, t in turns[1:]) / sum(t for _, t in found["none"][1:])
        seconds = statistics.median(s for s, _ in turns[1:])
        print(f"| {name} | {turns[0][0]:.2f} | {seconds:.2f} | {' | '.join(cells)} | {tokens:.2f} |")


if __name__ == "__main__":
    main()
