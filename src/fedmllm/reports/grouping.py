"""Runs by table label, and the pairing rule."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedmllm.reports.names import order_of
from fedmllm.reports.numerals import counted, listed_words
from fedmllm.reports.reading import RunRecord, asked

NOTHING_ADDED = ("none", "plain", "-")  # labels of the axes other than `methods` that add nothing


def arrange(runs: Sequence[RunRecord], labels: Mapping[str, Mapping[str, str]]) -> tuple[list[RunRecord], list[str]]:
    """(runs under their suite's names, in its order, with draws that are equal exactly if they may be paired; notes)."""
    once, notes = without_copies(runs)
    named = separate(runs_in_order(label(once, labels), list(labels)))
    drawn = with_variants(named)
    return drawn, [*notes, *unequal_digests(drawn)]


def without_copies(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """Runs once each; (run id, digests) that come with other results are named in a note."""
    kept: dict[Hashable, RunRecord] = {}
    odd: list[tuple[RunRecord, RunRecord]] = []
    for run in runs:
        first = kept.setdefault((run.run_id, tuple(sorted(run.digests.items()))), run)
        if first is not run and _results(first) != _results(run):
            odd.append((first, run))
    if not odd:
        return list(kept.values()), []
    first, second = odd[0]
    return list(kept.values()), [
        f"{counted(len(odd), 'run')} stand in two folders with different results, though settings, rows and base model are "
        f"equal; the first is used ({first.folder}, not {second.folder})."
    ]


def _results(run: RunRecord) -> list[tuple[str, str, float | None]]:
    return [(row["metric"], row["visible"], row["value"]) for row in run.rows]


def label(runs: Iterable[RunRecord], labels: Mapping[str, Mapping[str, str]]) -> list[RunRecord]:
    """Runs under the words of their suite: the axis `settings` names the row, all other axes but seeds the column.

    A word without an addition is left out: "FedAdam" with the strategy "none" is FedAdam.
    """
    counts: defaultdict[str, set[str]] = defaultdict(set)
    for of_run in labels.values():
        for axis, word in of_run.items():
            counts[axis].add(word)
    named = []
    for run in runs:
        of_run = labels.get(run.run_id, {})
        column = [
            w
            for a, w in of_run.items()
            if a == "methods"
            or (a not in ("settings", "seeds") and len(counts[a]) > 1 and w.lower() not in NOTHING_ADDED)
        ]
        setting, method = of_run.get("settings", run.setting), ", ".join(column) or run.method
        named.append(replace(run, setting=setting, method=method, labels=of_run))
    return named


def runs_in_order(runs: list[RunRecord], suite: Sequence[str]) -> list[RunRecord]:
    """As the suite has them; runs without a suite by scenario, setting and method."""
    place = {run_id: number for number, run_id in enumerate(suite)}
    return sorted(
        runs, key=lambda r: (place.get(r.run_id, len(place)), order_of(r.scenario, r.setting), r.method, r.seed)
    )


def separate(runs: list[RunRecord]) -> list[RunRecord]:
    """Runs that would share a place in the table get their differences into their method's name.

    These are settings, or, with equal settings, digests. A method that has such a name in one setting has it in all of
    them, so that it stays one column.
    """
    named = _suffixed(runs, [asked(run.settings) for run in runs], lambda run: (run.data, run.setting, run.method))
    digests = [{name: value[:8] for name, value in run.digests.items()} for run in named]
    return _suffixed(named, digests, lambda run: (run.data, run.setting, run.method, run.seed))


def _suffixed(
    runs: Sequence[RunRecord], tables: Sequence[Mapping[str, Any]], place: Callable[[RunRecord], tuple[Any, ...]]
) -> list[RunRecord]:
    """Runs whose tables differ at one place, with the differing values in their method's name."""
    same: defaultdict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for run, table in zip(runs, tables, strict=True):
        same[place(run)].append(table)
    odd: defaultdict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for (data, _, method, *_), several in same.items():
        first = several[0]
        for key in first if len(several) > 1 else ():  # a key that older records lack has its default
            if any(key in one and one[key] != first[key] for one in several):
                odd[data, method][key] = None
    named = []
    for run, table in zip(runs, tables, strict=True):
        keys = [key for key in odd[run.data, run.method] if key in table]
        suffix = f" ({', '.join(f'{key}={table[key]}' for key in keys)})" if keys else ""
        named.append(replace(run, method=run.method + suffix))
    return named


def with_variants(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Draws with the partition or base model that differs from the most frequent one among runs that should share it."""
    places: dict[str, Callable[[RunRecord], str]] = {
        "partition": lambda run: _text(run, "partition", "scenario") + f"{run.data}{run.draw}",
        "base": lambda run: _text(run, "backbone") + run.data,
    }
    variants: list[list[str]] = [[] for _ in runs]
    for name, place in places.items():
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        keys = [place(run) for run in runs]
        for run, key in zip(runs, keys, strict=True):
            counts[key][run.digests.get(name, "")] += 1
        for run, key, variant in zip(runs, keys, variants, strict=True):
            if (own := run.digests.get(name, "")) != counts[key].most_common(1)[0][0]:
                variant.append(f"{name} {own[:8] or 'unknown'}")
    return [
        replace(run, draw=run.draw._replace(variant=", ".join(variant))) if variant else run
        for run, variant in zip(runs, variants, strict=True)
    ]


def _text(run: RunRecord, *keys: str) -> str:
    return json.dumps([run.settings.get(key) for key in keys], sort_keys=True, default=str)


def unequal_digests(runs: Sequence[RunRecord]) -> list[str]:
    """One note for each data set and seed whose runs are not all comparable."""
    found: dict[str, None] = {}
    groups: defaultdict[tuple[str, int], dict[tuple[str, str], dict[str, None]]] = defaultdict(dict)
    for run in runs:
        groups[run.data, run.seed].setdefault((run.draw.rows, run.draw.variant), {})[run.method] = None
    for (data, seed), kinds in groups.items():
        if len(kinds) > 1:
            parts = [
                f"{_shortened(list(methods))}: rows {rows[:8] or 'unknown'}{f', {variant}' if variant else ''}"
                for (rows, variant), methods in kinds.items()
            ]
            found[f"{data}, seed {seed}: unequal digests, so these runs are not compared ({'; '.join(parts)})."] = None
    return _merged_seeds(list(found))


def _shortened(methods: Sequence[str]) -> str:
    return listed_words(methods) if len(methods) < 4 else f"{len(methods)} methods, such as {methods[0]}"


def _merged_seeds(notes: Sequence[str]) -> list[str]:
    """Notes that differ in the seed alone as one."""
    seeds: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for note in notes:
        data, _, rest = note.partition(", seed ")
        seed, _, text = rest.partition(": ")
        seeds[data, text].append(seed)
    return [
        f"{data}, {'seed' if len(several) == 1 else 'seeds'} {listed_words(several)}: {text}"
        for (data, text), several in seeds.items()
    ]
