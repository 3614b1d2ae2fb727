"""Records and summaries of many runs, read for a report."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.spec import current_keys
from fedmllm.core.text import flat_keys
from fedmllm.core.types import Modality
from fedmllm.data.base import Dataset
from fedmllm.reports.names import base_of, method_label, setting_label
from fedmllm.reports.numerals import COUNTS
from fedmllm.reports.roles import role_of
from fedmllm.runs.folder import RECORD, SUMMARY, RunFolder
from fedmllm.runs.record import Line, read
from fedmllm.runs.suites.suite import SUITE
from fedmllm.scenarios.modalities.completion import Role

SEEDS = ("seed", "data.seed")  # settings that repeat a run instead of making it another one
EXECUTION_KEYS = tuple(f"{key}." for key in Experiment.execution_only())  # keys, or tables with all their keys
WORDS = ("run_id", "scenario", "method", "prompt", "metric", "visible")  # texts in a row of a summary


class Draw(NamedTuple):
    """The seed and the digests that two results must share to be paired."""

    seed: int
    rows: str = ""  # digest of the rows
    variant: str = ""  # a partition or base model that differs from that of the other runs; "" = the usual one


BySeed = dict[Draw, float]


@dataclass(frozen=True)
class RunRecord:
    """One finished run, as a report needs it."""

    run_id: str
    folder: Path
    data: str
    scenario: str
    setting: str  # as in the table: "alpha 5", "beta 30 %"
    method: str  # as in the table: "FedAdam", "FedAdam, agnostic"
    draw: Draw
    settings: Mapping[str, Any]
    heading: Line
    rounds: tuple[Line, ...]
    evals: tuple[Line, ...]
    rows: tuple[dict[str, Any], ...]
    wall_s: float
    labels: Mapping[str, str] = field(default_factory=dict)  # axis -> label, in a suite
    guarantee: Mapping[str, Any] | None = None  # of the run's privacy
    predictions: bytes | None = None  # file of predictions of a run in an archive; that of a folder is read when needed

    @property
    def seed(self) -> int:
        return self.draw.seed

    @property
    def federated(self) -> bool:
        return bool(self.settings["method"] == "federated")

    @cached_property
    def role(self) -> Role:
        return role_of(self.heading, self.settings)

    @property
    def headline(self) -> tuple[str, str]:
        """(metric, visible modalities of the test rows) of the main result."""
        return self.rows[0]["metric"], self.rows[0]["visible"]

    @property
    def digests(self) -> Mapping[str, str]:
        return {str(k): str(v) for k, v in dict(self.heading.get("digests") or {}).items()}

    @property
    def clients(self) -> list[Mapping[str, Any]]:
        """Per client its labels and its rows by visible modalities; [] if the record does not have them."""
        return list(self.heading.get("clients") or [])

    @cached_property
    def is_complete(self) -> bool | None:
        """True if every training row has every modality; None if the record does not have it."""
        counts = [client.get("shows", client.get("visible")) for client in self.clients]
        kinds = {kind for of_client in counts if of_client for kind in of_client}
        if not kinds:
            return None
        return kinds == {max(kinds, key=lambda kind: kind.count("+"))} and "none" not in kinds

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
    notes: tuple[str, ...] = ()  # runs that are not compared, and the reason
    claims: tuple[Mapping[str, Any], ...] = ()  # declared in the suite files

    def of(self, data: str) -> DatasetResults:
        """The runs on one data set."""
        return DatasetResults(data, tuple(run for run in self.runs if run.data == data))

    @cached_property
    def datasets(self) -> list[DatasetResults]:
        return [self.of(data) for data in dict.fromkeys(run.data for run in self.runs)]


@dataclass(frozen=True)
class DatasetResults:
    """The runs on one data set."""

    data: str
    runs: tuple[RunRecord, ...]

    @cached_property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(run.setting for run in self.runs))

    @cached_property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(run.method for run in self.runs))

    @cached_property
    def candidates(self) -> list[str]:
        """Federated methods, which are ranked; all others are baselines, controls and bounds."""
        return list(dict.fromkeys(run.method for run in self.runs if run.federated and run.role == "method"))

    @cached_property
    def roles(self) -> dict[str, Role]:
        """Role of each federated method that is not a candidate: "control" or "bound"."""
        return {run.method: run.role for run in self.runs if run.federated and run.role != "method"}

    def plain(self) -> DatasetResults:
        """Without the methods that are another one with an addition; a figure cannot show every combination."""
        methods = self.methods
        return replace(self, runs=tuple(run for run in self.runs if base_of(run.method, methods) is None))

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    @cached_property
    def metrics(self) -> list[str]:
        """Of most runs, in their order; counts of rows are left out."""
        return list(dict.fromkeys(r["metric"] for run in self.runs for r in run.rows if r["metric"] not in COUNTS))

    @cached_property
    def metric(self) -> str:
        """The first metric that is defined in any run."""
        defined = [m for m in self.metrics if any(run.value(m, run.headline[1]) is not None for run in self.runs)]
        return (defined or self.metrics or [self.runs[0].headline[0]])[0]

    @cached_property
    def undefined(self) -> list[str]:
        """Metrics that no run defines, as AUC on test rows of one class."""
        return [
            m
            for m in self.metrics
            if all(r["value"] is None for run in self.runs for r in run.rows if r["metric"] == m)
        ]

    @cached_property
    def visible(self) -> str:
        """Visible modalities of the test rows in most runs; a baseline without a model reads none."""
        return Counter(run.headline[1] for run in self.runs).most_common(1)[0][0]

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """Modalities that rows of the clients show, in the order of the data set."""
        clients = [client for run in self.runs for client in run.clients]
        shows = {names for client in clients for names in client.get("shows", client.get("visible", {}))}
        found = {m for names in shows for m in names.split("+")} - {"none"}
        order = _modalities_of(self.runs[0].settings["data"])
        return tuple(sorted(found, key=lambda m: (order.index(m) if m in order else len(order), m)))

    @cached_property
    def scenarios(self) -> dict[str, list[str]]:
        """Scenario -> its settings."""
        found: dict[str, dict[str, None]] = {}
        for run in self.runs:
            found.setdefault(run.scenario, {})[run.setting] = None
        return {scenario: list(settings) for scenario, settings in found.items()}

    @cached_property
    def has_gaps(self) -> bool:
        """Return whether rows lack modalities by themselves: training rows do though nothing is hidden from them."""
        return any(run.is_complete is False for run in self.runs if run.scenario == "aligned")

    @cached_property
    def num_test(self) -> int | None:
        """Test rows; None if runs differ in it."""
        found = {run.heading.get("num_test") for run in self.runs}
        return next(iter(found)) if len(found) == 1 else None

    @cached_property
    def _cells(self) -> dict[tuple[str, str], list[RunRecord]]:
        found: defaultdict[tuple[str, str], list[RunRecord]] = defaultdict(list)
        for run in self.runs:
            found[run.setting, run.method].append(run)
        return dict(found)

    def pick(self, setting: str | None = None, method: str | None = None) -> list[RunRecord]:
        if setting is not None and method is not None:
            return self._cells.get((setting, method), [])
        return [r for r in self.runs if setting in (None, r.setting) and method in (None, r.method)]

    def values(self, metric: str = "", visible: str = "") -> dict[tuple[str, str], BySeed]:
        """(setting, method) -> draw -> value; by default of the main metric, on each run's own test rows."""
        found: defaultdict[tuple[str, str], BySeed] = defaultdict(dict)
        for run in self.runs:
            value = run.value(metric or self.metric, visible or run.headline[1])
            if value is not None:
                found[run.setting, run.method][run.draw] = value
        return dict(found)


