"""Pictures of the embedded world: small cartoons with four attributes.

Both synthetic data sets and the pre-training of the embedded model draw their pictures here, so that a model which
can read these attributes has seen the vocabulary but none of the questions that the sets ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SIZE = 56  # pixels a side: 8 x 8 patches of the embedded model
SUPERSAMPLING = 2  # drawn larger, then averaged: PIL draws hard edges, and a mouth is two pixels high

SKIES = ("day", "dusk", "night")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
THINGS = ("person", "tent", "house", "car", "boat", "box", "ball", "star")
FACES = ("smile", "calm", "frown")

Rgb: TypeAlias = tuple[int, int, int]

_SKY: dict[str, Rgb] = {"day": (150, 200, 240), "dusk": (236, 158, 98), "night": (26, 28, 62)}
_GROUND: dict[str, Rgb] = {"day": (112, 164, 84), "dusk": (122, 108, 70), "night": (38, 58, 46)}
_COLOUR: dict[str, Rgb] = {
    "red": (208, 48, 44),
    "green": (40, 140, 62),
    "blue": (50, 84, 204),
    "yellow": (238, 208, 50),
    "purple": (134, 58, 160),
    "white": (242, 240, 232),
}


@dataclass(frozen=True)
class Scene:
    """Content of a picture. Place, size and clutter are random and carry no meaning."""

    sky: str
    thing: str
    colour: str
    face: str

    @classmethod
    def random(cls, rng: np.random.Generator) -> Scene:
        """Each attribute uniform and independent."""
        return cls(pick(SKIES, rng), pick(THINGS, rng), pick(COLOURS, rng), pick(FACES, rng))


def pick(options: Sequence[str], rng: np.random.Generator) -> str:
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB picture, SIZE pixels a side."""
    from PIL import Image, ImageDraw

    k = SUPERSAMPLING
    image = Image.new("RGB", (SIZE * k, SIZE * k), _jitter(_SKY[scene.sky], rng))
    pen = ImageDraw.Draw(image)
    horizon = int(rng.integers(34, 44)) * k
    pen.rectangle((0, horizon, SIZE * k, SIZE * k), fill=_jitter(_GROUND[scene.sky], rng))
    _heaven(pen, scene.sky, horizon, rng)
    for _ in range(rng.integers(2, 6)):  # stones in the grass
        stone = _box(rng.uniform(0, SIZE) * k, rng.uniform(horizon, SIZE * k), k, k)
        pen.ellipse(stone, fill=_jitter(_GROUND[scene.sky], rng, 40))
    radius = float(rng.uniform(15, 19)) * k
    x, y = float(rng.uniform(21, 35)) * k, float(rng.uniform(27, 34)) * k
    _thing(pen, scene, x, y, radius, _jitter(_COLOUR[scene.colour], rng))
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _heaven(pen: Any, sky: str, horizon: int, rng: np.random.Generator) -> None:
    """A sun, a low sun or stars: the sky's colour alone would be one number."""
    k = SUPERSAMPLING
    if sky == "night":
        for _ in range(8):
            star = _box(rng.uniform(0, SIZE) * k, rng.uniform(0, 30) * k, k / 2, k / 2)
            pen.ellipse(star, fill=(230, 230, 210))
        return
    x = float(rng.choice([rng.uniform(4, 10), rng.uniform(46, 52)])) * k
    y = float(rng.uniform(4, 9)) * k if sky == "day" else horizon - 2 * k
    pen.ellipse(_box(x, y, 4 * k, 4 * k), fill=(252, 232, 120) if sky == "day" else (250, 110, 70))


