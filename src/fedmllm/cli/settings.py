"""`fedmllm explain` and `fedmllm schema`: the settings and their allowed values."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from fedmllm.core.errors import ConfigError

if TYPE_CHECKING:
    from fedmllm.core.spec import Spec

Topic = Annotated[
    str,
    typer.Argument(
        help="TABLE, as in train; FAMILY.MEMBER, as in aggregator.fedadam; or KEY, as in num_rounds or train.lr. Lists "
        "all tables if left out.",
        metavar="[TOPIC]",
        show_default=False,
    ),
]
_WIDTH = 100  # of a page at most
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def explain(topic: Topic = "") -> None:
    """Describe a table, a member or a key: source, types, ranges and defaults."""
    typer.echo(explained(topic, min(shutil.get_terminal_size().columns, _WIDTH)))


def schema() -> None:
    """Print the JSON Schema of an experiment file, for editors that check TOML."""
    typer.echo(json.dumps(json_schema(), indent=1))


def explained(topic: str = "", width: int = _WIDTH) -> str:
    """Return the description of a table, a member or a key; of all tables if no topic is given.

    Args:
        topic: `train`, `aggregator`, `aggregator.fedadam`, `fedadam`, `num_rounds`, `train.lr` or `aggregator.fedadam.lr`.
        width: Longest line.

    Returns:
        Lines for a terminal.

    Raises:
        ConfigError: The topic does not exist; the message names what does.
    """
    from fedmllm.config.experiment import FAMILIES, Experiment
    from fedmllm.core.spec import nearest

    if not topic:
        return _overview(width)
    head, _, rest = topic.partition(".")
    if head in FAMILIES and rest:
        member, _, key = rest.partition(".")
        members = FAMILIES[head].members
        if member not in members:
            allowed = f"{', '.join(sorted(members))}{nearest(member, members)}"
            raise ConfigError(f"{topic}: got {member!r}; allowed: {allowed}")
        title = f'{head} = {{ name = "{member}", ... }}'
        return _explained_key(members[member], key, f"{head}.{member}", title, width)
    if head in FAMILIES:
        return _listed(head, width)
    if head in Experiment.model_fields:
        if (table := _table_of(Experiment, head)) is not None:
            return _explained_key(table, rest, head, f"[{head}]", width)
        return _explained_key(Experiment, topic, "", "", width)
    homes = [f"{family}.{topic}" for family, kind in FAMILIES.items() if topic in kind.members]
    if len(homes) == 1:
        return explained(homes[0], width)
    if homes:
        raise ConfigError(f"{topic!r}: a member of several families; allowed: {', '.join(homes)}")
    names = [*Experiment.model_fields, *(name for kind in FAMILIES.values() for name in kind.members)]
    allowed = ", ".join(sorted(Experiment.model_fields))
    raise ConfigError(f"{topic!r}: no such table, key or member; allowed: {allowed}{nearest(head, names)}")


def dotted_keys(kind: type[Spec], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (dotted key, its JSON Schema) of a table and the tables in it, without `name`.

    Args:
        kind: A table or a member. The members of a family within it are not described again.
        prefix: Beginning of each key.
    """
    from fedmllm.config.experiment import FAMILIES
    from fedmllm.core.spec import Spec

    properties = kind.model_json_schema()["properties"]
    for key, field in kind.model_fields.items():
        parts = [p for p in (field.annotation, *get_args(field.annotation)) if isinstance(p, type)]
        inner = next((p for p in parts if issubclass(p, Spec) and p not in FAMILIES.values()), None)
        if key != "name" and inner is not field.annotation:
            made = {"default": field.default_factory()} if field.default_factory else {}  # type: ignore[call-arg]
            yield prefix + key, properties[key] | made
        if inner is not None:
            yield from dotted_keys(inner, f"{prefix}{key}.")


def allowed_values(part: dict[str, Any]) -> str:
    """ "integer, > 0" from a property of a JSON Schema. Whether it may be left out follows from its default."""
    from fedmllm.config.experiment import FAMILIES

    if "const" in part:
        return json.dumps(part["const"])
    if "enum" in part:
        return "one of " + ", ".join(map(json.dumps, part["enum"]))
    if "anyOf" in part:
        return " or ".join(allowed_values(kind) for kind in part["anyOf"] if kind.get("type") != "null")
    families = {family.__name__: key for key, family in FAMILIES.items()}
    if (family := families.get(part.get("$ref", "").rpartition("/")[2])) is not None:
        return f"a member of [{family}], as a name or a table"
    ranges = [f"{sign} {part[key]:g}" for key, sign in _BOUNDS.items() if key in part]
    kind = {"object": "table"}.get(part.get("type", "object"), part.get("type", ""))
    if kind == "array" and "type" in part.get("items", {}):
        first, *more = allowed_values(part["items"]).split(", ")
        kind, ranges = f"array of {first}s", [*more, *ranges]
    return ", ".join([kind, *ranges])


def default_value(part: dict[str, Any]) -> str:
    """The default as TOML would have it; "required" or "left out" where there is none."""
    if "default" not in part:
        return "required"
    return "left out" if part["default"] is None else json.dumps(part["default"])


def source_file(kind: type[Spec]) -> str:
    """Place of the class that a member or table is: within the package, or the file of a plug-in with its digest."""
    plugin = getattr(kind, "plugin", None)
    if plugin is not None:
        return f"{plugin.file or plugin.module} (plug-in, digest {plugin.digest})"
    return Path(inspect.getfile(kind)).relative_to(Path(sys.modules["fedmllm"].__path__[0]).parent).as_posix()


