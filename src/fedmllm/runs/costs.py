"""Costs of a run: totals over its rounds, and peak memory."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeFloat, NonNegativeInt

from fedmllm.core.spec import Spec

_SELF = Path("/proc/self")


class Totals(Spec):
    """Sums over the rounds of a run."""

    num_rounds: NonNegativeInt = 0
    up_bytes: NonNegativeInt = 0
    down_bytes: NonNegativeInt = 0
    up_lora_bytes: NonNegativeInt = 0
    down_lora_bytes: NonNegativeInt = 0
    num_tokens: NonNegativeInt = 0
    client_s: NonNegativeFloat = 0.0
    server_s: NonNegativeFloat = 0.0

    def plus(self, log: Mapping[str, Any]) -> Totals:
        """Return the totals with one more round.

        Args:
            log: `Progress.log` of the round. A site may keep its tokens and seconds to itself; they count 0.
        """
        return Totals(
            num_rounds=self.num_rounds + 1,
            up_bytes=self.up_bytes + log["up_bytes"],
            down_bytes=self.down_bytes + log["down_bytes"],
            up_lora_bytes=self.up_lora_bytes + log["up_lora_bytes"],
            down_lora_bytes=self.down_lora_bytes + log["down_lora_bytes"],
            num_tokens=self.num_tokens + sum(int(c.get("num_tokens", 0)) for c in log["clients"]),
            client_s=self.client_s + sum(c.get("time_s", 0.0) for c in log["clients"]),
            server_s=self.server_s + log["server_s"],
        )


def reset_peaks() -> None:
    """Reset the peaks of this process if the system allows it (Linux): a worker runs one experiment after another."""
    with contextlib.suppress(OSError):  # other systems report the peak since the process began
        (_SELF / "clear_refs").write_text("5")  # 5: the peak resident size, see proc(5)
    for number in _used_devices():
        torch.cuda.reset_peak_memory_stats(number)


def host_peak_bytes() -> int:
    """Return the largest resident size of this process since `reset_peaks`."""
    try:
        lines = (_SELF / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def peaks() -> dict[str, int]:
    """Return `peak_host_bytes` and `peak_device_bytes` (0 without an accelerator) since `reset_peaks`."""
    device = sum(torch.cuda.max_memory_allocated(number) for number in _used_devices())
    return {"peak_host_bytes": host_peak_bytes(), "peak_device_bytes": device}


def _used_devices() -> range:
    """Return the numbers of the CUDA devices; none before the first use of one, so that the others get no context."""
    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return range(torch.cuda.device_count() if is_used else 0)
