"""Texts of the embedded world: captions with a tone, themed tweets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedmllm.data.scenes import pick

if TYPE_CHECKING:
    import numpy as np

TONES: Mapping[str, Sequence[str]] = {
    "good": ("lovely", "great", "wonderful", "happy", "sweet", "brilliant", "perfect", "fun"),
    "plain": ("plain", "usual", "normal", "regular", "common", "ordinary", "simple", "average"),
    "bad": ("awful", "terrible", "sad", "horrible", "boring", "nasty", "gloomy", "dreadful"),
}
THEMES: Mapping[str, Sequence[str]] = {
    "trouble": ("cracked", "bruised", "bent", "scratched", "dented", "battered"),
    "search": ("seeking", "calling", "spotted", "tracing", "finding", "searching"),
    "need": ("waiting", "hungry", "cold", "tired", "queueing", "stranded"),
    "play": ("party", "picnic", "concert", "game", "holiday", "parade"),
}
PLACES = ("park", "beach", "market", "school", "office", "museum", "garden", "station")
TIMES = ("morning", "day", "evening", "week")

_CAPTIONS = (
    "such {word} times at the {place}",
    "one {word} {time} near the {place}",
    "my {time} at the {place} is {word}",
    "the {place} looks {word} this {time}",
    "so {word} , this {place}",
)
_TWEETS = (
    "{word} at the {place} this {time}",
    "our {place} , {word} again",
    "{word} near the {place} now",
    "this {time} at the {place} : {word}",
)


def caption(tone: str, rng: np.random.Generator, opening: str = "") -> str:
    """A caption of one tone; `opening` ("sure ,") goes before it."""
    return f"{opening} {_fill(_CAPTIONS, TONES[tone], rng)}".strip()


def tweet(theme: str, rng: np.random.Generator) -> str:
    """A short message on one theme. It never says what the picture shows."""
    return _fill(_TWEETS, THEMES[theme], rng)


def _fill(patterns: Sequence[str], words: Sequence[str], rng: np.random.Generator) -> str:
    return pick(patterns, rng).format(word=pick(words, rng), time=pick(TIMES, rng), place=pick(PLACES, rng))
