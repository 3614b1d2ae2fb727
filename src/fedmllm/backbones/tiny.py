"""The embedded backbone: MiniCPM-V 2.6 at about a million weights, in the package, pre-trained by us.

`scripts/pretrain_tiny.py` made the folder; `results/pretrain_tiny.json` says with which settings, in what time, and what the
model can do. It is loaded by the same code as the real one.
"""

from __future__ import annotations

from pathlib import Path

from fedmllm.backbones.base import FromFolder, Tiny
from fedmllm.backbones.folder import load_base
from fedmllm.backbones.hf import TransformersBackbone

CHECKPOINT = Path(__file__).with_name("tiny_checkpoint")  # the hub's layout
NAME = "fedmllm/tiny"  # what a saved adapter says it belongs to: a path of this machine would mean nothing elsewhere


def load_tiny(spec: Tiny, seed: int) -> TransformersBackbone:
    """The packaged model, frozen, with fresh LoRA."""
    folder = FromFolder(path=str(CHECKPOINT), precision=spec.precision, device=spec.device)
    model, processor, digest = load_base(folder)
    return TransformersBackbone(model, processor, spec, seed, NAME, digest)
