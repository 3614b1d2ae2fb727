"""Proxy tasks of the embedded model: what it is asked while it is pre-trained.

They are questions about the attributes of the drawn scenes and of the captions, in the frames of `fedmllm.data.prompts`. They
share the vocabulary of the synthetic data sets and the frame of their prompts, but neither their questions nor their labels:
`tests/data/test_synthetic.py` searches the corpus for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tiny_tokenizer import ENGLISH

from fedmllm.core.types import Conversation, Example
from fedmllm.data.captions import PLACES, THEMES, TONES, caption, tweet
from fedmllm.data.crisismmd import CHOICES as CRISIS_CLASSES
from fedmllm.data.prompts import Agnostic, Plain, Prompt
from fedmllm.data.scenes import COLOURS, FACES, SKIES, THINGS, Scene, pick

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
# Adjectives for some of the moods: yes/no questions about a joint property. None holds both moods of a contradiction
# ("cheek" and "brave"), so the 2-way set's label is not among them.
NATURES = {
    "warm": ("joy", "ease", "peace"),
    "heavy": ("grief", "doubt", "blue"),
    "still": ("rest", "peace", "ease", "blue"),
    "loud": ("joy", "grief", "cheek"),
    "odd": ("cheek", "doubt", "ease"),
    "firm": ("brave", "rest", "grief"),
    "soft": ("peace", "blue", "brave"),
    "sharp": ("cheek", "grief", "doubt"),
    "light": ("joy", "rest", "cheek"),
    "deep": ("grief", "brave", "peace", "doubt"),
}
KIND_NAMES = ("figure", "shelter", "vehicle", "goods")
CASES = ("amber", "birch", "coral", "delta", "ember", "flint", "grove", "heron")  # of (kind, theme), eight for sixteen
CASE_OF = ((0, 5, 2, 7), (3, 1, 7, 5), (6, 5, 4, 3), (1, 1, 1, 1))  # rows: kinds, columns: themes; not the 8-way set's
LABEL_WORDS = tuple(sorted({word.strip("_").lower() for word in ENGLISH.split()}))


@dataclass(frozen=True)
class Inputs:
    """A scene, its text, and every attribute of either: name -> value."""

    scene: Scene
    text: str
    facts: dict[str, str]


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
    "case": CASES,
}
SOURCE = {
    **dict.fromkeys(("sky", "color", "thing", "face", "kind"), frozenset({"image"})),
    **dict.fromkeys(("tone", "theme", "place", "opening"), frozenset({"text"})),
    **dict.fromkeys(("mood", "story", "case", "nature"), BOTH),
}
# How often an attribute is asked for in each form, relative to the others: what is joint, or hard to see, more often.
FORMS: dict[str, dict[str, float]] = {
    "open": {"sky": 1, "color": 1, "thing": 2, "face": 2, "kind": 2, "tone": 2, "theme": 2, "place": 1, "opening": 1, "mood": 3,
             "story": 2},
    "list": {"sky": 1, "color": 1, "thing": 1, "face": 1, "kind": 1, "tone": 1, "theme": 1, "place": 1, "case": 5},
    "pair": {"sky": 2, "color": 1, "face": 2, "kind": 0.5, "tone": 3, "theme": 1, "opening": 2, "mood": 3, "nature": 4},
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One row of the corpus: which scene of the pool (-1 = no picture), the user's turn, the answer."""

    scene: int
    conversation: Conversation
    answer: str
    task: str  # "open:color", "pair:mood", "list:thing": what accuracy is counted by


