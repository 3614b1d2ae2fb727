"""Records and summaries of many runs, read for a report."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.core.text import flat
from fedmllm.reports.names import base_of, method_label, order_of, setting_label
from fedmllm.runs.folder import RECORD, SUMMARY
from fedmllm.runs.record import Line, read
from fedmllm.runs.suites.suite import SUITE

NOTHING_ADDED = ("none", "plain", "-")  # labels of the axes other than `methods` that add nothing
EXECUTION_ONLY = tuple(
    f"{key}." for key in Experiment.execution_only()
)  # where and how fast a run was computed: keys, or tables with all their keys
Seeds = dict[int, float]  # seed -> value


@dataclass(frozen=True)
class RunRecord:
    """One finished run, as a report needs it."""

    run_id: str
    data: str
    scenario: str
    setting: str  # as in the table: "alpha 5", "beta 30 %"
    method: str  # as in the table: "FedAdam", "FedAdam, agnostic"
    seed: int
    settings: Mapping[str, Any]
    heading: Line
    rounds: tuple[Line, ...]
    evals: tuple[Line, ...]
    rows: tuple[dict[str, Any], ...]
    wall_s: float

    @property
    def federated(self) -> bool:
        return bool(self.settings["method"] == "federated")

    @property
    def headline(self) -> tuple[str, str]:
        """(metric, test modalities) of the main result."""
        return self.rows[0]["metric"], self.rows[0]["visible"]

    def value(self, metric: str, visible: str) -> float | None:
        found = [row["value"] for row in self.rows if (row["metric"], row["visible"]) == (metric, visible)]
        return found[0] if found else None


@dataclass(frozen=True)
class ReportData:
    """All runs of a report, in the order of the tables."""

    title: str
    runs: tuple[RunRecord, ...]
    unfinished: tuple[str, ...]  # folders with a record and no summary
    missing: int  # cells of the suites without a record

    def of(self, data: str) -> DatasetResults:
        """The runs on one data set."""
        return DatasetResults(data, tuple(run for run in self.runs if run.data == data))

    @property
    def datasets(self) -> list[DatasetResults]:
        return [self.of(data) for data in dict.fromkeys(run.data for run in self.runs)]


@dataclass(frozen=True)
class DatasetResults:
    """The runs on one data set."""

    data: str
    runs: tuple[RunRecord, ...]

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(run.setting for run in self.runs))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(run.method for run in self.runs))

    def plain(self) -> DatasetResults:
        """Without the methods that are another one with an addition; a figure cannot show every combination."""
        methods = self.methods
        return replace(self, runs=tuple(run for run in self.runs if base_of(run.method, methods) is None))

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    @property
    def metric(self) -> str:
        return self.runs[0].headline[0]

    @property
    def visible(self) -> str:
        """Visible modalities of the test rows in most runs; a baseline without a model reads none."""
        return Counter(run.headline[1] for run in self.runs).most_common(1)[0][0]

    @property
    def scenarios(self) -> dict[str, list[str]]:
        """Scenario -> its settings."""
        found: dict[str, dict[str, None]] = {}
        for run in self.runs:
            found.setdefault(run.scenario, {})[run.setting] = None
        return {scenario: list(settings) for scenario, settings in found.items()}

    def pick(self, setting: str | None = None, method: str | None = None) -> list[RunRecord]:
        return [r for r in self.runs if setting in (None, r.setting) and method in (None, r.method)]

    def values(self, metric: str = "", visible: str = "") -> dict[tuple[str, str], Seeds]:
        """(setting, method) -> seed -> value; each run's own headline where nothing else is asked for."""
        found: defaultdict[tuple[str, str], Seeds] = defaultdict(dict)
        for run in self.runs:
            head = run.headline
            value = run.value(metric or head[0], visible or head[1])
            if value is not None:
                found[run.setting, run.method][run.seed] = value
        return dict(found)


