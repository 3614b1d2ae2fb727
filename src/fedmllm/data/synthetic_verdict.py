"""Graded embedded set, with adjustable weights of image, text and interaction."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedmllm.core.spec import ADDED_LATER
from fedmllm.core.types import Visible
from fedmllm.data.captions import TONES, caption
from fedmllm.data.ceilings import LawCell, two_way
from fedmllm.data.scenes import COLOURS, FACES, SKIES, THINGS, Scene, pick
from fedmllm.data.synthetic import SyntheticMemes

if TYPE_CHECKING:
    import numpy as np

FACE = {"smile": 1.0, "calm": 0.0, "frown": -1.0}
TONE = {"good": 1.0, "plain": 0.0, "bad": -1.0}
# Weaker signals, each with mean 0 over the rows, so that a weight moves no mean: night is a third of the skies.
SKY = {"day": 0.2, "dusk": 0.2, "night": -0.4}
OPENING = {"": 0.16, "sure ,": -0.24}
SURE_RATE = 0.4


class SyntheticVerdict(SyntheticMemes):
    """A verdict drawn with known odds. Faces, tones and skies are uniform and independent; 40 % of texts open with "sure ,".

    With f, t, s, o the values in `FACE`, `TONE`, `SKY` and `OPENING` of a row,

        P(y = 1) = noise + (1 - 2 noise) sigmoid(image_weight (f + s) + text_weight (t + o) + interaction_weight f t)

    The default weights give ceilings of the AUC of 0.926 on complete rows, 0.788 image only and 0.782 text only. Rows of
    one seed have the same pictures and texts under all weights.
    """

    question = "Is the content approved?"
    choices = labels = ("low", "high")

    name: Literal["synthetic-verdict"] = "synthetic-verdict"
    wording: Annotated[Literal[1, 2], ADDED_LATER] = 1
    """1: "Is the content approved?", low or high; 2: "Which pool is the content in?", beta or alpha. Each was chosen so that
    the frozen embedded model of that edition ranks rows nearly at random (results/LOG.md). Rows and labels are the same."""
    image_weight: float = 2.5
    """Weight of face and sky in the log odds."""
    text_weight: float = 2.5
    """Weight of tone and opening in the log odds."""
    interaction_weight: float = 1.0
    """Weight of the product of face and tone in the log odds."""
    noise: float = Field(0.0, ge=0, lt=0.5)
    """Share of the labels that is flipped."""

    def row(self, rng: np.random.Generator) -> tuple[Scene, str, bool]:
        scene = Scene(pick(SKIES, rng), pick(THINGS, rng), pick(COLOURS, rng), pick(FACES, rng))
        tone = pick(tuple(TONES), rng)
        opening = "sure ," if rng.random() < SURE_RATE else ""
        text = caption(tone, rng, opening)
        label = bool(rng.random() < self.probability(scene.face, scene.sky, tone, opening))
        return scene, text, label

    def probability(self, face: str, sky: str, tone: str, opening: str) -> float:
        """P(y = 1) of such a row."""
        f, t = FACE[face], TONE[tone]
        odds = self.image_weight * (f + SKY[sky]) + self.text_weight * (t + OPENING[opening])
        odds += self.interaction_weight * f * t
        positive = 0.5 * (1 + math.tanh(odds / 2))  # the sigmoid, without overflow
        return self.noise + (1 - 2 * self.noise) * positive

    def frame(self) -> tuple[str, tuple[str, str], tuple[str, str]]:
        if self.wording == 1:
            return super().frame()
        return "Which pool is the content in?", ("beta", "alpha"), ("beta", "alpha")

    def ceilings(self, visible: Visible) -> Mapping[str, float]:
        return two_way(self._cells(), visible)

    def _cells(self) -> Iterator[LawCell]:
        for face, sky, tone, opening in product(FACE, SKY, TONE, OPENING):
            positive = self.probability(face, sky, tone, opening)
            of_opening = SURE_RATE if opening else 1 - SURE_RATE
            mass = of_opening / (len(FACE) * len(SKY) * len(TONE))
            yield LawCell({"image": (face, sky), "text": (tone, opening)}, mass, (1 - positive, positive))

    def _variant(self) -> str:
        weights = (self.image_weight, self.text_weight, self.interaction_weight, self.noise)
        return f"-{hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:8]}"
