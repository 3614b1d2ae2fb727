"""A suite: one base experiment and a matrix of changes.

    title = "..."
    extends = "other.toml"              # optional: start from another suite file, in the same folder
    imports = ["my_aggregator.py"]      # optional: plug-ins, relative to this file
    [base]                              # an experiment, as in a file for `fedmllm run`
    [matrix]
    seeds = [0, 1, 2]
    seed_keys = ["seed", "data.seed"]   # optional: the settings that a seed sets; default: the run's own alone
    [matrix.settings]                   # an axis: label -> what it changes in the base
    "beta 30 %" = { scenario = { name = "missing", rate = 0.3 } }
    [matrix.methods]
    "FedAdam" = { aggregator = { name = "fedadam", lr = 1e-2 } }
    [[matrix.skip]]                     # optional: cells that have all of these labels are left out
    methods = ["Zero-shot"]
    prompts = ["agnostic"]
    [[claims]]                          # optional: what the suite is to decide, declared before it is run
    higher = { methods = "FedAdam" }
    lower = { methods = "FedAvg" }

Axes may have any names. Their product is run in the order of the file, one seed after the other, so that a suite that is
stopped has whole seeds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmllm.config.experiment import SUITE_KEYS, Experiment, imports_of, read_toml
from fedmllm.core.errors import ConfigError
from fedmllm.core.spec import current_keys, nearest
from fedmllm.core.storage import write_atomically
from fedmllm.core.text import flat_keys

SUITE = "suite.json"
KEYS = ("title", "extends", "imports", "base", "matrix", "claims")
CLAIM_KEYS = ("higher", "lower", "text", "metric", "visible")


@dataclass(frozen=True)
class Cell:
    """One experiment of a suite and the labels that led to it, one an axis: {"settings": "alpha 5", "seeds": "0"}."""

    labels: Mapping[str, str]
    experiment: Experiment
    run_id: str

    @property
    def label(self) -> str:
        return " · ".join(self.labels.values())


@dataclass(frozen=True)
class LeftOut:
    """A cell that gives the results of an earlier one, because they differ only in how they run."""

    cell: Cell
    kept: Cell
    keys: tuple[str, ...]  # settings in which they differ


@dataclass(frozen=True)
class Suite:
    """The cells in the order in which they run; equal experiments stand here once."""

    title: str
    cells: tuple[Cell, ...]
    left_out: tuple[LeftOut, ...] = ()
    claims: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Suite:
        """Read and check a suite file; nothing runs before every cell is a valid experiment.

        Args:
            path: The TOML file.

        Returns:
            The suite, with each distinct experiment once.

        Raises:
            ConfigError: A cell is not a valid experiment; the message has the file, its labels and each bad key.
        """
        path = Path(path)
        table = read_suite_file(path)
        base = current_keys(Experiment, of_tables(table.get("base", {}), f"{path}: base"), f"{path}: base")
        if imports := (*table.get("imports", ()), *imports_of(base, path).get("imports", ())):
            base = {**base, "imports": imports}
        axes, skips = matrix(table.get("matrix"), path)
        claims = declared_claims(table.get("claims", []), axes, path)
        cells: dict[str, Cell] = {}
        left_out: list[LeftOut] = []
        errors: dict[str, None] = {}
        for combination in itertools.product(*(axis.items() for axis in axes.values())):
            words = {axis: label for axis, (label, _) in zip(axes, combination, strict=True)}
            labels = {**{axis: word for axis, word in words.items() if axis != "seeds"}, "seeds": words["seeds"]}
            if any(all(labels[axis] in chosen for axis, chosen in skip.items()) for skip in skips):
                continue
            settings: Any = base
            for _, changes in combination:
                settings = merge_tables(settings, current_keys(Experiment, changes, str(path)))
            try:
                experiment = Experiment.parse(settings)
            except ConfigError as error:
                errors.update(dict.fromkeys(str(error).splitlines()))
                continue
            cell = Cell(labels, experiment, experiment.run_id())
            kept = cells.setdefault(cell.run_id, cell)
            if keys := differing(kept.experiment, experiment):
                left_out.append(LeftOut(cell, kept, keys))
        if errors:
            raise ConfigError("\n".join(f"{path}: {line}" for line in errors))
        if not cells:
            raise ConfigError(f"{path}: the matrix has no cell")
        for number, claim in enumerate(claims, start=1):
            _refuse_unmeasured(claim, [cell.experiment for cell in cells.values()], f"{path}: claims {number}")
        return cls(str(table.get("title") or path.stem), tuple(cells.values()), tuple(left_out), claims)

    def select(self, words: Sequence[str]) -> tuple[Cell, ...]:
        """Return the cells that have a label for each word.

        Args:
            words: A label, or a part of one if no label of the suite equals it; upper and lower case are the same.

        Returns:
            The cells in the order of the suite.

        Raises:
            ConfigError: A word matches no label, or no cell has a label for each word; the message lists the labels.
        """
        axes: dict[str, dict[str, None]] = {}
        for cell in self.cells:
            for axis, label in cell.labels.items():
                axes.setdefault(axis, {})[label] = None
        known = "; ".join(f"{axis}: {', '.join(labels)}" for axis, labels in axes.items())
        chosen = self.cells
        for word in words:
            found = matching(word, [label for labels in axes.values() for label in labels])
            if not found:
                raise ConfigError(f"--only: got {word!r}, which is not in any label; labels of {self.title}: {known}")
            chosen = tuple(cell for cell in chosen if not found.isdisjoint(cell.labels.values()))
        if not chosen:
            raise ConfigError(
                f"--only: no cell has a label for each of {', '.join(map(repr, words))}; labels of {self.title}: {known}"
            )
        return chosen

    def save(self, folder: Path) -> None:
        """Write `suite.json`: what a report needs to know in addition to the records.

        Args:
            folder: Folder of the cells.
        """
        cells = [{"run_id": cell.run_id, "labels": dict(cell.labels)} for cell in self.cells]
        claims = {"claims": [dict(claim) for claim in self.claims]} if self.claims else {}
        write_atomically(folder / SUITE, json.dumps({"title": self.title, "cells": cells, **claims}, indent=1))


def experiments_by_data(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Experiment]:
    """Return an experiment for each data set of a file: that of an experiment file, or cells of a suite.

    Args:
        path: An experiment file or a suite file.
        overrides: Changes of single keys, as for `Experiment.load`.

    Returns:
        Of an experiment file: {"": the experiment}. Of a suite: label of a cell -> its experiment, for the first cell of each
        distinct `data` table among the cells of the first seed. Other seeds may draw other rows of the same set.

    Raises:
        ConfigError: The file cannot be read, or a key or value is not allowed.
    """
    path = Path(path)
    if not SUITE_KEYS.intersection(read_toml(path)):
        return {"": Experiment.load(path, overrides)}
    cells = Suite.load(path).cells
    found: dict[str, tuple[str, Experiment]] = {}
    for cell in cells:
        if cell.labels["seeds"] == cells[0].labels["seeds"]:
            data = json.dumps(cell.experiment.data.identity(), sort_keys=True)
            found.setdefault(data, (cell.label, cell.experiment))
    return {label: experiment.changed(overrides, str(path)) for label, experiment in found.values()}


def matching(word: str, labels: Sequence[str]) -> set[str]:
    """Labels that equal the word, or that contain it if none does: "0" is the seed 0 and not "alpha 0.5" too."""
    word = word.strip().casefold()
    equal = {label for label in labels if label.casefold() == word}
    return equal or {label for label in labels if word and word in label.casefold()}


def differing(one: Experiment, other: Experiment) -> tuple[str, ...]:
    """Dotted keys in which two experiments differ."""
    if one is other:
        return ()
    left, right = (flat_keys(experiment.model_dump(mode="json")) for experiment in (one, other))
    return tuple(key for key in {**left, **right} if left.get(key) != right.get(key))


def read_suite_file(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's table, laid over that of the file it extends."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself: {' -> '.join(p.name for p in (*seen, path))}")
    table = read_toml(path)
    table |= imports_of(table, path)
    for key in table:
        if key not in KEYS:
            raise ConfigError(f"{path}: {key}: unknown key; allowed: {', '.join(KEYS)}{nearest(key, list(KEYS))}")
    if (parent := table.pop("extends", None)) is None:
        return table
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: got {parent!r}; give the name of a suite file")
    below = read_suite_file(path.parent / parent, (*seen, path.resolve()))
    below.pop("claims", None)  # they are about the labels of that file
    own_axes = of_tables(table.pop("matrix", {}), f"{path}: matrix")
    merged: dict[str, Any] = merge_tables(below, table)
    imports = (*below.get("imports", ()), *table.get("imports", ()))
    return {
        **merged,
        "imports": imports,
        "matrix": {**below.get("matrix", {}), **own_axes},
    }  # an axis is replaced whole


def of_tables(table: Any, place: str) -> Mapping[str, Any]:
    """`table` if it is one. Raises ConfigError naming the place."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{place}: got {table!r}; give a table")
    return table


