"""`fedmllm doctor` and `fedmllm estimate`: model checks and required resources."""

from __future__ import annotations

import json
import re
from typing import Any

from rich.console import Console
from rich.table import Table

from fedmllm.backbones.base import FromFolder
from fedmllm.backbones.folder import find_folder, first_device
from fedmllm.backbones.footprint import Footprint, footprint
from fedmllm.backbones.hf import load_folder
from fedmllm.backbones.model_checks import Check, checkup
from fedmllm.config.experiment import Experiment
from fedmllm.runs.calibration import RoundTime, round_time
from fedmllm.runs.costs import peaks, reset_peaks
from fedmllm.runs.resources import WORKSPACE_BYTES, EstimateLine, by_device, estimate


def doctor(spec: FromFolder, console: Console | None = None) -> list[Check]:
    """Load the folder, run `checkup` on it, print what was seen. The caller decides what a failed check means."""
    console = console or Console()
    reset_peaks()
    sizes = footprint(find_folder(spec.path), spec)
    backbone = load_folder(spec, seed=0)
    checks = checkup(backbone)
    console.print(f"{spec.path}: {sizes.family}, {sizes.num_weights / 1e9:.3f} B weights, {sizes.num_layers} layers")
    console.print(f"digest {backbone.digest}")
    for key, (default, own) in backbone.replaced_defaults.items():
        console.print(f"image setting {key} = {own!r} of the folder replaces the family's default {default!r}")
    console.print(f"LoRA on {_grouped(sizes.targets)}")
    console.print(f"trained {sizes.num_trained:,} weights; one way, one client: {_size(sizes.payload_bytes)}")
    held = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    peak = peaks()
    on_device = f", on {backbone.device} {_size(peak['peak_device_bytes'])}" if peak["peak_device_bytes"] else ""
    console.print(f"memory: weights {_size(held)}; peak while checking {_size(peak['peak_host_bytes'])}{on_device}")
    table = Table("check", "", "seen", box=None)
    for check in checks:
        table.add_row(check.name, "ok" if check.good else "FAILED", check.seen)
    console.print(table)
    return checks


def print_estimate(
    experiment: Experiment, as_json: bool = False, memory_gb: float = 24.0, console: Console | None = None
) -> None:
    """Print the estimate as two tables and a line on time, or as one JSON object (bytes, seconds).

    Args:
        experiment: What would run.
        as_json: Print JSON.
        memory_gb: Memory of the device that the model is to fit in.
        console: Where to print.
    """
    console = console or Console()
    sizes, memory, traffic = estimate(experiment)
    total = sum(line.num_bytes for line in memory)
    device = first_device(experiment.backbone)
    devices = by_device(sizes, memory)
    needed = max((line.num_bytes for line in devices), default=total) + (
        WORKSPACE_BYTES if device.type == "cuda" else 0
    )
    timed = round_time(experiment, sizes.num_weights, device)
    if as_json:
        parted = {"device_bytes": {line.part: round(line.num_bytes) for line in devices}} if devices else {}
        fit = {**parted, "needed_bytes": round(needed), f"fits_in_{memory_gb:g}_gb": needed <= memory_gb * 1e9}
        time = {"round_s": timed.seconds, "first_s": timed.first_s, "time_is": timed.about}
        console.print_json(json.dumps({**_as_json(sizes, memory, traffic), **fit, **time}))
        return
    precision = experiment.backbone.precision.base
    console.print(
        f"{sizes.family}: {sizes.num_weights / 1e9:.3f} B weights, {sizes.num_layers} layers, base in {precision}"
    )
    console.print(f"LoRA on {_grouped(sizes.targets)}")
    tables = [("memory", memory, total), ("memory of each device", devices, None), ("bytes sent", traffic, None)]
    for title, lines, last in tables:
        if not lines:
            continue
        table = Table(title, "", "", box=None)
        for line in lines:
            table.add_row(line.part, _size(line.num_bytes), line.note)
        if last is not None:
            table.add_row("together", _size(last), "workspace of the libraries (0.5 to 2 GB on CUDA) not counted")
        console.print(table)
    if experiment.completion.learns:
        console.print(f"not counted: bytes in which completion {experiment.completion.name} is learned before training")
    each = " each" if devices else ""
    console.print(
        f"fits in {memory_gb:g} GB{each}: {'yes' if needed <= memory_gb * 1e9 else 'no'}, {_size(needed)} needed"
    )
    console.print(time_text(timed, experiment.num_rounds), highlight=False, soft_wrap=True)
    if device.type != "cpu":
        console.print(
            f"also on the host: {_size(experiment.backbone.keep_image_features_mb * 2**20)} of image features"
        )


def time_text(timed: RoundTime, num_rounds: int) -> str:
    """Return a line on the time of a run, without its evaluations.

    Args:
        timed: Of a round.
        num_rounds: Of the run.
    """
    if timed.seconds is None:
        return f"time: not known; {timed.about}"
    first = "" if timed.first_s is None else f", and {timed.first_s:.3g} s more while rows are read for the first time"
    return f"time: {timed.seconds:.3g} s a round, {timed.seconds * num_rounds:.3g} s in all{first}; {timed.about}"


def _as_json(sizes: Footprint, memory: list[EstimateLine], traffic: list[EstimateLine]) -> dict[str, Any]:
    return {
        "family": sizes.family,
        "num_weights": sizes.num_weights,
        "num_trained": sizes.num_trained,
        "memory_bytes": {line.part: round(line.num_bytes) for line in memory},
        "total_memory_bytes": round(sum(line.num_bytes for line in memory)),
        "traffic_bytes": {line.part: round(line.num_bytes) for line in traffic},
    }


def _size(num_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def _grouped(names: tuple[str, ...]) -> str:
    """Module names with their layer numbers as N, and how often each comes."""
    counts: dict[str, int] = {}
    for name in names:
        short = re.sub(r"\.\d+\.", ".N.", name)
        counts[short] = counts.get(short, 0) + 1
    return ", ".join(f"{name} (x{count})" for name, count in sorted(counts.items()))
