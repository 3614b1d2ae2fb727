"""Threads of a process that computes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from fedmllm.core.machine import default_threads, usable_cores


def num_threads(chosen: int, records: Iterable[Path], num_processes: int, default: int) -> int:
    """Return the threads of each process.

    Args:
        chosen: The option `--threads`, which wins; after it OMP_NUM_THREADS wins; 0 = neither is given.
        records: Of runs that are resumed: their last bits depend on the number with which they started. It is kept if
            the usable cores suffice.
        num_processes: Processes that compute side by side.
        default: For everything else.
    """
    from fedmllm.runs.record import recorded_threads

    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if named := chosen or (int(first) if first.isdecimal() else 0):
        return named
    most = max(1, usable_cores() // num_processes)
    return next((count for count in map(recorded_threads, records) if 0 < count <= most), default)


def set_threads(chosen: int, records: Iterable[Path]) -> None:
    """Set the threads of this process; arguments as in `num_threads`."""
    import torch

    # By default torch has a thread for each physical core: a second one on the same core gains nothing.
    torch.set_num_threads(num_threads(chosen, records, 1, min(default_threads(), torch.get_num_threads())))
