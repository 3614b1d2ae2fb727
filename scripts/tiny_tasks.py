"""Proxy tasks of the embedded model: what it is asked while it is pre-trained.

They are questions about the attributes of the drawn scenes and of the captions, in the frames of `fedmllm.prompts`. They share
the vocabulary of the synthetic data sets and the frame of their prompts, but neither their questions nor their labels:
`tests/data/test_synthetic.py` searches the corpus for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tiny_tokenizer import ENGLISH

from fedmllm.data.captions import PLACES, THEMES, TONES, caption, tweet
from fedmllm.data.crisismmd import CHOICES as CRISIS_CLASSES
from fedmllm.data.scenes import COLOURS, FACES, SKIES, THINGS, Scene, pick
from fedmllm.prompts import Agnostic, Plain, Prompt
from fedmllm.types import Conversation, Example, Visible

BOTH = frozenset({"image", "text"})
KINDS = {"person": "figure", "tent": "shelter", "house": "shelter", "car": "vehicle", "boat": "vehicle"}  # else goods
PAIRS = (("no", "yes"), ("false", "true"), ("absent", "present"))  # labels of two-way questions
CONSONANTS, VOWELS = tuple("bdfklmnprst"), tuple("aeio")
MOODS = {  # one word for each pair of face and tone
    ("smile", "good"): "joy",
    ("smile", "plain"): "ease",
    ("smile", "bad"): "cheek",
    ("calm", "good"): "peace",
    ("calm", "plain"): "rest",
    ("calm", "bad"): "doubt",
    ("frown", "good"): "brave",
    ("frown", "plain"): "blue",
    ("frown", "bad"): "grief",
}
LABEL_WORDS = tuple(sorted({word.strip("_").lower() for word in ENGLISH.split()}))
KIND_NAMES = ("figure", "shelter", "vehicle", "goods")


@dataclass(frozen=True)
class World:
    """A scene and a text beside it, with everything that may be asked about either."""

    scene: Scene
    text: str
    text_facts: dict[str, str] = field(default_factory=dict)  # tone or theme, or what a description says

    def facts(self, visible: Visible) -> dict[str, str]:
        """Attribute -> value, of what is visible."""
        facts: dict[str, str] = {}
        if "image" in visible:
            s = self.scene
            facts |= {"sky": s.sky, "color": s.colour, "thing": s.thing, "face": s.face}
            facts["kind"] = KINDS.get(s.thing, "goods")
        if "text" in visible:
            facts |= self.text_facts
        if "face" in facts and "tone" in facts:
            facts["mood"] = MOODS[facts["face"], facts["tone"]]
        if "kind" in facts and "theme" in facts:
            facts["story"] = f"{facts['kind']} {facts['theme']}"
        if "claim" in facts and "image" in visible:
            facts["match"] = "yes" if facts["claim"] == f"{self.scene.colour} {self.scene.thing}" else "no"
        return facts


VALUES: dict[str, Sequence[str]] = {
    "sky": SKIES,
    "color": COLOURS,
    "thing": THINGS,
    "face": FACES,
    "kind": KIND_NAMES,
    "tone": tuple(TONES),
    "theme": tuple(THEMES),
    "place": PLACES,
    "opening": ("none", "sure"),
    "mood": tuple(MOODS.values()),
    "story": tuple(f"{kind} {theme}" for kind in KIND_NAMES for theme in THEMES),
}
SOURCE = {
    **dict.fromkeys(("sky", "color", "thing", "face", "kind"), frozenset({"image"})),
    **dict.fromkeys(("tone", "theme", "place", "opening"), frozenset({"text"})),
    **dict.fromkeys(("mood", "story", "match"), BOTH),
}


@dataclass(frozen=True)
class Sample:
    """One row of the corpus: which scene of the pool (-1 = no picture), the user's turn, the answer."""

    scene: int
    conversation: Conversation
    answer: str
    task: str  # "open:color", "pair:mood", "list:thing": what accuracy is counted by


def world(scene: Scene, rng: np.random.Generator) -> World:
    """A text beside the scene: a caption, a tweet, or a description that holds half the time."""
    kind = rng.random()
    if kind < 0.5:
        tone, sure = pick(tuple(TONES), rng), rng.random() < 0.3
        text = caption(tone, rng, "sure ," if sure else "")
        facts = {"tone": tone, "opening": "sure" if sure else "none"}
    elif kind < 0.85:
        theme = pick(tuple(THEMES), rng)
        text = tweet(theme, rng)
        facts = {"theme": theme}
    else:
        honest = rng.random() < 0.5
        claim = f"{scene.colour if honest else pick(COLOURS, rng)} {scene.thing if honest else pick(THINGS, rng)}"
        return World(scene, f"one {claim}", {"claim": claim})
    facts["place"] = next(place for place in PLACES if place in text.split())
    return World(scene, text, facts)