def read_results(folders: Sequence[Path]) -> ReportData:
    """Every run at or below the folders, once each by run id, as the suite's order has it.

    Raises FedmllmError for a folder that is missing or has no finished run, and for a record that cannot be read.
    """
    titles: dict[str, None] = {}
    labels: dict[str, dict[str, str]] = {}
    runs: dict[str, RunRecord] = {}
    unfinished: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise FedmllmError(f"{folder}: no such folder; give folders of runs or suites")
        for path in sorted(folder.rglob(SUITE)):
            title, of_suite = read_suite(path)
            titles[title] = None
            labels |= of_suite
        for path in sorted(folder.rglob(RECORD)):
            if not (path.parent / SUMMARY).exists():
                unfinished.append(str(path.parent))
                continue
            run = read_run(path.parent)
            runs.setdefault(run.run_id, run)
    if not runs:
        raise FedmllmError(f"{', '.join(map(str, folders))}: no finished run (a folder with {RECORD} and {SUMMARY})")
    named = apart(in_order(label(runs.values(), labels), list(labels)))
    started = {
        *runs,
        *(Path(folder).name for folder in unfinished),
    }  # a suite's cell lies in a folder named by its run id
    lacking = sum(run_id not in started for run_id in labels)
    return ReportData(" + ".join(titles) or "Federated fine-tuning: results", tuple(named), tuple(unfinished), lacking)


def read_suite(path: Path) -> tuple[str, dict[str, dict[str, str]]]:
    """Title, and run id -> labels. Raises FedmllmError naming the file."""
    try:
        suite = json.loads(path.read_text(encoding="utf-8"))
        return str(suite["title"]), {cell["run_id"]: dict(cell["labels"]) for cell in suite["cells"]}
    except (KeyError, TypeError, ValueError) as error:
        raise FedmllmError(f"{path}: not a suite's list of cells: {type(error).__name__}: {error}") from None


def read_run(folder: Path) -> RunRecord:
    """One run's folder. Raises FedmllmError naming the file."""
    path = folder / SUMMARY
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        events = list(read(folder / RECORD))
        heading = next(event for event in events if event["event"] == "experiment")
        settings, row = heading["settings"], rows[0]
        return RunRecord(
            run_id=row["run_id"],
            data=settings["data"]["name"],
            scenario=row["scenario"],
            setting=setting_label(settings),
            method=method_label(settings, row["method"], row["prompt"]),
            seed=row["seed"],
            settings=settings,
            heading=heading,
            rounds=tuple(e for e in events if e["event"] == "round"),
            evals=tuple(e for e in events if e["event"] == "eval"),
            rows=tuple(rows),
            wall_s=row["wall_s"],
        )
    except (KeyError, IndexError, StopIteration, TypeError, json.JSONDecodeError) as error:
        raise FedmllmError(f"{folder}: not a run's record and summary: {type(error).__name__}: {error}") from None


def label(runs: Iterable[RunRecord], labels: Mapping[str, Mapping[str, str]]) -> list[RunRecord]:
    """Runs under the words of their suite: the axis `settings` names the row, all other axes but seeds the column.

    A word that says that nothing was added is left out: "FedAdam" with the strategy "none" is FedAdam.
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
        named.append(replace(run, setting=setting, method=method))
    return named


def in_order(runs: list[RunRecord], suite: Sequence[str]) -> list[RunRecord]:
    """As the suite has them; runs without a suite by scenario, setting and method."""
    place = {run_id: number for number, run_id in enumerate(suite)}
    return sorted(
        runs, key=lambda r: (place.get(r.run_id, len(place)), order_of(r.scenario, r.setting), r.method, r.seed)
    )


def apart(runs: list[RunRecord]) -> list[RunRecord]:
    """Runs that would share a place in the table but differ in what was asked get that into their method's name.

    A method that has such a name in one setting has it in all of them, so that it stays one column.
    """
    same: defaultdict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        same[run.data, run.setting, run.method].append(asked(run.settings))
    odd: defaultdict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for (data, _, method), several in same.items():
        for key in dict.fromkeys(key for one in several for key in one):
            if any(one.get(key) != several[0].get(key) for one in several):
                odd[data, method][key] = None
    named = []
    for run in runs:
        own, keys = asked(run.settings), odd[run.data, run.method]
        suffix = f" ({', '.join(f'{key}={own[key]}' for key in keys if key in own)})" if keys else ""
        named.append(replace(run, method=run.method + suffix))
    return named


def asked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What may change results: the flat settings without the seed and without `HOW`."""
    return {k: v for k, v in flat(settings).items() if k != "seed" and not f"{k}.".startswith(EXECUTION_ONLY)}
