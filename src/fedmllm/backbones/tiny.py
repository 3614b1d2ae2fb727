"""The embedded backbone: MiniCPM-V 2.6 of about a million weights.

`scripts/pretrain_tiny.py` wrote its folders. Settings, times, scores: `results/pretrain_tiny.json` for edition 1, which today's
script does not rebuild, `results/pretrain_tiny_2.json` for edition 2, which it does. Loaded by the same code as the real model.
"""

from __future__ import annotations

from pathlib import Path

from fedmllm.backbones.base import FromFolder, Tiny
from fedmllm.backbones.folder import load_base
from fedmllm.backbones.hf import TransformersBackbone

CHECKPOINTS = {n: Path(__file__).with_name(name) for n, name in ((1, "tiny_checkpoint"), (2, "tiny_checkpoint_2"))}


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
    return TransformersBackbone(model, processor, spec, seed, spec.base_name(), digest)
