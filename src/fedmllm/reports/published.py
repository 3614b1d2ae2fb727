"""Published numbers with their sources, from `published.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from fedmllm.reports.names import setting_label

NUM_CLIENTS, ALPHA = 10, 0.5  # of every published setting; the alpha settings have their own


@dataclass(frozen=True)
class PublishedNumbers:
    """Numbers that a paper reports for one data set: method -> setting -> value, in percent."""

    title: str
    metric: str
    source: str
    model: str
    note: str
    same_data: bool  # False: our set only has the form of the published one
    values: dict[str, dict[str, float]]

    def of(self, settings: Mapping[str, Any]) -> dict[str, float]:
        """Method -> value in the published setting that an experiment's settings agree with; {} if there is none."""
        partition, scenario = settings["partition"], settings["scenario"]["name"]
        if partition["name"] == "dirichlet":
            alike = partition.get("num_clients") == NUM_CLIENTS
            alike = alike and (scenario == "aligned" or partition.get("alpha") == ALPHA)
        else:
            alike = partition["name"] == "published"
        label = setting_label(settings)
        return {m: row[label] for m, row in self.values.items() if label in row} if alike else {}


@lru_cache
def published_for(data: str) -> PublishedNumbers | None:
    """The published results for a data set, or for the one that an embedded set stands for; None if there are none."""
    table = tomllib.loads((files(__package__) / "published.toml").read_text(encoding="utf-8"))
    name = table["stands_for"].get(data, data)
    if name not in table["sets"]:
        return None
    of_set = table["sets"][name]
    return PublishedNumbers(
        title=of_set["title"],
        metric=of_set["metric"],
        source=table["source"],
        model=table["model"],
        note=table["note"],
        same_data=name == data,
        values={m: dict(zip(table["settings"], row, strict=True)) for m, row in of_set["methods"].items()},
    )