def inputs(scene: Scene, rng: np.random.Generator) -> Inputs:
    """A scene with a caption or a tweet, and the attributes that may be asked for."""
    facts = {"sky": scene.sky, "color": scene.colour, "thing": scene.thing, "face": scene.face}
    facts["kind"] = kind = KINDS.get(scene.thing, "goods")
    if rng.random() < 0.6:
        tone, sure = pick(tuple(TONES), rng), rng.random() < 0.3
        text = caption(tone, rng, "sure ," if sure else "")
        facts |= {"tone": tone, "opening": "sure" if sure else "none", "mood": MOODS[scene.face, tone]}
        facts["nature"] = facts["mood"]
    else:
        theme = pick(tuple(THEMES), rng)
        text = tweet(theme, rng)
        facts |= {"theme": theme, "story": f"{kind} {theme}"}
        facts["case"] = CASES[CASE_OF[KIND_NAMES.index(kind)][list(THEMES).index(theme)]]
    facts["place"] = next(place for place in PLACES if place in text.split())
    return Inputs(scene, text, facts)


def sample(index: int, scene: Scene, rng: np.random.Generator, lettered: float) -> Sample:
    """One question about the scene and its text; `lettered` is the share of multiple-choice frames."""
    here = inputs(scene, rng)
    form = ("pair" if rng.random() < 0.75 else "list") if rng.random() < lettered else "open"
    weights = {name: weight for name, weight in FORMS[form].items() if name in here.facts}
    name = list(weights)[int(rng.choice(len(weights), p=np.array(list(weights.values())) / sum(weights.values())))]
    visible = SOURCE[name] if rng.random() < 0.4 else BOTH
    if rng.random() < 0.06:  # something needed is hidden: the answer cannot be known, and the model learns to say so
        visible = frozenset(m for m in sorted(visible) if rng.random() < 0.3)
    known = SOURCE[name] <= visible
    question, choices, answer = _FORMS[form](name, here.facts[name], known, rng)
    fields = {"image": (Path("scene.png"),), "text": here.text}
    example = Example(str(index), fields, question, choices, answer, "corpus")
    prompt: Prompt = Agnostic() if rng.random() < 0.3 else Plain()
    pool_index = index if "image" in visible else -1
    task = f"{form}:{name}" if known else "unknown"
    return Sample(pool_index, prompt.render(example, visible), prompt.target(example), task)


Frame = tuple[str, tuple[str, ...], str]  # question, choices, answer


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
    return f"What is the {name}?", (), truth if known else pick(VALUES[name], rng)


def _list(name: str, truth: str, known: bool, rng: np.random.Generator) -> Frame:
    """All values, in their fixed order."""
    values = tuple(VALUES[name])
    index = values.index(truth) if known else int(rng.integers(len(values)))
    labels = renamed(values, rng) if rng.random() < 0.25 else values
    return f"What is the {name}?", labels, labels[index]


def _pair(name: str, truth: str, known: bool, rng: np.random.Generator) -> Frame:
    """A question about one value, with two options: first no, then yes. Yes is right about half the time."""
    pair = renamed(PAIRS[0], rng) if rng.random() < 0.25 else PAIRS[int(rng.integers(len(PAIRS)))]
    wanted = rng.random() < 0.5
    if name == "nature":
        fitting = [word for word, moods in NATURES.items() if (truth in moods) == wanted]
        value, right = pick(fitting or list(NATURES), rng), wanted
        name = "mood"
    else:
        others = [value for value in VALUES[name] if value != truth]
        value, right = truth if wanted else pick(others, rng), wanted
    right = right if known else bool(rng.random() < 0.5)
    return f"Is the {name} {value}?", pair, pair[int(right)]


_FORMS: dict[str, Callable[[str, str, bool, np.random.Generator], Frame]] = {
    "open": _open,
    "list": _list,
    "pair": _pair,
}


def corpus(scenes: Sequence[Scene], count: int, rng: np.random.Generator) -> list[Sample]:
    """`count` samples over random scenes of the pool: first mostly open questions, from which the attributes are learned
    fast; multiple choice, which builds on them, rises to 80 % over the first quarter."""
    picked = rng.integers(len(scenes), size=count)
    return [sample(int(i), scenes[int(i)], rng, 0.3 + 0.5 * min(1.0, 4 * n / count)) for n, i in enumerate(picked)]