def merge_tables(table: Any, changes: Any) -> Any:
    """`changes` laid over `table`, table by table. Another `name` replaces the whole table: its keys are not its keys."""
    if not isinstance(changes, Mapping):
        return changes
    if isinstance(table, str):
        table = {"name": table}
    if not isinstance(table, Mapping) or ("name" in changes and changes["name"] != table.get("name")):
        return dict(changes)
    return {**table, **{key: merge_tables(table.get(key), value) for key, value in changes.items()}}


def matrix(table: Any, path: Path) -> tuple[dict[str, dict[str, Any]], list[dict[str, list[str]]]]:
    """(axis -> label -> changes, cells to skip). Raises ConfigError with the place."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: matrix: missing; give seeds and axes, as in [matrix.settings]")
    seeds = table.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise ConfigError(f"{path}: matrix.seeds: got {seeds!r}; give a list of whole numbers")
    keys = table.get("seed_keys", ["seed"])
    if not isinstance(keys, list) or "seed" not in keys or not all(isinstance(key, str) and key for key in keys):
        raise ConfigError(
            f'{path}: matrix.seed_keys: got {keys!r}; give a list with "seed", as in ["seed", "data.seed"]'
        )
    axes: dict[str, dict[str, Any]] = {"seeds": {str(seed): seeded(keys, seed) for seed in seeds}}
    for axis, labels in table.items():
        if axis in ("seeds", "seed_keys", "skip"):
            continue
        if not isinstance(labels, Mapping) or not all(isinstance(v, Mapping) for v in labels.values()) or not labels:
            raise ConfigError(
                f"{path}: matrix.{axis}: got {labels!r}; give a table of tables: label = {{ key = value }}"
            )
        axes[axis] = dict(labels)
    skips = table.get("skip", [])
    if not isinstance(skips, list):
        raise ConfigError(f"{path}: matrix.skip: got {skips!r}; give tables: [[matrix.skip]], or [] for none")
    return axes, [skipped(skip, axes, f"{path}: matrix.skip {number}") for number, skip in enumerate(skips, start=1)]


def declared_claims(claims: Any, axes: Mapping[str, Mapping[str, Any]], path: Path) -> tuple[Mapping[str, Any], ...]:
    """The claims of a suite file, each with two sides that name labels of the matrix.

    Raises:
        ConfigError: A claim lacks a side, or names an axis or a label that the matrix does not have.
    """
    if not isinstance(claims, list):
        raise ConfigError(f"{path}: claims: got {claims!r}; give tables: [[claims]]")
    found = []
    for number, claim in enumerate(claims, start=1):
        place = f"{path}: claims {number}"
        table = of_tables(claim, place)
        for key in table:
            if key not in CLAIM_KEYS:
                raise ConfigError(
                    f"{place}: {key}: unknown key; allowed: {', '.join(CLAIM_KEYS)}{nearest(key, list(CLAIM_KEYS))}"
                )
        if missing := [side for side in ("higher", "lower") if not table.get(side)]:
            raise ConfigError(
                f'{place}: {missing[0]}: missing; name labels, as in {missing[0]} = {{ methods = "FedAvg" }}'
            )
        if bad := [key for key in ("text", "metric", "visible") if not isinstance(table.get(key, ""), str)]:
            raise ConfigError(f"{place}: {bad[0]}: got {table[bad[0]]!r}; give a text")
        sides = {}
        for side in ("higher", "lower"):
            labels = of_tables(table[side], f"{place}: {side}")
            several = {axis: label if isinstance(label, list) else [label] for axis, label in labels.items()}
            sides[side] = skipped(several, axes, f"{place}: {side}")
        found.append({**table, **sides})
    return tuple(found)


def _refuse_unmeasured(claim: Mapping[str, Any], experiments: Sequence[Experiment], place: str) -> None:
    """Raise ConfigError if no cell has the claim's metric or visible modalities: a report could not decide it."""
    measured = {
        "metric": dict.fromkeys(name for e in experiments for name in e.metrics()),
        "visible": dict.fromkeys(visible for e in experiments for visible in e.evaluate.visible),
    }
    for key, known in measured.items():
        if key in claim and claim[key] not in known:
            raise ConfigError(
                f"{place}: {key}: got {claim[key]!r}; the cells have: {', '.join(known)}{nearest(claim[key], list(known))}"
            )


def seeded(keys: Sequence[str], seed: int) -> dict[str, Any]:
    """A table in which each dotted key has the seed."""
    made: dict[str, Any] = {}
    for key in keys:
        *tables, last = key.split(".")
        here = made
        for name in tables:
            here = here.setdefault(name, {})
        here[last] = seed
    return made


def skipped(skip: Any, axes: Mapping[str, Mapping[str, Any]], place: str) -> dict[str, list[str]]:
    """Axis -> labels of the cells to leave out. Raises ConfigError with the place."""
    found = {}
    for axis, chosen in of_tables(skip, place).items():
        if axis not in axes:
            raise ConfigError(f"{place}: {axis}: no such axis; known: {', '.join(axes)}{nearest(axis, list(axes))}")
        if not isinstance(chosen, list):
            raise ConfigError(f"{place}: {axis}: got {chosen!r}; give a list of labels")
        found[axis] = [str(label) for label in chosen]  # seeds are labels too
        if unknown := [label for label in found[axis] if label not in axes[axis]]:
            raise ConfigError(f"{place}: {axis} = {unknown[0]!r}: no such label; known: {', '.join(axes[axis])}")
    return found
