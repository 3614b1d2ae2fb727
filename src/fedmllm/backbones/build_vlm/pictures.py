"""Captions and questions about easy-VQA's training pictures, made from their known contents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmllm.backbones.build_vlm.sources import LICENCES, VERSIONS, package_file
from fedmllm.core.errors import DataError

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
HELD_OUT = 100  # pictures that the connector is evaluated on


@dataclass(frozen=True)
class CaptionScene:
    """A picture of one coloured shape."""

    path: Path
    shape: str
    color: str


def easy_vqa_scenes() -> list[CaptionScene]:
    """The training pictures of the package easy-vqa whose shape and colour its questions state.

    The test pictures are not read.

    Raises:
        ConfigError: The package is not installed.
        DataError: Its questions are not as expected.
    """
    file = package_file("easy-vqa", "data/train/questions.json", "")
    shapes: dict[int, str] = {}
    colors: dict[int, str] = {}
    for _, answer, picture in json.loads(file.read_text(encoding="utf-8")):
        known = shapes if answer in SHAPES else colors if answer in COLORS else None
        if known is not None and known.setdefault(picture, answer) != answer:
            raise DataError(f"{file}: picture {picture} has two answers: {known[picture]!r} and {answer!r}")
    folder = file.parent / "images"
    return [CaptionScene(folder / f"{i}.png", shapes[i], colors[i]) for i in sorted(shapes.keys() & colors.keys())]


def origin() -> str:
    """The source and the licence of the pictures."""
    return f"package easy-vqa {VERSIONS['easy-vqa']}, training pictures ({LICENCES['easy-vqa']})"


def questions(scene: CaptionScene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """A caption, one of two attribute questions and a yes/no question with equal chances, as (question, answer)."""
    attribute = [
        ("Which shape does the picture show?", scene.shape),
        (f"Which color does the {scene.shape} have?", scene.color),
    ][rng.integers(2)]
    kind, own, all_ = [("shape", scene.shape, SHAPES), ("color", scene.color, COLORS)][rng.integers(2)]
    right = bool(rng.integers(2))
    named = own if right else str(rng.choice([word for word in all_ if word != own]))
    asked = f"Does the picture show a {named}?" if kind == "shape" else f"Is the shape {named}?"
    if rng.integers(2):
        return [
            ("Describe the picture.", f"a {scene.color} {scene.shape}"),
            attribute,
            (asked, "yes" if right else "no"),
        ]
    negated = f"Is the {kind} something other than {named}?"
    return [
        ("Describe the picture.", f"a {scene.color} {scene.shape}"),
        attribute,
        (negated, "no" if right else "yes"),
    ]
