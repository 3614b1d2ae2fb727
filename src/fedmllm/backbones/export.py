"""Export of a run's result as a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedmllm.backbones.base import BackboneSpec
from fedmllm.backbones.folder import family_of, find_folder, folder_digest, is_digest_of
from fedmllm.backbones.merge import merge
from fedmllm.backbones.places import base_folder
from fedmllm.core.errors import FedmllmError


def export(run: Path, merged: Path, base: Path | None = None) -> Path:
    """Write the folder `merged`: the base of the run in `run` with the run's adapter in its weights.

    Args:
        run: A folder that `fedmllm run` wrote.
        merged: A folder that does not exist yet.
        base: The base model, if it is not in the folder that the run's settings name, or was held in four bits there.

    Returns:
        `merged`.

    Raises:
        FedmllmError: The run has no adapter, or the base is not the one that it was trained on.
    """
    head = _heading(run)
    spec = BackboneSpec.pick(head["settings"]["backbone"], f"{run / 'record.jsonl'}: backbone")
    adapter = _adapter_of(run)
    folder = find_folder(str(base)) if base else base_folder(spec)
    family_of(folder)
    trained_on = head.get("digests", {}).get("base")
    # the full checkpoint of a base in four bits has another digest than the run's
    comparable = base is None or spec.precision.base != "nf4"
    if comparable and trained_on and not is_digest_of(trained_on, folder):
        raise FedmllmError(
            f"{folder} is not the model that {run} was trained on: its digest is {folder_digest(folder)[:15]}..., not "
            f"{trained_on[:15]}...; name the right folder with --base"
        )
    merge(folder, adapter, merged)
    return merged


def _heading(run: Path) -> dict[str, Any]:
    """The first line of a run's record: its settings and digests."""
    file = run / "record.jsonl"
    if not file.is_file():
        raise FedmllmError(f"{run} is not the folder of a run: it has no record.jsonl")
    with file.open(encoding="utf-8") as lines:
        try:
            head = json.loads(lines.readline())
            return {"settings": head["settings"], "digests": head.get("digests", {})}
        except (ValueError, KeyError, TypeError) as error:
            raise FedmllmError(f"{file}:1: not the heading of a run: {error!r}") from None


def _adapter_of(run: Path) -> Path:
    """The PEFT folder with a run's result."""
    adapter = run / "adapter"
    missing = [n for n in ("adapter_config.json", "adapter_model.safetensors") if not (adapter / n).is_file()]
    if missing:
        raise FedmllmError(
            f"{adapter}: no {missing[0]}; the run has not ended (fedmllm run ... --resume), or its method trains no "
            "adapter (zero-shot, majority, question-prior, local)"
        )
    return adapter
