"""The embedded backbone: MiniCPM-V 2.6 of about a million weights.

`scripts/pretrain_tiny.py` wrote its folder; `results/pretrain_tiny.json` has the settings, the time and the scores. It is
loaded by the same code as the real model.
"""

from __future__ import annotations

from pathlib import Path

from fedmllm.backbones.base import FromFolder, Tiny
from fedmllm.backbones.folder import load_base
from fedmllm.backbones.hf import TransformersBackbone

CHECKPOINTS = {n: Path(__file__).with_name(name) for n, name in ((1, "tiny_checkpoint"), (2, "tiny_checkpoint_2"))}
NAMES = {1: "fedmllm/tiny", 2: "fedmllm/tiny-2"}  # base of a saved adapter: a path would mean nothing on another machine


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
    return TransformersBackbone(model, processor, spec, seed, NAMES[spec.edition], digest)
