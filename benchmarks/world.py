"""The embedded world's figures: what federation brings and what missing modalities cost, mean and spread over seeds.

python benchmarks/world.py [--seeds 3] [--out runs/world] > results/world.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from machine import describe

from fedmllm import Experiment, run
from fedmllm.cli.quickstart import QUICKSTART_SUITE
from fedmllm.runs.folder import SUMMARY

BASE: dict[str, Any] = tomllib.loads(QUICKSTART_SUITE.read_text())["base"]
CELLS: dict[str, dict[str, Any]] = {
    "zero-shot": {"method": "zero-shot"},
    "centralised": {"method": "centralised", "evaluate": {"visible": ["all", "image", "text"]}},
    "local, aligned 0.5": {"method": "local"},
    "FedAvg, aligned 0.5": {"evaluate": {"visible": ["all", "image", "text"]}},
    "FedAvg, missing 50 %": {"scenario": {"name": "missing", "rate": 0.5}},
    "FedAvg, cross I5:T5": {"scenario": {"name": "cross", "num_image_clients": 5}},
    "FedAvg, hybrid 60 %": {"scenario": {"name": "hybrid", "keep_rate": 0.6}},
}


def measure(cell: dict[str, Any], seed: int, folder: Path) -> dict[str, tuple[float, float]]:
    """Visibility of the test rows -> (headline metric, wall seconds)."""
    experiment = Experiment.parse({**BASE, **cell, "seed": seed})
    out = folder / experiment.run_id()
    done = out / SUMMARY
    rows = json.loads(done.read_text())["rows"] if done.exists() else run(experiment, out)
    first: dict[str, tuple[float, float]] = {}
    for row in rows:
        first.setdefault(row["visible"], (row["value"], row["wall_s"]))
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=None, help="keep the records here; finished cells are not run again"
    )
    parser.add_argument("--data", default=BASE["data"]["name"])
    arguments = parser.parse_args()
    BASE["data"] = {**BASE["data"], "name": arguments.data}
    folder = arguments.out or Path(tempfile.mkdtemp())
    print(f"# The embedded world: {arguments.data}\n\nMachine: {describe()}. Settings: `{json.dumps(BASE)}`.\n")
    print("| run | test rows show | mean | std | each seed | seconds a run |\n|---|---|---|---|---|---|")
    for name, cell in CELLS.items():
        found = [measure(cell, seed, folder) for seed in range(arguments.seeds)]
        for visible in found[0]:
            values = [f[visible][0] for f in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            each = " ".join(f"{v:.3f}" for v in values)
            seconds = statistics.median(f[visible][1] for f in found)
            print(
                f"| {name} | {visible} | {statistics.fmean(values):.3f} | {spread:.3f} | {each} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