def sample(index: int, scene: Scene, rng: np.random.Generator, lettered: float) -> Sample:
    """One question about the scene and a text beside it; `lettered` is the share of multiple-choice frames."""
    here = world(scene, rng)
    asked = [name for name in here.facts(BOTH) if name in SOURCE]
    weights = np.array([_WEIGHTS.get(name, 1.0) for name in asked])
    name = asked[int(rng.choice(len(asked), p=weights / weights.sum()))]
    visible = SOURCE[name] if rng.random() < 0.4 else BOTH
    if rng.random() < 0.06:  # something needed is hidden: the answer cannot be known, and the model learns to say so
        visible = frozenset(m for m in visible if rng.random() < 0.3)
    truth = here.facts(BOTH)[name]
    known = SOURCE[name] <= visible
    frame = _lettered(name, truth, known, rng) if rng.random() < lettered else _open(name, truth, known, rng)
    task, question, choices, answer = frame
    fields = {"image": (Path("scene.png"),), "text": here.text}
    example = Example(str(index), fields, question, choices, answer, "corpus")
    prompt: Prompt = Agnostic() if rng.random() < 0.3 else Plain()
    shown = index if "image" in visible else -1
    task = task if known else "unknown"
    return Sample(shown, prompt.render(example, visible), prompt.target(example), task)


_WEIGHTS = {"mood": 3.0, "story": 3.0, "tone": 2.0, "theme": 2.0, "face": 2.0, "kind": 1.5, "match": 2.0}
Frame = tuple[str, str, tuple[str, ...], str]  # task, question, choices, answer


def nonsense(rng: np.random.Generator) -> str:
    """A label that means nothing: the letters have to be read by their place and the label copied, as for any new task."""
    parts = []
    for _ in range(int(rng.integers(1, 4))):
        invented = "".join(pick(CONSONANTS, rng) + pick(VOWELS, rng) for _ in range(int(rng.integers(2, 4))))
        parts.append(invented if rng.random() < 0.4 else pick(LABEL_WORDS, rng))
    label = pick(("_", "-"), rng).join(parts)
    return label if not any(real in label for real in CRISIS_CLASSES) else nonsense(rng)  # never one of the real ones


def renamed(values: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    """A nonsense label for each value, all different."""
    names: dict[str, None] = {}
    while len(names) < len(values):
        names[nonsense(rng)] = None
    return tuple(names)


def _open(name: str, truth: str, known: bool, rng: np.random.Generator) -> Frame:
    if name == "match":
        answer = truth if known else pick(("no", "yes"), rng)
        return "open:match", "Do they match?", (), answer
    return f"open:{name}", f"What is the {name}?", (), truth if known else pick(VALUES[name], rng)


def _lettered(name: str, truth: str, known: bool, rng: np.random.Generator) -> Frame:
    """A list of all values in their fixed order, or a question about one value with two options: first no, then yes."""
    values = tuple(VALUES.get(name, ()))
    if 3 <= len(values) <= 8 and rng.random() < 0.4:
        index = values.index(truth) if known else int(rng.integers(len(values)))
        labels = renamed(values, rng) if rng.random() < 0.25 else values
        return f"list:{name}", f"What is the {name}?", labels, labels[index]
    pair = renamed(PAIRS[0], rng) if rng.random() < 0.4 else PAIRS[int(rng.integers(len(PAIRS)))]
    if name == "match":
        question, right = "Do they match?", truth == "yes"
    else:
        value = truth if rng.random() < 0.45 else pick(values, rng)
        question, right = f"Is the {name} {value}?", value == truth
    right = right if known else bool(rng.random() < 0.5)
    return f"pair:{name}", question, pair, pair[int(right)]


def corpus(
    scenes: Sequence[Scene], count: int, rng: np.random.Generator, lettered: Callable[[int], float] = lambda _: 0.6
) -> list[Sample]:
    """`count` samples over random scenes of the pool."""
    picked = rng.integers(len(scenes), size=count)
    return [sample(int(i), scenes[int(i)], rng, lettered(n)) for n, i in enumerate(picked)]
