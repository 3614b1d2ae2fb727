"""Devices of a suite's processes, and which cell fits on which."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError

CUDA_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(eq=False)
class Device:
    """A device in equal shares, at most one process a share. A cell takes as many shares as hold its memory.

    Attributes:
        name: "cpu", or a CUDA device by its number, as in "cuda:1".
        num_shares: Processes at most.
        num_bytes: Its free memory; 0 = not known before the first cell, which has it alone; infinite = that of the host,
            which has a budget of its own.
    """

    name: str
    num_shares: int = 1
    num_bytes: float = 0.0

    @property
    def kind(self) -> str:
        """The device as its processes name it: "cpu" or "cuda"."""
        return self.name.partition(":")[0]

    def shares(self, needed_bytes: float) -> int:
        """Return the shares that a cell takes; all of them where even those are too few: it is tried alone.

        Args:
            needed_bytes: Of the cell; infinite = not known.
        """
        if not self.num_bytes or math.isinf(needed_bytes):
            return 1 if math.isinf(self.num_bytes) else self.num_shares
        return math.ceil(min(self.num_shares, max(1.0, needed_bytes * self.num_shares / self.num_bytes)))

    def limit_bytes(self, shares: int) -> float:
        """Return the memory of so many shares; 0 = no limit, or not known.

        Args:
            shares: Of a cell.
        """
        return self.num_bytes * shares / self.num_shares if math.isfinite(self.num_bytes) else 0.0

    def environment(self) -> dict[str, str]:
        """Return the variables of its processes: each sees its own card alone, as "cuda" and "cuda:0"."""
        if self.kind != "cuda":
            return {}
        number = self.name.partition(":")[2]
        visible = [name for name in os.environ.get(CUDA_VISIBLE, "").split(",") if name.strip()]
        return {CUDA_VISIBLE: visible[int(number)].strip() if visible else number}


@dataclass
class CellMemory:
    """Memory of cells on a CUDA device by the estimate of `fedmllm estimate`; each kind of model is built once, empty."""

    _known: dict[str, float] = field(default_factory=dict)

    def needed_bytes(self, experiment: Experiment) -> float:
        """Return the bytes; infinite for a model without a config.json to read: its cells have a device for themselves."""
        keys: Mapping[str, object] = {
            "backbone": experiment.backbone.model_dump(mode="json"),
            "engine": experiment.engine.model_dump(mode="json"),
            "batch": experiment.train.batch_size,
            "clients": experiment.cohort_size or experiment.partition.num_clients,
        }
        key = json.dumps(keys, sort_keys=True)
        if key not in self._known:
            from fedmllm.runs.resources import WORKSPACE_BYTES, estimate

            try:
                _, memory, _ = estimate(experiment)
            except (FedmllmError, AttributeError):  # a plug-in's model has settings of its own
                self._known[key] = math.inf
            else:
                self._known[key] = sum(line.num_bytes for line in memory) + WORKSPACE_BYTES
        return self._known[key]


def find_devices(names: Sequence[str], experiments: Sequence[Experiment], num_jobs: int) -> list[Device]:
    """Return the devices that cells are spread over, divided into shares for `num_jobs` processes.

    Args:
        names: "cpu", "cuda" (every CUDA device) or a device by its number; without any, every CUDA device if there are
            several and all cells leave the choice open (`backbone.device` "auto" or "cuda").
        experiments: Of the cells.
        num_jobs: Processes at a time, and devices at most; 0 = one a device.

    Returns:
        Each device once, in the order named; empty = each cell runs on its own `backbone.device`.

    Raises:
        ConfigError: This machine has no such device, or a cell that has all devices would share them.
    """
    settings = [("backbone.device_map", getattr(e.backbone, "device_map", ())) for e in experiments]
    settings += [("engine.devices", getattr(e.engine, "devices", ())) for e in experiments]
    if named := [(place, list(own)) for place, own in settings if own]:
        if names:
            raise ConfigError(
                f"--device: cells have {named[0][0]}, which names their devices; leave out one of the two"
            )
        for place, own in named:
            if num_jobs > 1 and any(not name.startswith("cpu") for name in own):
                raise ConfigError(
                    f"--jobs: got {num_jobs}; cells have {place} = {own} and would be on the same devices; "
                    f"allowed: 1, or leave out {place} and let --device give each cell a device"
                )
        return []
    asked = {getattr(experiment.backbone, "device", None) for experiment in experiments}
    if not names and not asked <= {"auto", "cuda"}:
        return []  # torch is not loaded
    import torch

    from fedmllm.backbones.folder import device_of

    count = torch.cuda.device_count()
    if not names and count < 2:
        return []
    names = names or ["cuda"]
    found: list[str] = []
    for name in names:
        try:
            device = device_of(name)
        except ConfigError as error:
            raise ConfigError(f"--device: {str(error).removeprefix('backbone.device: ')}") from error
        if device.type == "cuda":
            found += [f"cuda:{n}" for n in (range(count) if device.index is None else [device.index])]
        else:
            found.append(device.type)
    once = list(dict.fromkeys(found))[: num_jobs or None]
    shares = math.ceil((num_jobs or len(once)) / len(once))
    return [Device(name, shares, math.inf if name == "cpu" else 0.0) for name in once]
