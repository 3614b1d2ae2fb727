"""Core data types shared by every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from fedmllm.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Params: TypeAlias = "dict[str, Tensor]"  # LoRA tensors under PEFT's saved names, float32, CPU: all that ever travels
State: TypeAlias = "dict[str, Params]"  # an aggregator's memory
Modality: TypeAlias = str  # "image", "text", or one camera of a car: "CAM_FRONT"
Visible: TypeAlias = frozenset[Modality]  # what one row still shows
Content: TypeAlias = str | tuple[Path, ...]  # a modality's value: a text, or one or more pictures
OPEN_LABEL = "(open)"  # the label of an open question


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a data set. Never edited, only hidden (`Shard.visible`)."""

    id: str | int  # as in the file
    fields: Mapping[Modality, Content]  # what the row truly has; a modality it lacks is not a key
    question: str
    choices: tuple[str, ...]  # () = open question
    answer: str
    where: str  # file:line, or file and index: what an error message names
    columns: Mapping[str, str] = field(default_factory=dict)  # for natural splits and metrics: organ, answer_type
    pieces: tuple[str, ...] = ()  # the question between its pictures, one more than pictures; () = these come first
    announced: frozenset[Modality] = frozenset()  # texts that a prompt puts under their modality's name, not "Text"

    def visible_fields(self, visible: Visible) -> dict[Modality, Content]:
        """The modalities that the row has and a mask leaves, in the row's own order."""
        return {m: content for m, content in self.fields.items() if m in visible}


class _Draft:
    """An `Example` in the making: it has the same slots, and setting these takes a quarter of the time."""

    __slots__ = Example.__slots__

    def __init__(
        self,
        id_: str | int,
        fields: Mapping[Modality, Content],
        question: str,
        choices: tuple[str, ...],
        answer: str,
        where: str,
        columns: Mapping[str, str],
        announced: frozenset[Modality],
    ) -> None:
        self.id = id_
        self.fields = fields
        self.question = question
        self.choices = choices
        self.answer = answer
        self.where = where
        self.columns = columns
        self.pieces: tuple[str, ...] = ()
        self.announced = announced
        self.__class__ = Example  # type: ignore[assignment]


quick_example = cast("Callable[..., Example]", _Draft)
"""Equal to `Example` with the values that `_Draft` takes, and made four times as fast."""


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
class Round:
    """One round, as both halves of an algorithm see it."""

    number: int  # from 1
    seed: int
    num_rounds: int
    cohort: tuple[int, ...]  # the clients that are asked, ascending
    num_clients: int  # that can be asked: N in the papers
    ranks: tuple[int, ...] = ()  # `lora.ranks`; () = every client has the full rank

    def rank(self, client: int) -> int:
        """The LoRA rank of a client; 0 = the full rank. Ranks are assigned in turn: client k has ranks[k mod len]."""
        return self.ranks[client % len(self.ranks)] if self.ranks else 0


@dataclass(frozen=True, eq=False)
class Sent:
    """Tensors that one client works with in one round.

    The client's rank is that of `start`. Names that neither train nor are kept stay as they are in `start`.
    """

    start: Params
    """The adapter that training starts from, of the client's own rank."""
    trains: frozenset[str] | None = None
    """Names that train; None = all of `start`."""
    keeps: frozenset[str] = frozenset()
    """Names whose value is the client's own once it has one. They are neither sent nor returned."""
    known: frozenset[str] = frozenset()
    """Names that hold their seeded initial value, which every client makes itself. They are not sent."""
    frozen: Params = field(default_factory=dict)
    """An additive adapter of any rank that does not train; {} = none."""
    extra: Params = field(default_factory=dict)
    """Other tensors that travel to the client, such as SCAFFOLD's c."""
    scale: float = 1.0
    """Factor of the trained adapter's product while it trains."""

    def trained(self) -> frozenset[str]:
        """Names of the tensors that train."""
        return frozenset(self.start) if self.trains is None else self.trains

    def returned(self) -> Params:
        """The tensors of `start` whose change travels back, in the order of `start`."""
        trained = self.trained() - self.keeps
        return {name: t for name, t in self.start.items() if name in trained}

    def travelling(self) -> Params:
        """The tensors that travel to the client, under their names; those of `frozen` and `extra` with a prefix."""
        own = self.keeps | self.known
        return {
            **{name: t for name, t in self.start.items() if name not in own},
            **{f"frozen/{name}": t for name, t in self.frozen.items()},
            **{f"extra/{name}": t for name, t in self.extra.items()},
        }


@dataclass(frozen=True, eq=False)
class LocalRule:
    """Changes to a client's gradients, which the algorithm's client half asks for."""

    mu: Mapping[str, float] = field(default_factory=dict)
    """Proximal weight of a tensor: mu (w - w_start) is added to its gradient. It adds to the objective's."""
    shift: Params = field(default_factory=dict)
    """Added to every gradient."""
    penalty: Callable[[float, Params], Params] | None = None
    """(share of the round's steps that is done, 0..1; weights) -> gradients of further terms of the loss, for some names."""
    mean_gradient: bool = False
    """True if `Outcome.mean_gradient` is needed."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """A client's training in one round, as the algorithm's client half sees it."""

    sent: Sent
    delta: Params
    """Trained value - start of every tensor that trained, kept ones included."""
    mean_gradient: Params
    """Mean over the steps of the task loss's gradient; {} unless `LocalRule.mean_gradient`, or without a step."""
    num_steps: int
    num_examples: int


@dataclass(frozen=True)
class ClientUpdate:
    """A client's response to a round."""

    client: int
    delta: Params  # local - start for each of `Sent.returned()`, float32, CPU
    num_examples: int
    metrics: Mapping[str, float]  # loss, num_steps, num_tokens, time_s
    extra: Params = field(default_factory=dict)  # other tensors, shaped as `Aggregator.returned_extra` says
    clients: tuple[int, ...] = ()  # of a secure sum, whose mean this is: all its clients, `client` first
    sent_bytes: int = 0  # of a secure sum: what its clients sent

    @property
    def num_clients(self) -> int:
        """Clients whose mean this is: 1, but for a secure sum."""
        return len(self.clients) or 1


@dataclass(frozen=True)
class ClientFailure:
    """A client that was asked and gave nothing usable, and why."""

    client: int
    reason: str


@dataclass(frozen=True)
class Prediction:
    """The model's output for one test row."""

    example: Example
    scores: tuple[float, ...]  # log p(choice | prompt) per choice; () for an open question
    text: str | None  # the generated answer of an open question, already parsed; None = it could not be parsed
    raw: str = ""  # the generation as it came
    grade: float | None = None  # of an open answer by an LLM judge, 0..1; None = not graded


def visible_of(text: str, modalities: tuple[Modality, ...]) -> Visible:
    """Parse visible modalities: "all" (or "both"), "none", modalities joined by "+", or "all-" with those that are hidden."""
    if text in ("all", "both"):
        return frozenset(modalities)
    if text == "none":
        return frozenset()
    hides = text.startswith("all-") and text not in modalities
    named = frozenset(text.removeprefix("all-").split("-") if hides else text.split("+"))
    if not named <= set(modalities):
        allowed = ", ".join(["all", "none", *modalities])
        raise ConfigError(
            f"evaluate.visible: got {text!r}; allowed: {allowed}, modalities joined by '+', "
            f"or all but some: 'all-{modalities[0]}'"
        )
    return frozenset(modalities) - named if hides else named


def answer_label(example: Example) -> str:
    """Return the label for label skew: the answer of a multiple-choice row; all open rows count as one label."""
    return example.answer if example.choices else OPEN_LABEL
