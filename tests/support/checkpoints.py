"""Checkpoints of two small tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedmllm.core.types import Params, State
from fedmllm.runs.checkpoint import Checkpoints, RunState
from fedmllm.runs.costs import Totals

LIKE: Params = {"b": torch.zeros(3, 2), "a": torch.zeros(4)}  # not in alphabetical order, as safetensors would have it


def run_state(number: int, **changed: Any) -> RunState:
    values: dict[str, Any] = {
        "round": number,
        "client": None,
        "totals": Totals(num_rounds=number, client_s=1.5),
        "results": (),
        "best": None,
        "wall_s": 2.5,
        "record_bytes": 100,
        "settings": {"seed": 1},
        "digests": {"rows": "ab"},
        "versions": {"torch": "2"},
    }
    return RunState.model_validate({**values, **changed})


def values(seed: int) -> Params:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=rng) for name, t in LIKE.items()}


def write(folder: Path, *run_states: RunState, state: State | None = None, keep: int = 2) -> None:
    checkpoints = Checkpoints(folder, keep, b"{}", lambda: None)
    for entry in run_states:
        checkpoints.save(entry, values(entry.totals.num_rounds), state or {})
    checkpoints.wait()
    checkpoints.close()
