"""Peak memory of a run, on the host and on an accelerator."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

_SELF = Path("/proc/self")


def reset_peaks() -> None:
    """Forget earlier peaks of this process, where the system can (Linux): a worker runs one experiment after another."""
    with contextlib.suppress(OSError):  # elsewhere the peak is that of the process since it began
        (_SELF / "clear_refs").write_text("5")  # 5: the peak resident size, see proc(5)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def host_peak_bytes() -> int:
    """Largest resident size of this process since `reset_peaks`."""
    try:
        lines = (_SELF / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def peaks() -> dict[str, int]:
    """`peak_host_bytes` and `peak_device_bytes` (0 without an accelerator) since `reset_peaks`."""
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"peak_host_bytes": host_peak_bytes(), "peak_device_bytes": device}
