"""Settings as frozen values: Spec for a TOML table, Named for a family of tables picked by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from fedmllm.core.errors import ConfigError

# Markers of a field of a Spec: Annotated[int, EXECUTION_ONLY].
EXECUTION_ONLY = "how"  # where or how fast something is computed, never what comes out
ADDED_LATER = "added later"  # left out of the identity while it has its default, so that older run ids last


class Spec(BaseModel):
    """A frozen value whose fields are exactly the keys of its TOML table."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Key -> its spelling in earlier releases: still accepted (`current_keys`), and kept in `identity`, so that run ids last.
    old_keys: ClassVar[Mapping[str, str]] = {}

    def identity(self) -> dict[str, Any]:
        """The settings that change results, as JSON.

        At any depth, fields marked EXECUTION_ONLY are left out, and fields marked ADDED_LATER while they have their default.
        """
        table = self.model_dump(mode="json")
        for key, field_ in type(self).model_fields.items():
            value = getattr(self, key)
            is_default = ADDED_LATER in field_.metadata and value == field_.get_default(call_default_factory=True)
            if EXECUTION_ONLY in field_.metadata or is_default:
                del table[key]
            elif isinstance(value, Spec):
                table[key] = value.identity()
        return {self.old_keys.get(key, key): value for key, value in table.items()}

    @classmethod
    def execution_only(cls) -> tuple[str, ...]:
        """What `identity` leaves out, as dotted keys."""
        mine = [key for key, field_ in cls.model_fields.items() if EXECUTION_ONLY in field_.metadata]
        inner = {key: _inner(cls, (key,)) for key in cls.model_fields if key not in mine}
        tables = {key: spec for key, spec in inner.items() if issubclass(spec, Spec) and spec is not cls}
        deeper = [f"{key}.{k}" for key, spec in tables.items() for k in spec.execution_only()]
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


def current_keys(model: type[BaseModel], table: Mapping[str, object], place: str) -> dict[str, object]:
    """`table` with the keys that were renamed under their present names. Raises ConfigError if both names are given."""
    renamed = {old: new for new, old in getattr(model, "old_keys", {}).items() if old in table}
    for old, new in renamed.items():
        if new in table:
            raise ConfigError(f"{f'{place}.{old}'.strip('.')}: renamed to {new!r}, which is given too; keep {new!r}")
    return {renamed.get(key, key): value for key, value in table.items()}


def validate(model: type[BaseModel], table: Mapping[str, object], place: str) -> BaseModel:
    """`model(**table)`; an error lists every bad key with its full place, its value and what is allowed."""
    table = current_keys(model, table, place)
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
