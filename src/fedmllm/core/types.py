"""The nouns of the house: what every floor talks about. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fedmllm.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Params: TypeAlias = "dict[str, Tensor]"  # LoRA tensors under PEFT's saved names, float32, CPU: all that ever travels
State: TypeAlias = "dict[str, Params]"  # an aggregator's memory
Modality: TypeAlias = str  # "image", "text", or one camera of a car: "CAM_FRONT"
Visible: TypeAlias = frozenset[Modality]  # what one row still shows
Content: TypeAlias = str | tuple[Path, ...]  # a modality's value: a text, or one or more pictures


@dataclass(frozen=True)
class Example:
    """One row of a data set. Never edited, only hidden (`Shard.visible`)."""

    id: str | int  # as in the file
    fields: Mapping[Modality, Content]  # what the row truly has; a modality it lacks is not a key
    question: str
    choices: tuple[str, ...]  # () = open question
    answer: str
    where: str  # file:line, or file and index: what an error message names
    columns: Mapping[str, str] = field(default_factory=dict)  # for natural splits and metrics: organ, answer_type

    def visible_fields(self, visible: Visible) -> dict[Modality, Content]:
        """The modalities that the row has and a mask leaves, in the row's own order."""
        return {m: content for m, content in self.fields.items() if m in visible}


@dataclass(frozen=True)
class Shard:
    """The rows of one client, and what each of them still shows. May be empty."""

    client: int
    rows: tuple[int, ...]  # indices into the training examples
    visible: tuple[Visible, ...]  # one per row
    name: str = field(default="", compare=False)  # of the site, if the rows name their clients

    def missing_rate(self, modalities: tuple[Modality, ...]) -> float:
        """Share of (row, modality) slots that are hidden, 0..1; 0 for an empty shard."""
        slots = len(self.rows) * len(modalities)
        kept = sum(len(v & frozenset(modalities)) for v in self.visible)
        return 1 - kept / slots if slots else 0.0


@dataclass(frozen=True)
class Picture:
    """An image part of a conversation."""

    path: Path


@dataclass(frozen=True)
class Conversation:
    """One user turn: texts and pictures in the order in which the model reads them."""

    parts: tuple[str | Picture, ...]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(part for part in self.parts if isinstance(part, Picture))

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class ClientUpdate:
    """What one client sends back after a round."""

    client: int
    delta: Params  # local - global, float32, CPU
    num_examples: int
    metrics: Mapping[str, float]  # loss, num_steps, num_tokens, time_s
    control: Params | None = None  # for SCAFFOLD: the client's part of the change of c


@dataclass(frozen=True)
class ClientFailure:
    """A client that was asked and gave nothing usable, and why."""

    client: int
    reason: str


@dataclass(frozen=True)
class Prediction:
    """What the model said about one test row."""

    example: Example
    scores: tuple[float, ...]  # log p(choice | prompt) per choice; () for an open question
    text: str | None  # the generated answer of an open question, already parsed; None = it could not be parsed
    raw: str = ""  # the generation as it came


def visible_of(text: str, modalities: tuple[Modality, ...]) -> Visible:
    """What a test row shows: "all" (or "both"), "none", or modalities joined by "+"."""
    if text in ("all", "both"):
        return frozenset(modalities)
    if text == "none":
        return frozenset()
    named = frozenset(text.split("+"))
    if not named <= set(modalities):
        allowed = ", ".join(["all", "none", *modalities])
        raise ConfigError(f"evaluate.visible: got {text!r}; allowed: {allowed}, or modalities joined by '+'")
    return named


def answer_label(example: Example) -> str:
    """What label skew is about: the answer of a multiple-choice row; all open rows count as one label."""
    return example.answer if example.choices else "(open)"
