"""Sanity checks for an untested model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

from fedmllm.backbones.base import Row
from fedmllm.backbones.hf import TransformersBackbone
from fedmllm.core.types import Conversation, Params, Picture

# Largest relative difference between a row alone and in a batch, by the base's type: matrix products of other shapes
# round otherwise. Four bits: the type that they are widened to.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.05}
ANSWERS = ("yes", "no, never", "A", "B, it is not")
OPTIONS = (("A", "B"), ("yes, it is", "no"), ("(A) yes", "(B)", "C"), ("A", "B"))
NAMES = ("image", "text", "mixed", "scores", "greedy", "gradient", "dropout", "adapter")


@dataclass(frozen=True)
class Check:
    """One property and the observation."""

    name: str
    good: bool
    seen: str


def checkup(backbone: TransformersBackbone) -> list[Check]:
    """Run all checks; the adapter is as before afterwards.

    Args:
        backbone: Any loaded model.

    Returns:
        One check a property, in the order of `NAMES`.
    """
    before = backbone.lora()
    with TemporaryDirectory() as folder:
        prompts = _prompts(Path(folder))
        rows = [backbone.encode(prompt, answer) for prompt, answer in zip(prompts, ANSWERS, strict=True)]
        try:
            backbone.set_lora(_stirred(before))
            checks: dict[str, Callable[[], tuple[bool, str]]] = {
                "image": lambda: _losses(backbone, rows[:2]),
                "text": lambda: _losses(backbone, [rows[2], rows[3]]),
                "mixed": lambda: _losses(backbone, rows),
                "scores": lambda: _scores(backbone, prompts),
                "greedy": lambda: _greedy(backbone, prompts),
                "gradient": lambda: _gradient(backbone, rows),
                "dropout": lambda: _dropout(backbone, rows),
                "adapter": lambda: _adapter(backbone, Path(folder) / "adapter"),
            }
            return [Check(name, *checks[name]()) for name in NAMES]
        finally:
            backbone.set_lora(before)


def _prompts(folder: Path) -> list[Conversation]:
    """One picture, two pictures, text alone, longer text alone."""
    pictures = []
    for name, size, colour in (("small", (60, 80), "orange"), ("wide", (220, 90), "navy")):
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).ellipse((10, 10, size[0] - 20, size[1] - 20), fill=colour)
        image.save(folder / f"{name}.png")
        pictures.append(Picture(folder / f"{name}.png"))
    return [
        Conversation((pictures[0], "What colour is the disc?")),
        Conversation((pictures[1], "Is this larger, or ", pictures[0], " this one?")),
        Conversation(("Is water wet? (A) yes (B) no.",)),
        Conversation(("Read this twice, and answer with one letter: is fire cold? (A) yes (B) no.",)),
    ]


def _stirred(params: Params) -> Params:
    """B drawn instead of zero, so that LoRA does something."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(t.shape, generator=generator, dtype=t.dtype) * 0.02 if ".lora_B." in name else t
        for name, t in params.items()
    }


def _tolerance(backbone: TransformersBackbone) -> float:
    return TOLERANCE[backbone.base.dtype]


def _worst(together: Sequence[float], alone: Sequence[float]) -> float:
    """The largest difference, relative to the value if that is over 1."""
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(together, alone, strict=True))


def _near(backbone: TransformersBackbone, together: Sequence[float], alone: Sequence[float]) -> tuple[bool, str]:
    worst = _worst(together, alone)
    return worst <= _tolerance(backbone), f"batch against alone: {worst:.1e}"


def _loss(backbone: TransformersBackbone, rows: Sequence[Row], seeds: Sequence[int] | None = None) -> list[float]:
    with torch.no_grad():
        nll_B, _ = backbone.loss(backbone.collate(rows), seeds)
    return [float(v) for v in nll_B]


def _losses(backbone: TransformersBackbone, rows: Sequence[Row]) -> tuple[bool, str]:
    return _near(backbone, _loss(backbone, rows), [_loss(backbone, [row])[0] for row in rows])


def _scores(backbone: TransformersBackbone, prompts: Sequence[Conversation]) -> tuple[bool, str]:
    together = backbone.score(prompts, OPTIONS)
    alone = [backbone.score([prompt], [some])[0] for prompt, some in zip(prompts, OPTIONS, strict=True)]
    return _near(backbone, [s for row in together for s in row], [s for row in alone for s in row])


def _greedy(backbone: TransformersBackbone, prompts: Sequence[Conversation]) -> tuple[bool, str]:
    together = backbone.generate(prompts, 5)
    same = sum(backbone.generate([prompt], 5)[0] == text for prompt, text in zip(prompts, together, strict=True))
    # in bfloat16 two likeliest tokens may change places; that is rounding, not padding
    needed = len(prompts) if backbone.base.dtype != torch.bfloat16 else 1
    return same >= needed, f"{same} of {len(prompts)} answers as alone"


def _gradient(backbone: TransformersBackbone, rows: Sequence[Row]) -> tuple[bool, str]:
    live = {name: p for name, p in backbone.trainable().items() if ".lora_B." in name}
    reached = []
    for group in (rows[:2], rows[2:]):
        nll_B, _ = backbone.loss(backbone.collate(group), range(len(group)))
        gradients: tuple[Tensor, ...] = torch.autograd.grad(nll_B.sum(), list(live.values()))
        reached.append(sum(bool(g.isfinite().all()) and bool(g.any()) for g in gradients))
    return min(reached) == len(live), f"{reached[0]} of {len(live)} lora_B with images, {reached[1]} with text"


def _dropout(backbone: TransformersBackbone, rows: Sequence[Row]) -> tuple[bool, str]:
    seeds = list(range(5, 5 + len(rows)))
    alone = [_loss(backbone, [row], [seed])[0] for row, seed in zip(rows, seeds, strict=True)]
    return _near(backbone, _loss(backbone, rows, seeds), alone)


def _adapter(backbone: TransformersBackbone, folder: Path) -> tuple[bool, str]:
    params = backbone.lora()
    backbone.save(folder)
    saved = load_file(folder / "adapter_model.safetensors")
    same = saved.keys() == params.keys() and all(torch.equal(saved[name], t) for name, t in params.items())
    backbone.set_lora(saved)
    again = all(torch.equal(t, params[name]) for name, t in backbone.lora().items())
    return same and again, f"{len(saved)} tensors written and read back"
