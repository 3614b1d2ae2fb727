"""Cost of bad and absent clients, on the embedded world: one client that sends noise; clients that drop out or straggle.

python benchmarks/unreliable.py --seeds 2 > results/unreliable.md    # --out FOLDER keeps the runs and resumes those in it
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe

from fedmllm import Experiment
from fedmllm.cli.quickstart import QUICKSTART_SUITE
from fedmllm.core.rng import torch_stream
from fedmllm.core.types import ClientUpdate, Params
from fedmllm.runs import session as the_run
from fedmllm.runs.inputs import start_engine
from fedmllm.runs.run import run

BASE: dict[str, Any] = tomllib.loads(QUICKSTART_SUITE.read_text(encoding="utf-8"))["base"]
COMMON = {
    **BASE,
    "partition": {"name": "iid", "num_clients": 10},
}
LIAR, LENGTHS = 3, (10.0, 100.0)
AGGREGATORS: dict[str, dict[str, Any]] = {
    "fedavg": {"aggregator": "fedavg"},
    # the longest honest updates, of the first rounds, are about that long: a few of them go too
    "fedavg, updates over norm 3 left out": {"update_filter": {"max_norm": 3.0, "on_bad_update": "drop_client"}},
    "median": {"aggregator": "median"},
    "trimmed-mean, 1 at either end": {"aggregator": "trimmed-mean"},
    "krum, 1 bad": {"aggregator": "krum"},
    "multi-krum, 1 bad, 3 kept": {"aggregator": {"name": "multi-krum", "num_kept": 3}},
}
ABSENCE: dict[str, dict[str, Any]] = {
    "all clients respond": {},
    "drop out 20 %": {"drop_rate": 0.2},
    "drop out 50 %": {"drop_rate": 0.5},
    "straggle 50 %, half their steps": {"straggle_rate": 0.5, "straggle_share": 0.5},
    "drop out 30 % and straggle 50 %": {"drop_rate": 0.3, "straggle_rate": 0.5, "straggle_share": 0.5},
}


class Noisy:
    """An engine in which client 3 sends noise, so many times as long as what it would have sent."""

    def __init__(self, inner: Any, times: float, seed: int) -> None:
        self._inner, self._times, self._seed = inner, times, seed

    def __call__(self, params: Params, round_: int, cohort: Sequence[int]) -> Iterator[ClientUpdate]:
        for update in self._inner(params, round_, cohort):
            if update.client != LIAR:
                yield update
                continue
            rng = torch_stream(self._seed, "noise", round_)
            delta = {n: d.std() * self._times * torch.randn(d.shape, generator=rng) for n, d in update.delta.items()}
            yield ClientUpdate(update.client, delta, update.num_examples, update.metrics)


def headline(table: dict[str, Any], seed: int, times: float, folder: Path) -> dict[str, Any]:
    """The first summary row of a run, in which one client may send noise so many times as long; 0 = it is honest."""
    experiment = Experiment.parse({**table, "seed": seed})
    if times:
        the_run.start_engine = lambda settings, clients: Noisy(start_engine(settings, clients), times, seed)  # type: ignore[assignment]
    try:
        return run(experiment, folder / f"{experiment.run_id()}-{times:g}", resume=True)[0]
    finally:
        the_run.start_engine = start_engine


def spread(rows: Sequence[dict[str, Any]]) -> str:
    values = [row["value"] for row in rows if row["value"] is not None]
    return f"{statistics.fmean(values):.3f} | {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seeds, folder = range(arguments.seeds), arguments.out or Path(tempfile.mkdtemp())
    base = Experiment.parse(COMMON).backbone.load(0).digest[:12]
    print(f"# Clients that cannot be relied on\n\n`python benchmarks/unreliable.py --seeds {len(seeds)}`, base {base}.")
    print(f"Machine: {describe()}.\nSettings: `{json.dumps(COMMON)}`.\n")
    print("## One client of ten sends noise, so many times as long as its update; five are asked a round\n")
    columns = " | ".join(f"{times:g} times | std" for times in LENGTHS)
    print(f"| aggregator | metric | honest | std | {columns} |\n|{'---|' * (4 + 2 * len(LENGTHS))}")
    for name, changed in AGGREGATORS.items():
        table = {**COMMON, "cohort_size": 5, **changed}
        found = [[headline(table, seed, times, folder) for seed in seeds] for times in (0.0, *LENGTHS)]
        print(f"| {name} | {found[0][0]['metric']} | {' | '.join(map(spread, found))} |", flush=True)
    print("\n## Clients that are asked and do not answer, or answer with what they have (FedAvg, four asked a round)\n")
    print("| availability | metric | mean | std | MB sent |\n|---|---|---|---|---|")
    for name, rates in ABSENCE.items():
        availability = {"name": "unreliable", **rates} if rates else {"name": "always"}
        rows = [headline({**COMMON, "cohort_size": 4, "availability": availability}, s, 0.0, folder) for s in seeds]
        sent = statistics.fmean(row["up_bytes"] + row["down_bytes"] for row in rows) / 1e6
        print(f"| {name} | {rows[0]['metric']} | {spread(rows)} | {sent:.1f} |", flush=True)


if __name__ == "__main__":
    main()
