"""Expected time of the cells that a suite has not finished."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmllm.runs.folder import RunFolder
from fedmllm.runs.suites.suite import Cell


@dataclass(frozen=True)
class Estimate:
    """Seconds of one process for the cells whose method is known, and the cells of the other methods."""

    seconds: float
    unknown: tuple[Cell, ...]


def estimate(cells: Sequence[Cell], to_run: Sequence[Cell], folder: Path) -> Estimate:
    """Return the expected time of `to_run`.

    Args:
        cells: Cells of the suite; those that are finished are the measurements, as a mean for each method.
        to_run: The cells that would run.
        folder: The suite's folder.

    Raises:
        FedmllmError: A summary cannot be read.
    """
    measured: dict[str, list[float]] = {}
    for cell in cells:
        run = RunFolder(folder / cell.run_id)
        if run.is_finished and (seconds := run.read_rows()[0].get("wall_s")) is not None:
            measured.setdefault(cell.experiment.method_name(), []).append(seconds)
    known = [cell for cell in to_run if cell.experiment.method_name() in measured]
    unknown = tuple(cell for cell in to_run if cell.experiment.method_name() not in measured)
    return Estimate(sum(statistics.fmean(measured[cell.experiment.method_name()]) for cell in known), unknown)
