"""The embedded backbone: MiniCPM-V 2.6 of about a million weights.

`scripts/pretrain_tiny.py` wrote its folders. Settings, times, scores: `results/pretrain_tiny.json` for edition 1, which today's
script does not rebuild, `results/pretrain_tiny_2.json` for edition 2, which it does. Loaded by the same code as the real model.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedmllm.backbones.base import BackboneSpec, FromFolder, Tiny
from fedmllm.backbones.folder import load_base
from fedmllm.backbones.hf import TransformersBackbone
from fedmllm.core.errors import ConfigError

CHECKPOINTS = {n: Path(__file__).with_name(name) for n, name in ((1, "tiny_checkpoint"), (2, "tiny_checkpoint_2"))}
BASE_NAMES = {
    1: "fedmllm/tiny",
    2: "fedmllm/tiny-2",
}  # base of a saved adapter: a path would mean nothing on another machine


def load_tiny(spec: Tiny, seed: int) -> TransformersBackbone:
    """The packaged model, frozen, with a new adapter.

    Args:
        spec: How it is held and adapted.
        seed: Source of LoRA's initial values.

    Raises:
        ConfigError: A setting does not fit the model or this machine.
    """
    folder = FromFolder(path=str(CHECKPOINTS[spec.edition]), precision=spec.precision)
    folder = folder.model_copy(update={"device": spec.device, "device_map": spec.device_map})
    model, processor, digest = load_base(folder)
    return TransformersBackbone(model, processor, spec, seed, BASE_NAMES[spec.edition], digest)


def refuse_other_edition(adapter: Path, spec: BackboneSpec) -> None:
    """Refuse an adapter of another edition: its tensors have the same names and shapes.

    Args:
        adapter: A PEFT folder; one that names no edition passes.
        spec: The model that it is to be loaded into.

    Raises:
        ConfigError: The adapter was trained on another edition than `spec.edition`.
    """
    config = adapter / "adapter_config.json"
    if not isinstance(spec, Tiny) or not config.is_file():
        return
    try:
        trained_on = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        return  # not a PEFT adapter: its reader says so
    of_edition = {name: edition for edition, name in BASE_NAMES.items()}.get(trained_on, spec.edition)
    if of_edition != spec.edition:
        raise ConfigError(
            f"{adapter}: trained on edition {of_edition} of the embedded model; backbone.edition is {spec.edition}"
        )
