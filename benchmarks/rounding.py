"""Effect of rounding alone: one experiment under engines and threads that differ only in the order of summation.

    python benchmarks/rounding.py experiments/verdict/core.toml --only FedAvg --only I5:T5 --seeds 0 1

Every chosen cell is run once for each variant, to the end. `--reference FOLDER` takes the results of the suite's own engine
from a folder of finished cells in place of running them again. Printed are the differences of the AUC from the first variant,
in points, for each visibility of the test rows, and their root mean square.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from machine import describe

from fedmllm import Experiment, run
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.record import read
from fedmllm.runs.suites.suite import Cell, Suite

VARIANTS: Mapping[str, tuple[Mapping[str, Any], int]] = {  # name -> engine, threads
    "stacked, 1 thread": ({"name": "stacked"}, 1),
    "in-process, 1 thread": ({"name": "in-process"}, 1),
    "stacked, 1 row a pass": ({"name": "stacked", "token_budget": 64}, 1),
    "stacked, 2 threads": ({"name": "stacked"}, 2),
}


def scores(rows: Any) -> dict[str, float]:
    """AUC by visibility."""
    return {row["visible"]: row["value"] for row in rows if row["metric"] == "auc"}


def kept(cell: Cell, folder: Path, engine: str, threads: int) -> dict[str, float] | None:
    """The result of a finished cell that was run in this way, otherwise None."""
    found = RunFolder(folder / cell.run_id)
    if not found.is_finished:
        return None
    heading = next(read(found.record))
    same = (heading["settings"]["engine"]["name"], heading["device"]["threads"]) == (engine, threads)
    return scores(found.read_rows()) if same else None


def result(cell: Cell, name: str, reference: Path | None) -> dict[str, float]:
    """AUC by visibility of one cell under one variant."""
    engine, threads = VARIANTS[name]
    if reference and set(engine) == {"name"} and (found := kept(cell, reference, engine["name"], threads)):
        return found
    torch.set_num_threads(threads)
    experiment = Experiment.parse({**cell.experiment.dump(), "engine": dict(engine)})
    assert experiment.run_id() == cell.run_id  # engine and threads do not change the experiment
    with tempfile.TemporaryDirectory() as folder:
        return scores(run(experiment, Path(folder) / "run"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("--only", action="append", default=[], metavar="LABEL", help="as in `fedmllm suite`")
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--reference", type=Path)
    arguments = parser.parse_args()
    first, *others = arguments.variants
    cells = [
        cell for cell in Suite.load(arguments.suite).select(arguments.only) if cell.labels["seeds"] in arguments.seeds
    ]
    print(f"Machine: {describe()}.\n")
    print(f"Differences of the AUC from `{first}`, points.\n")
    squares: dict[str, list[float]] = {name: [] for name in others}
    visible = list(cells[0].experiment.evaluate.visible)
    print("| cell | variant | " + " | ".join(visible) + " |\n|---|---|" + "---:|" * len(visible))
    for cell in cells:
        base = result(cell, first, arguments.reference)
        print(f"| {cell.label} | {first} | " + " | ".join(f"{100 * base[v]:.2f}" for v in visible) + " |", flush=True)
        for name in others:
            own = result(cell, name, arguments.reference)
            change = {v: 100 * (own[v] - base[v]) for v in visible}
            squares[name] += [change[v] ** 2 for v in visible]
            print(f"| {cell.label} | {name} | " + " | ".join(f"{change[v]:+.2f}" for v in visible) + " |", flush=True)
    print()
    for name, several in squares.items():
        print(f"Root mean square, {name}: {(sum(several) / len(several)) ** 0.5:.2f} points ({len(several)} values).")


if __name__ == "__main__":
    main()
