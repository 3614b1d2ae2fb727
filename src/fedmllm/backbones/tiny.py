"""The embedded backbone: MiniCPM-V 2.6 of about a million weights.

`scripts/pretrain_tiny.py` wrote its folder; `results/pretrain_tiny.json` has the settings, the time and the scores. It is
loaded by the same code as the real model.
"""

from __future__ import annotations

from pathlib import Path

from fedmllm.backbones.base import FromFolder, Tiny
from fedmllm.backbones.folder import load_base
from fedmllm.backbones.hf import TransformersBackbone

CHECKPOINT = Path(__file__).with_name("tiny_checkpoint")  # the hub's layout
NAME = "fedmllm/tiny"  # base of a saved adapter: a path of this machine would mean nothing on another


def load_tiny(spec: Tiny, seed: int) -> TransformersBackbone:
    """The packaged model, frozen, with a new adapter.

    Args:
        spec: How it is held and adapted.
        seed: Source of LoRA's initial values.

    Raises:
        ConfigError: A setting does not fit the model or this machine.
    """
    folder = FromFolder(path=str(CHECKPOINT), precision=spec.precision)
    folder = folder.model_copy(update={"device": spec.device, "device_map": spec.device_map})
    model, processor, digest = load_base(folder)
    return TransformersBackbone(model, processor, spec, seed, NAME, digest)
