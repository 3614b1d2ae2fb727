"""The nouns of the house: what every floor talks about. Loads no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias, cast

from pydantic import BaseModel, ConfigDict, ValidationError

if TYPE_CHECKING:
    from torch import Tensor

Params: TypeAlias = "dict[str, Tensor]"  # LoRA tensors under PEFT's saved names, float32, CPU: all that ever travels
State: TypeAlias = "dict[str, Params]"  # an aggregator's memory
Modality: TypeAlias = str  # "image", "text", or one camera of a car: "CAM_FRONT"
Visible: TypeAlias = frozenset[Modality]  # what one row still shows
Content: TypeAlias = str | tuple[Path, ...]  # a modality's value: a text, or one or more pictures


class FedmllmError(Exception):
    """What went wrong, where, and what is allowed: a user can act on it. Anything else that escapes is a bug."""


class ConfigError(FedmllmError):
    """A setting is unknown, misspelt or out of range. Raised before anything is loaded."""


class DataError(FedmllmError):
    """A row, file or image cannot be used; the message begins with its place (file:line or file, and the row's id)."""


HOW = "how"  # Annotated[..., HOW] on a field of a Spec: where or how fast something is computed, never what comes out


class Spec(BaseModel):
    """A frozen value whose fields are exactly the keys of its TOML table."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """The settings that change results, as JSON: fields annotated with HOW are left out, at any depth."""
        table = self.model_dump(mode="json")
        for key, field_ in type(self).model_fields.items():
            value = getattr(self, key)
            if HOW in field_.metadata:
                del table[key]
            elif isinstance(value, Spec):
                table[key] = value.identity()
        return table

    @classmethod
    def how(cls) -> tuple[str, ...]:
        """What `identity` leaves out, as dotted keys."""
        mine = [key for key, field_ in cls.model_fields.items() if HOW in field_.metadata]
        inner = {key: _inner(cls, (key,)) for key in cls.model_fields if key not in mine}
        tables = {key: spec for key, spec in inner.items() if issubclass(spec, Spec) and spec is not cls}
        deeper = [f"{key}.{k}" for key, spec in tables.items() for k in spec.how()]
        return (*mine, *deeper)


class Named(Spec):
    """A Spec that its TOML table picks by `name`; each direct child of `Named` is a family of such Specs.

    Defining a class that gives `name` a default adds it to its family: nothing else has to be touched.
    """

    name: str
    members: ClassVar[dict[str, type[Named]]]
    family: ClassVar[str]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if Named in cls.__bases__:
            cls.members = {}
            cls.family = cls.__name__.lower()
            return
        name = cls.model_fields["name"].default
        if isinstance(name, str):
            if name in cls.members and cls.members[name].__qualname__ != cls.__qualname__:
                raise ConfigError(f"{cls.family} {name!r} is defined twice: {cls.members[name]} and {cls}")
            cls.members[name] = cls

    @classmethod
    def pick(cls, table: object, place: str) -> Self:
        """The member that `table` describes: a table with `name`, or the bare name. Errors begin with `place`."""
        if isinstance(table, cls):
            return table
        if isinstance(table, str):
            table = {"name": table}
        allowed = ", ".join(sorted(cls.members))
        if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
            raise ConfigError(f"{place}: got {table!r}; give a name or a table with a name, one of: {allowed}")
        name = table["name"]
        if name not in cls.members:
            raise ConfigError(f"{place}.name: got {name!r}; allowed: {allowed}{nearest(name, cls.members)}")
        return cast("Self", validate(cls.members[name], table, place))


def nearest(word: str, allowed: Mapping[str, object] | list[str]) -> str:
    """`; did you mean 'fedadam'?` where one of the allowed words is close, else nothing."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def validate(model: type[BaseModel], table: Mapping[str, object], place: str) -> BaseModel:
    """`model(**table)`; an error lists every bad key with its full place, its value and what is allowed."""
    slips = {line.split(":")[0]: line for line in _no_numbers(model, table, place)}
    try:
        made = model.model_validate(dict(table))
    except ValidationError as error:
        lines = [_line(model, place, dict(e)) for e in error.errors()]
        slips = {line: line for line in lines if line.split(":")[0] not in slips} | slips
    if slips:
        raise ConfigError("\n".join(slips.values()))
    return made


def _no_numbers(model: type[BaseModel], table: Mapping[str, object], place: str) -> Iterator[str]:
    """What pydantic would read as a number though it is none: TOML has types, and a slip is not guessed at."""
    for key, value in table.items():
        kind = model.model_fields[key].annotation if key in model.model_fields else None
        where = f"{place}.{key}".strip(".")
        if kind in (int, float) and isinstance(value, bool):
            yield f"{where}: got {value!r}; it should be a number"
        elif kind in (int, float) and isinstance(value, str):
            yield f"{where}: got {value!r}; it should be a number, without quotes"
        elif isinstance(value, Mapping) and isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _no_numbers(kind, value, where)


def _line(model: type[BaseModel], place: str, error: dict[str, Any]) -> str:
    key = ".".join([place, *(str(part) for part in error["loc"])]).strip(".")
    if error["type"] == "extra_forbidden":
        allowed = sorted(_inner(model, error["loc"][:-1]).model_fields)
        return f"{key}: unknown key; allowed: {', '.join(allowed)}{nearest(str(error['loc'][-1]), allowed)}"
    if error["type"] == "missing":
        return f"{key}: missing; it is required"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:  # a rule about several keys: the table as a whole is no help
        return f"{key}: {message}" if key else message
    return f"{key}: got {error['input']!r}; {message[0].lower()}{message[1:]}"


def _inner(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The model of a nested table."""
    for key in path:
        field_ = model.model_fields.get(str(key))
        inner = field_.annotation if field_ else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return model


class NothingToAverage(FedmllmError):
    """No update of a round can be used: the global adapter stays as it was, and the record says so."""


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

    def shown(self, visible: Visible) -> dict[Modality, Content]:
        """The modalities that the row has and a mask leaves, in the row's own order."""
        return {m: content for m, content in self.fields.items() if m in visible}


@dataclass(frozen=True)
class Shard:
    """The rows of one client, and what each of them still shows. May be empty."""

    client: int
    rows: tuple[int, ...]  # indices into the training examples
    visible: tuple[Visible, ...]  # one per row

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
