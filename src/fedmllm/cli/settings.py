"""`fedmllm explain` and `fedmllm schema`: the settings and their allowed values."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from fedmllm.core.errors import ConfigError

Topic = Annotated[
    str, typer.Argument(help="TABLE, as in train, or FAMILY.MEMBER, as in aggregator.fedadam.", metavar="TOPIC")
]


def explain(topic: Topic) -> None:
    """Describe a table or a member: source, keys, types, ranges and defaults."""
    typer.echo(explained(topic))


def schema() -> None:
    """Print the JSON Schema of an experiment file, for editors that check TOML."""
    typer.echo(json.dumps(json_schema(), indent=1))


def explained(topic: str) -> str:
    """Return the description of a table or a member. Raises ConfigError naming what exists.

    Args:
        topic: `train`, `aggregator` or `aggregator.fedadam`.
    """
    from fedmllm.config.experiment import FAMILIES, Experiment
    from fedmllm.core.spec import Spec, nearest

    table, _, member = topic.partition(".")
    tables = {key: field.annotation for key, field in Experiment.model_fields.items()}
    specs = {key: kind for key, kind in tables.items() if isinstance(kind, type) and issubclass(kind, Spec)}
    if table not in {**specs, **FAMILIES}:
        allowed = sorted({**specs, **FAMILIES})
        raise ConfigError(f"{table!r}: no such table; allowed: {', '.join(allowed)}{nearest(table, allowed)}")
    if table not in FAMILIES:
        return "\n".join([f"[{table}]", specs[table].__doc__ or "", *_lines(specs[table])])
    members = FAMILIES[table].members
    if not member:
        words = [f"  {name:20} {(members[name].__doc__ or '').splitlines()[0]}" for name in sorted(members)]
        return "\n".join([f"{table}: {FAMILIES[table].__doc__}", "", *words])
    if member not in members:
        raise ConfigError(f"{topic}: got {member!r}; allowed: {', '.join(sorted(members))}{nearest(member, members)}")
    return "\n".join(
        [f'{table} = {{ name = "{member}", ... }}', members[member].__doc__ or "", *_lines(members[member])]
    )


def _lines(spec: Any) -> list[str]:
    found = [""]
    for key, part in spec.model_json_schema()["properties"].items():
        if key != "name":
            default = f" = {json.dumps(part['default'])}" if "default" in part else " (required)"
            found += [f"  {key}{default}", f"      {allowed_values(part)}. {part.get('description', '')}".rstrip()]
    return found if len(found) > 1 else ["", "  It has no keys."]


def allowed_values(part: dict[str, Any]) -> str:
    """ "integer, > 0" from a property of a JSON Schema."""
    if "enum" in part or "const" in part:
        return "one of " + ", ".join(map(str, part.get("enum", [part.get("const")])))
    if "anyOf" in part:
        return " or ".join(allowed_values(kind) for kind in part["anyOf"])
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    ranges = [f"{sign} {part[key]:g}" for key, sign in bounds.items() if key in part]
    return ", ".join([part.get("type", "table"), *ranges])


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
        top["properties"][old] = top["properties"][new]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "$defs": definitions}


def _evaluate(definitions: dict[str, Any]) -> list[dict[str, Any]]:
    properties = definitions["Evaluate"]["properties"]
    return [properties["visible"], properties["metrics"]]
