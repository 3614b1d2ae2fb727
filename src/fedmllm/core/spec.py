"""Settings as frozen values: Spec for a table, Named for a family."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema

from fedmllm.core.attribute_docs import attribute_docs
from fedmllm.core.errors import ConfigError
from fedmllm.core.plugins import HINT, PluginSource, defines_again, source_of_object

T = TypeVar("T")

# Annotated[..., EXECUTION_ONLY] on a field of a Spec: it changes how fast or on which device something is computed, never
# the result, so it is not part of the identity.
EXECUTION_ONLY = "execution-only"
# Annotated[..., ADDED_LATER]: a setting that release 0.1 did not have. It is part of the identity only if it differs
# from its default, so that the run ids of existing experiments last.
ADDED_LATER = "added-later"


class Spec(BaseModel):
    """A frozen value whose fields are exactly the keys of its TOML table."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Key -> its spelling in earlier releases: still accepted (`current_keys`), and kept in `identity`, so that run ids last.
    old_keys: ClassVar[Mapping[str, str]] = {}

    def identity(self) -> dict[str, Any]:
        """Return the settings that change results, as JSON.

        Left out, at any depth, are fields annotated with ADDED_LATER that have their default, and fields annotated with
        EXECUTION_ONLY unless their value is a plug-in: code that is not shipped with the package may change results. A
        plug-in is identified by name and file digest.
        """
        table = self.model_dump(mode="json")
        for key, field_ in type(self).model_fields.items():
            value = getattr(self, key)
            plugin = isinstance(value, Named) and value.plugin is not None
            execution_only = EXECUTION_ONLY in field_.metadata and not plugin
            later = ADDED_LATER in field_.metadata
            if execution_only or (later and value == field_.get_default(call_default_factory=True)):
                del table[key]
            elif isinstance(value, Spec):
                table[key] = value.identity()
        return {self.old_keys.get(key, key): value for key, value in table.items()}

    def dump(self) -> dict[str, Any]:
        """Return the table, as JSON values, that parses to an equal value: the keys that were set, at any depth."""
        table = self.model_dump(mode="json")
        named = {"name"} if isinstance(self, Named) else set()
        kept = [key for key in type(self).model_fields if key in self.model_fields_set | named]
        values = {key: getattr(self, key) for key in kept}
        return {key: value.dump() if isinstance(value, Spec) else table[key] for key, value in values.items()}

    def specs(self) -> Iterator[Spec]:
        """Yield this Spec and those of its fields, at any depth."""
        yield self
        for key in type(self).model_fields:
            if isinstance(value := getattr(self, key), Spec):
                yield from value.specs()

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for key, text in attribute_docs(cls).items():
            if key in properties:
                properties[key].setdefault("description", text)
        return schema

    @classmethod
    def execution_only(cls) -> tuple[str, ...]:
        """Return the dotted keys of the fields that are annotated with EXECUTION_ONLY."""
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
    """Name of the member, as in `TABLE = "NAME"` or `TABLE.name`."""
    members: ClassVar[dict[str, type[Named]]]
    family: ClassVar[str]
    plugin: ClassVar[PluginSource | None] = None  # origin of a member that is not shipped with the package

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if Named in cls.__bases__:
            cls.members = {}
            cls.family = cls.__name__.lower()
            return
        cls.plugin = source_of_object(cls)
        name = cls.model_fields["name"].default
        if isinstance(name, str):
            old = cls.members.get(name)
            if old and not defines_again(old, old.plugin, cls, cls.plugin):
                raise ConfigError(
                    f"{cls.family} {name!r} is defined twice: {_place(old)} and {_place(cls)}; rename one"
                )
            cls.members[name] = cls

    def identity(self) -> dict[str, Any]:
        """Return the settings that change results; those of a plug-in name the digests of the files that define it."""
        bases = [base for base in type(self).__mro__ if issubclass(base, Named) and base is not Named]
        sources: dict[str, str] = {}
        for module, digest in dict.fromkeys((base.plugin.module, base.plugin.digest) for base in bases if base.plugin):
            sources[module] = f"{sources[module]}+{digest}" if module in sources else digest
        return super().identity() | ({"plugin": sources} if sources else {})

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
            raise ConfigError(f"{place}.name: got {name!r}; allowed: {allowed}{nearest(name, cls.members)}{HINT}")
        return cast("Self", validate(cls.members[name], table, place))


def one_or_several(value: object) -> object:
    """`"image"` means `["image"]`."""
    return (value,) if isinstance(value, str) else value


def _place(cls: type[Named]) -> str:
    return f"{cls.__qualname__} in {cls.plugin.file or cls.__module__ if cls.plugin else cls.__module__}"


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
    """Return `model(**table)`. Raises ConfigError that lists every bad key with its full place, value and what is allowed."""
    return checked(model, table, place, model.model_validate)


def checked(model: type[BaseModel], table: Mapping[str, object], place: str, make: Callable[[dict[str, Any]], T]) -> T:
    """Return `make(table)`, which validates a `model`. Raises ConfigError as `validate` does."""
    table = current_keys(model, table, place)
    slips = {line.split(":")[0]: line for line in _no_numbers(model, table, place)}
    made: T | None = None
    try:
        made = make(dict(table))
    except ValidationError as error:
        lines = [_line(model, place, dict(e)) for e in error.errors()]
        slips = {line: line for line in lines if line.split(":")[0] not in slips} | slips
    if slips:
        raise ConfigError("\n".join(slips.values()))
    return cast("T", made)


def _no_numbers(model: type[BaseModel], table: Mapping[str, object], place: str) -> Iterator[str]:
    """Yield errors for values that pydantic would read as numbers: TOML has types, and a slip is not guessed at."""
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
    if not error["loc"]:  # a rule about several keys: printing the whole table does not help
        return f"{key}: {message}" if key else message
    return f"{key}: got {error['input']!r}; {message[0].lower()}{message[1:]}"


def _inner(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The model of a nested table."""
    for key in path:
        field_ = model.model_fields.get(str(key))
        inner = field_.annotation if field_ else None
        inner = next(
            (part for part in get_args(inner) if isinstance(part, type) and issubclass(part, BaseModel)), inner
        )
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return model
