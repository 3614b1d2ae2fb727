"""Published numbers with their sources, from `published.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files


@dataclass(frozen=True)
class Published:
    """What a paper reports for one data set: method -> setting -> value, in percent."""

    title: str
    metric: str
    source: str
    model: str
    note: str
    same_data: bool  # False: our set only has the form of the published one
    values: dict[str, dict[str, float]]


@lru_cache
def published_for(data: str) -> Published | None:
    """The published results for a data set, or for the one that an embedded set stands for; None where there are none."""
    table = tomllib.loads((files(__package__) / "published.toml").read_text(encoding="utf-8"))
    name = table["stands_for"].get(data, data)
    if name not in table["sets"]:
        return None
    of_set = table["sets"][name]
    return Published(
        title=of_set["title"],
        metric=of_set["metric"],
        source=table["source"],
        model=table["model"],
        note=table["note"],
        same_data=name == data,
        values={m: dict(zip(table["settings"], row, strict=True)) for m, row in of_set["methods"].items()},
    )