def _table_of(kind: type[Spec], key: str) -> type[Spec] | None:
    from fedmllm.core.spec import Spec

    inner = kind.model_fields[key].annotation
    return inner if isinstance(inner, type) and issubclass(inner, Spec) else None


def _explained_key(kind: type[Spec], key: str, place: str, title: str, width: int) -> str:
    """A whole table if `key` is empty; otherwise the keys of it that are `key` or in the table `key`."""
    from fedmllm.core.spec import nearest

    keys = dict(dotted_keys(kind))
    if key:
        found = {k: part for k, part in keys.items() if k == key or k.startswith(f"{key}.")}
        if not found:
            allowed = f"{', '.join(keys) or 'nothing'}{nearest(key, list(keys))}"
            raise ConfigError(f"{place}: no key {key!r}; allowed: {allowed}")
        prefix = f"{place}." if place else ""
        return "\n".join(line for k, part in found.items() for line in _key_lines(prefix + k, part, "", width))
    lines = [title, "", _wrapped(kind.__doc__, width), "", f"Source: {source_file(kind)}", ""]
    lines += [line for k, part in keys.items() for line in _key_lines(k, part, "  ", width)] or ["  It has no keys."]
    return "\n".join(lines)


def _key_lines(key: str, part: dict[str, Any], indent: str, width: int) -> list[str]:
    default = default_value(part)
    text = f"{allowed_values(part)}. {part.get('description', '')}".rstrip()
    head = (
        f"{indent}{key} = {default}"
        if "default" in part and part["default"] is not None
        else f"{indent}{key} ({default})"
    )
    return [
        head,
        textwrap.fill(" ".join(text.split()), width, initial_indent=f"{indent}    ", subsequent_indent=f"{indent}    "),
    ]


def _wrapped(text: str | None, width: int) -> str:
    """A docstring with its paragraphs filled; indented formulas stay as they are."""
    paragraphs = inspect.cleandoc(text or "").split("\n\n")
    return "\n\n".join(p if p.startswith(" ") else textwrap.fill(" ".join(p.split()), width) for p in paragraphs)


def _listed(family: str, width: int) -> str:
    """The members of a family, with the first paragraph of each."""
    from fedmllm.config.experiment import FAMILIES

    members = FAMILIES[family].members
    indent = " " * (4 + max(map(len, members)))
    lines = [f"[{family}]", "", _wrapped(FAMILIES[family].__doc__, width), ""]
    for name in sorted(members):
        first = inspect.cleandoc(members[name].__doc__ or "").split("\n\n")[0]
        head = f"  {name}".ljust(len(indent))
        text = " ".join(first.split()) or "(no description)"  # nothing is filled to nothing, and the name would be lost
        lines.append(textwrap.fill(text, width, initial_indent=head, subsequent_indent=indent))
    return "\n".join(lines)


def _overview(width: int) -> str:
    """All keys of the top level: families, tables and values."""
    from fedmllm.config.experiment import Experiment
    from fedmllm.core.attribute_docs import attribute_docs

    indent = " " * (4 + max(map(len, Experiment.model_fields)))
    about = "Keys of an experiment file. `fedmllm explain KEY` describes one, `fedmllm explain KEY.MEMBER` a member."
    lines = [textwrap.fill(about, width), ""]
    docs = attribute_docs(Experiment)
    for key in Experiment.model_fields:
        text = " ".join(docs.get(key, "").split())
        head = f"  {key}".ljust(len(indent))
        lines.append(textwrap.fill(text, width, initial_indent=head, subsequent_indent=indent))
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of an experiment file: a family's value is a name, or a table of one of its members."""
    from pydantic.json_schema import models_json_schema

    from fedmllm.config.experiment import FAMILIES, Experiment

    members = [member for family in FAMILIES.values() for member in family.members.values()]
    models: list[Any] = [Experiment, *members]
    refs, whole = models_json_schema([(model, "validation") for model in models])
    definitions = whole["$defs"]
    top = definitions.pop(refs[Experiment, "validation"]["$ref"].rpartition("/")[2])
    for key, family in FAMILIES.items():
        names = {"enum": sorted(family.members)}
        tables = []
        for name, member in sorted(family.members.items()):
            ref = refs[member, "validation"]["$ref"]
            definitions[ref.rpartition("/")[2]]["required"] = ["name"]
            definitions[ref.rpartition("/")[2]]["properties"]["name"] = {"const": name}
            tables.append({"$ref": ref})
        description = top["properties"][key].get("description", "")
        definitions[family.__name__] = {"anyOf": [names, *tables]}  # also for a member within a member
        top["properties"][key] = {"description": description, "$ref": f"#/$defs/{family.__name__}"}
    one_or_several = {"type": "string"}
    for place in (top["properties"]["imports"], *_evaluate(definitions)):
        place["anyOf"] = [one_or_several, {"type": place.pop("type"), "items": place.pop("items")}]
    for new, old in Experiment.old_keys.items():
        renamed = f"Renamed to `{new}`; the old name goes in the next release."
        top["properties"][old] = top["properties"][new] | {"deprecated": True, "description": renamed}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "$defs": definitions}


def _evaluate(definitions: dict[str, Any]) -> list[dict[str, Any]]:
    properties = definitions["Evaluate"]["properties"]
    return [properties["visible"], properties["metrics"]]
