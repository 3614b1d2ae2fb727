"""One-run audits of honest runs and of runs with a planted fault: how many are caught, how many are wrongly accused.

    python benchmarks/audits.py > results/audits.md

Each repeat trains the embedded backbone over 3 clients for 5 rounds with new keys, new coins and new canaries, and asks
`fedmllm audit --kind one-run` for its verdict. Target: every planted fault caught, no honest run accused.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from machine import describe

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fedmllm.config.experiment import Experiment
from fedmllm.runs.audits.one_run import one_run
from fedmllm.runs.inputs import Inputs
from support.planted import FAULTS, planted
from support.runs import TABLE

ROUNDS, NOISE, CLIP = 5, 8.0, 0.5


def audited(name: str) -> Experiment:
    """The experiment under audit: 3 clients, all of them in every round, one step each."""
    return Experiment.parse(
        {
            **TABLE,
            "train": {**TABLE["train"], "clip_norm": 0},
            "update_filter": {"on_bad_update": "drop_client"},
            "privacy": {"name": name, "noise_multiplier": NOISE, "clip": CLIP},
            "cohort_size": 3,
            "num_rounds": ROUNDS,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--canaries", type=int, default=100)
    a = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    print(f"# Audits: planted faults caught, honest runs accused\n\nMachine: {describe()}.")
    print(f"{a.repeats} runs a line, {a.canaries} canaries each; noise multiplier {NOISE:g}, {ROUNDS} rounds.\n")
    print(
        "| mechanism | planted fault | caught | wrongly accused | epsilon claimed | bound, median (least to greatest) |\n"
        "|---|---|---|---|---|---|",
        flush=True,
    )
    missed = 0
    for name, faults in FAULTS.items():
        experiment = audited(name)
        inputs = Inputs.load(experiment)
        for fault in faults:
            rows = [
                one_run(inputs, a.canaries, np.random.default_rng(1000 + i), planted(experiment, fault))
                for i in range(a.repeats)
            ]
            bounds, found = [row["bound"] for row in rows], sum(row["caught"] for row in rows)
            missed += found if not fault else a.repeats - found
            claim = rows[0]["claim"].removeprefix("epsilon ")
            caught, accused = ("", f"{found} of {a.repeats}") if not fault else (f"{found} of {a.repeats}", "")
            bound = f"{statistics.median(bounds):.2f} ({min(bounds):.2f} to {max(bounds):.2f})"
            print(f"| {name} | {fault or 'none'} | {caught} | {accused} | {claim} | {bound} |", flush=True)
    share = 1 - 0.05 ** (1 / a.repeats)
    print(
        f"\nOf {a.repeats} equal results in {a.repeats} repeats, the rate of the other result is below {share:.0%} with 95 % "
        f"confidence. {time.perf_counter() - began:.0f} s. Wrong verdicts: {missed}."
    )


if __name__ == "__main__":
    main()