def _thing(pen: Any, scene: Scene, x: float, y: float, r: float, fill: Rgb) -> None:
    """The thing around (x, y), about r in radius, with its face where it has most room."""
    dark = (30, 26, 30)
    face_y, face_r = y, r * 0.6
    match scene.thing:
        case "person":
            pen.polygon([(x, y - r * 0.2), (x - r * 0.75, y + r * 1.1), (x + r * 0.75, y + r * 1.1)], fill=fill)
            face_y, face_r = y - r * 0.35, r * 0.55
            pen.ellipse(_box(x, face_y, r * 0.72, r * 0.72), fill=fill, outline=dark)
        case "tent":
            pen.polygon([(x, y - r * 1.2), (x - r * 1.3, y + r), (x + r * 1.3, y + r)], fill=fill)
            face_y, face_r = y + r * 0.35, r * 0.5
        case "house":
            pen.rectangle(_box(x, y + r * 0.3, r, r * 0.75), fill=fill)
            pen.polygon([(x, y - r * 1.2), (x - r * 1.2, y - r * 0.4), (x + r * 1.2, y - r * 0.4)], fill=dark)
            face_y = y + r * 0.3
        case "car":
            pen.rectangle(_box(x, y, r * 1.25, r * 0.6), fill=fill)
            pen.rectangle(_box(x, y - r * 0.75, r * 0.7, r * 0.3), fill=fill, outline=dark)
            for side in (-0.75, 0.75):
                pen.ellipse(_box(x + side * r, y + r * 0.75, r * 0.3, r * 0.3), fill=dark)
        case "boat":
            pen.polygon(
                [(x - r * 1.4, y - r * 0.4), (x + r * 1.4, y - r * 0.4), (x + r * 0.8, y + r), (x - r * 0.8, y + r)],
                fill=fill,
            )
            pen.line((x, y - r * 0.4, x, y - r * 1.3), fill=dark, width=SUPERSAMPLING)
            pen.polygon([(x, y - r * 1.3), (x + r * 0.8, y - r * 0.6), (x, y - r * 0.6)], fill=(240, 240, 240))
            face_y, face_r = y + r * 0.2, r * 0.5
        case "box":
            pen.rectangle(_box(x, y, r, r), fill=fill, outline=dark, width=SUPERSAMPLING)
        case "ball":
            pen.ellipse(_box(x, y, r, r), fill=fill)
        case _:
            pen.regular_polygon((x, y, r * 1.35), 3, fill=fill)
            pen.regular_polygon((x, y, r * 1.35), 3, rotation=180, fill=fill)
    _face(pen, scene.face, x, face_y, face_r, dark if sum(fill) > 400 else (245, 240, 230))


def _face(pen: Any, face: str, x: float, y: float, r: float, ink: Rgb) -> None:
    """Eyes and a mouth; a smile has pink cheeks and a frown two tears, since a mouth alone is a few pixels."""
    for side in (-1, 1):
        pen.ellipse(_box(x + side * r * 0.45, y - r * 0.5, r * 0.17, r * 0.17), fill=ink)
        mark = _box(x + side * r * 0.85, y + r * 0.05, r * 0.24, r * 0.24)
        if face == "smile":
            pen.ellipse(mark, fill=(255, 130, 160))
        elif face == "frown":
            pen.ellipse(mark, fill=(150, 225, 255))
    if face == "calm":
        pen.line((x - r * 0.6, y + r * 0.5, x + r * 0.6, y + r * 0.5), fill=ink, width=2 * SUPERSAMPLING)
    elif face == "smile":
        pen.chord(_box(x, y + r * 0.2, r * 0.65, r * 0.7), 0, 180, fill=ink)
    else:
        pen.chord(_box(x, y + r * 0.9, r * 0.65, r * 0.7), 180, 360, fill=ink)


def _box(x: float, y: float, rx: float, ry: float) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what lies around (x, y)."""
    return (x - rx, y - ry, x + rx, y + ry)


def _jitter(colour: Rgb, rng: np.random.Generator, spread: int = 14) -> Rgb:
    """The colour, each channel moved by up to `spread`."""
    moved = [min(255, max(0, c + int(d))) for c, d in zip(colour, rng.integers(-spread, spread + 1, 3), strict=True)]
    return (moved[0], moved[1], moved[2])
