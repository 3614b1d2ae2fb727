"""The first two minutes: what modality heterogeneity costs, on the embedded model and data."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fedmllm.config import Experiment
from fedmllm.display import Bars, show_table
from fedmllm.record import write_atomically
from fedmllm.runs import SUMMARY, run

BASE: dict[str, Any] = {
    "data": {"name": "synthetic-irony", "num_train": 600},
    "partition": {"name": "dirichlet", "alpha": 0.5},
    "backbone": {"name": "tiny"},
    "train": {"lr": 3e-3, "batch_size": 4, "accumulation": 1},
    "num_rounds": 16,
}
SCENARIOS: list[dict[str, Any]] = [
    {"name": "aligned"},
    {"name": "missing", "rate": 0.5},
    {"name": "cross", "num_image_clients": 5},
    {"name": "hybrid", "keep_rate": 0.6},
]
METHODS: list[dict[str, Any]] = [
    {"method": "zero-shot"},
    {"method": "local"},
    {"aggregator": "fedavg"},
    {"aggregator": "fedadam"},
    {"aggregator": "fedavg", "prompt": "agnostic"},
]


def quickstart(out: Path | None) -> list[dict[str, Any]]:
    """Run every method in every scenario and print one table; records go to `out` (default runs/quickstart-TIME)."""
    folder = out or Path("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S")
    cells = [Experiment.parse({**BASE, "scenario": s, **m}) for s in SCENARIOS for m in METHODS]
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    with Bars(len(cells)) as bars:
        for cell in cells:
            name = f"{cell.scenario.name}-{cell.method_name()}-{cell.prompt.name}"
            bars.label(name)
            rows += run(cell, folder / name, [bars])
    write_atomically(folder / SUMMARY, json.dumps({"rows": rows}, indent=1))
    show_table(rows, headline_only=True)
    print(f"{len(cells)} runs in {time.perf_counter() - began:.0f} s; records and adapters: {folder}")
    return rows
