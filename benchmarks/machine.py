"""Description of the machine that a figure was measured on, for every committed table."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers


def describe() -> str:
    """One line: processor, cores, threads, memory, accelerator, versions."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {memory:.0f} GiB, {gpu}; {versions}"
    )