def _modalities_of(data: Mapping[str, Any]) -> tuple[Modality, ...]:
    """Modalities in the order of the data set; () for a set of a plug-in or of another version."""
    try:
        return Dataset.pick(data, "data").modalities()
    except ConfigError:
        return ()


def paths_of(places: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return one place or several as a list of paths."""
    return [Path(places)] if isinstance(places, str | Path) else [Path(place) for place in places]


def read_results(folders: Sequence[Path]) -> ReportData:
    """Every run in the folders or archives (`reports/archive.py`), at any depth, in the order of their suites.

    A run that is found twice with the same results is taken once. Runs of one id with other rows, partition or base model
    stay apart, and are never paired.

    Raises FedmllmError for a folder that is missing, cannot be read or has no finished run, and for a damaged file.
    """
    from fedmllm.reports.archive import unpacked

    with unpacked(folders) as found:
        archives = {str(folder): str(place) for folder, place in zip(found, folders, strict=True) if folder != place}

        def displayed(text: str) -> str:
            for folder, archive in archives.items():
                text = text.replace(folder, archive)
            return text

        try:
            report = _read_folders(found)
        except FedmllmError as error:
            raise type(error)(displayed(str(error))) from None
        runs = tuple(
            replace(run, folder=place, predictions=kept_predictions(run.folder))
            if (place := Path(displayed(str(run.folder)))) != run.folder
            else run
            for run in report.runs
        )
        unfinished = tuple(map(displayed, report.unfinished))
        return replace(report, runs=runs, notes=tuple(map(displayed, report.notes)), unfinished=unfinished)


def kept_predictions(folder: Path) -> bytes | None:
    """Return the file of predictions of a run, or None if it has none."""
    path = RunFolder(folder).predictions
    return path.read_bytes() if path.is_file() else None


def _read_folders(folders: Sequence[Path]) -> ReportData:
    from fedmllm.reports.grouping import arrange

    titles: dict[str, None] = {}
    labels: dict[str, dict[str, str]] = {}
    claims: list[Mapping[str, Any]] = []
    runs: list[RunRecord] = []
    unfinished: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise FedmllmError(f"{folder}: not a folder or a .tar.xz of results; give folders of runs or suites")
        suites, records = _find(folder)
        for path in suites:
            title, of_suite, of_claims = read_suite(path)
            titles[title] = None
            labels |= of_suite
            claims += of_claims
        for path in records:
            if os.path.lexists(path.parent / SUMMARY):
                runs.append(read_run(path.parent))
            else:
                unfinished.append(str(path.parent))
    if not runs:
        raise FedmllmError(f"{', '.join(map(str, folders))}: no finished run (a folder with {RECORD} and {SUMMARY})")
    arranged, notes = arrange(runs, labels)
    started = {
        *(run.run_id for run in runs),
        *(Path(folder).name for folder in unfinished),
    }  # cells are named by run id
    missing = sum(run_id not in started for run_id in labels)
    title = " + ".join(titles) or "Federated fine-tuning: results"
    return ReportData(title, tuple(arranged), tuple(unfinished), missing, tuple(notes), tuple(claims))


def _find(folder: Path) -> tuple[list[Path], list[Path]]:
    """(suite files, records) in a folder, sorted."""

    def refuse(error: OSError) -> None:
        raise FedmllmError(f"{error.filename}: cannot be read: {error.strerror}") from None

    found: tuple[list[Path], list[Path]] = ([], [])
    for place, _, names in os.walk(folder, onerror=refuse):
        for paths, name in zip(found, (SUITE, RECORD), strict=True):
            paths += [Path(place) / name] if name in names else []
    if (folder / SUITE).is_dir():
        raise FedmllmError(f"{folder / SUITE}: a folder; it should be a suite's list of cells")
    return sorted(found[0]), sorted(found[1])


def read_suite(path: Path) -> tuple[str, dict[str, dict[str, str]], list[Mapping[str, Any]]]:
    """Title, run id -> labels, and declared claims. Raises FedmllmError naming the file."""
    try:
        suite = json.loads(path.read_text(encoding="utf-8"))
        labels = {str(c["run_id"]): {str(k): str(v) for k, v in c["labels"].items()} for c in suite["cells"]}
        return str(suite["title"]), labels, [dict(claim) for claim in suite.get("claims", [])]
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FedmllmError(f"{path}: not a suite's list of cells: {type(error).__name__}: {error}") from None


def read_run(folder: Path) -> RunRecord:
    """One run's folder. Raises FedmllmError naming the folder."""
    try:
        rows = [_row(row) for row in json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["rows"]]
        events = list(read(folder / RECORD))
        heading = next(event for event in events if event["event"] == "experiment")
        settings, row = current_keys(Experiment, heading["settings"], str(folder / RECORD)), rows[0]
        for event in events:
            settings |= {"num_rounds": event["num_rounds"]} if event["event"] == "extended" else {}
        digests = heading.get("digests") or {}
        return RunRecord(
            run_id=row["run_id"],
            folder=folder,
            data=settings["data"]["name"],  # type: ignore[index]
            scenario=row["scenario"],
            setting=setting_label(settings),
            method=method_label(settings, row["method"], row["prompt"]),
            draw=Draw(int(row["seed"]), str(digests.get("rows", ""))),
            settings=settings,
            heading=heading,
            rounds=tuple(_round(e) for e in events if e["event"] == "round"),
            evals=tuple(_eval(e) for e in events if e["event"] == "eval" and not e.get("node")),
            rows=tuple(rows),
            wall_s=float(row["wall_s"]),
            guarantee=next((dict(e["guarantee"]) for e in reversed(events) if e["event"] == "guarantee"), None),
        )
    except ConfigError:
        raise
    except StopIteration:
        raise FedmllmError(f"{folder}: not a run's record and summary: {RECORD} has no settings") from None
    except (OSError, KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FedmllmError(f"{folder}: not a run's record and summary: {type(error).__name__}: {error}") from None


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a summary, checked: texts are texts, everything else is a finite number or null."""
    for key in WORDS:
        if not isinstance(row[key], str):
            raise TypeError(f"{key}: got {str(row[key])[:60]!r}; it must be a text")
    if type(row["seed"]) is not int or type(row["wall_s"]) not in (int, float):
        raise TypeError(f"seed, wall_s: got {row['seed']!r}, {row['wall_s']!r}; they must be numbers")
    for key in row.keys() - {*WORDS, "setting", "privacy"}:
        _number(row[key], key)
    return {"value": row["value"], **row}


def _number(value: object, key: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    if value is not None and not is_number:  # the comparison is False for NaN
        raise ValueError(f"{key}: got {str(value)[:60]!r}; it must be a finite number or null")


def _round(event: Line) -> Line:
    for key in ("round", "up_bytes", "down_bytes", "wall_s"):
        _number(event[key], f"{RECORD}: round: {key}")
    return event


def _eval(event: Line) -> Line:
    for name, value in event["metrics"].items():
        _number(value, f"{RECORD}: eval: {name}")
    return {**event, "visible": str(event["visible"])}


def asked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings that can change results; without seeds and `Experiment.execution_only()`."""
    return {k: v for k, v in flat_keys(settings).items() if k not in SEEDS and not f"{k}.".startswith(EXECUTION_KEYS)}
