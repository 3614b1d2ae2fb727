"""Results by test row: groups of rows, calibration, confusion, paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from fedmllm.core.types import Prediction
from fedmllm.reports.names import base_of
from fedmllm.reports.numerals import Scale
from fedmllm.reports.reading import DatasetResults, ReportData, RunRecord
from fedmllm.reports.stats import holm
from fedmllm.reports.tables import result_table
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.predictions import Evaluation, final_evaluations, groups_of
from fedmllm.runs.row_statistics import (
    Calibration,
    Confusion,
    PairedRows,
    RowEstimate,
    calibration,
    confusion,
    estimate_rows,
    paired_rows,
)
from fedmllm.runs.slices import BY_SHOWS, groupings, modalities_of, slices

MOST_SETTINGS = 4  # of which the rows are read; beyond, one of each scenario
MOST_METHODS = 8
MOST_LABELS = 8  # of a confusion matrix
ALL_ROWS = "all rows"


@dataclass(frozen=True)
class Slice:
    """One group of test rows: a result per method, and the mean of the federated ones."""

    by: str  # "", "shows", "site", or a column
    name: str
    num_rows: int
    cells: Mapping[str, RowEstimate]
    federated: RowEstimate | None


@dataclass(frozen=True)
class Hidden:
    """Cost of hiding modalities on the test rows that have all of them: the same rows, with less visible."""

    visible: str
    test: PairedRows  # mean of the federated methods: hidden - complete


@dataclass(frozen=True)
class RowTest:
    """Two methods on the same test rows."""

    higher: str
    lower: str
    test: PairedRows
    p_holm: float | None


@dataclass(frozen=True)
class RowResults:
    """One setting of a data set, row by row."""

    setting: str
    metric: str
    scale: Scale
    methods: tuple[str, ...]
    federated: tuple[str, ...]
    num_runs: Mapping[str, int]  # whose predictions are averaged, a client's own adapter counts as one
    whole: Slice
    slices: tuple[Slice, ...]
    has_gaps: bool  # whether test rows lack modalities
    hidden: tuple[Hidden, ...]
    calibrations: Mapping[str, Calibration]
    confusions: Mapping[str, Confusion]
    tests: tuple[RowTest, ...]

    def by(self, name: str) -> list[Slice]:
        """The groups of one kind."""
        return [one for one in self.slices if one.by == name]

    @property
    def kinds(self) -> list[str]:
        """The kinds of groups, in order."""
        return list(dict.fromkeys(one.by for one in self.slices))


def row_results(dataset: DatasetResults, scale: Scale) -> list[RowResults]:
    """Results by row of each setting; of one setting a scenario, the hardest, if there are many.

    Runs without predictions, from earlier releases, are left out, as are those on other test rows than the first one's.
    """
    if dataset.metric in dataset.undefined or not scale.higher_is_better:
        return []
    settings = dataset.settings
    if len(settings) > MOST_SETTINGS:
        settings = [several[-1] for several in dataset.scenarios.values()]
    return [found for setting in settings if (found := _of_setting(dataset, setting, scale))]


def results_by_row(report: ReportData) -> dict[str, list[RowResults]]:
    """Data set -> its results by row."""
    return {d.data: row_results(d, result_table(d).scale) for d in report.datasets}


def _of_setting(dataset: DatasetResults, setting: str, scale: Scale) -> RowResults | None:
    methods = [m for m in dataset.methods if dataset.pick(setting, m)]
    methods = [m for m in methods if base_of(m, methods) is None][:MOST_METHODS]
    read = {m: [e for run in dataset.pick(setting, m) for e in evaluations(run)] for m in methods}
    order = sorted(read, key=lambda m: m not in dataset.candidates)  # rows as the federated methods saw them
    first = next((one for m in order for one in read[m]), None)
    if first is None:
        return None
    rows = row_identities(first)
    kept = {m: [one.predictions for one in several if row_identities(one) == rows] for m, several in read.items()}
    kept = {m: several for m, several in kept.items() if several}
    federated = tuple(m for m in kept if m in dataset.candidates)
    groups = groups_of(first.predictions, str(dataset.pick(setting)[0].settings["data"].get("group") or ""))
    metric = dataset.metric

    def cut(by: str, name: str, places: Sequence[int]) -> Slice:
        chosen = {m: [[run[i] for i in places] for run in several] for m, several in kept.items()}
        own = [groups[i] for i in places] if groups else []
        cells = {m: estimate_rows(metric, several, own) for m, several in chosen.items()}
        of_federated = [run for m in federated for run in chosen[m]]
        mean = estimate_rows(metric, of_federated, own) if of_federated else None
        return Slice(by, name, len(places), cells, mean)

    return RowResults(
        setting=setting,
        metric=metric,
        scale=scale,
        methods=tuple(kept),
        federated=federated,
        num_runs={m: len(several) for m, several in kept.items()},
        whole=cut("", ALL_ROWS, range(len(rows))),
        slices=tuple(cut(by, name, places) for by in groupings(first) for name, places in slices(first, by).items()),
        has_gaps=any(len(has) < len(modalities_of(first)) for has in first.has),
        hidden=_hidden(dataset, setting, first, federated),
        calibrations={m: c for m, several in kept.items() if (c := calibration([p for run in several for p in run]))},
        confusions={
            m: matrix
            for m, several in kept.items()
            if (matrix := confusion([p for run in several for p in run])) and len(matrix.labels) <= MOST_LABELS
        },
        tests=_tests(kept, metric, groups, federated),
    )


def evaluations(run: RunRecord, visible: str = "") -> list[Evaluation]:
    """Kept predictions of a run's result, one evaluation or one per client; [] without a file of predictions."""
    path, content = RunFolder(run.folder).predictions, run.predictions
    if content is None and not path.is_file():
        return []
    return final_evaluations(path, visible or run.headline[1], content)


def row_identities(evaluation: Evaluation) -> list[tuple[object, ...]]:
    """Return what identifies the test rows of an evaluation, in their order."""
    return [(p.example.id, p.example.choices, p.example.answer) for p in evaluation.predictions]


def _tests(
    kept: Mapping[str, Sequence[Sequence[Prediction]]], metric: str, groups: Sequence[str], federated: Sequence[str]
) -> tuple[RowTest, ...]:
    """Pairs with a federated method among them, corrected together, the higher one first."""
    found = []
    for a, b in combinations(kept, 2):
        test = paired_rows(metric, kept[a], kept[b], groups) if {a, b} & set(federated) else None
        if test and test.difference < 0:
            a, b, test = b, a, paired_rows(metric, kept[b], kept[a], groups)
        if test:
            found.append(RowTest(a, b, test, None))
    adjusted = holm({str(i): t.test.p for i, t in enumerate(found) if t.test.p is not None})
    return tuple(replace(t, p_holm=adjusted.get(str(i))) for i, t in enumerate(found))


def _hidden(dataset: DatasetResults, setting: str, first: Evaluation, federated: Sequence[str]) -> tuple[Hidden, ...]:
    """The further evaluations of the federated runs, with fewer visible modalities, on the rows that have all of them."""
    modalities = modalities_of(first)
    whole = [i for i, has in enumerate(first.has) if len(has) == len(modalities)]
    if first.visible not in ("all", "both") or not whole or len(modalities) < 2:
        return ()
    runs = [run for m in federated for run in dataset.pick(setting, m)]
    found = []
    kinds = dict.fromkeys(row["visible"] for run in runs for row in run.rows)
    complete = [one for run in runs for one in evaluations(run)]
    groups = groups_of(first.predictions, str(runs[0].settings["data"].get("group") or "")) if runs else []
    for visible in kinds:
        less = [one for run in runs for one in evaluations(run, visible)] if visible != first.visible else []
        if (
            len(less) == len(complete)
            and less
            and all(row_identities(x) == row_identities(first) for x in (*less, *complete))
        ):
            sides = [[[one.predictions[i] for i in whole] for one in several] for several in (less, complete)]
            own = [groups[i] for i in whole] if groups else []
            if test := paired_rows(dataset.metric, sides[0], sides[1], own):
                found.append(Hidden(visible, test))
    return tuple(found)


def kind_label(by: str) -> str:
    """Heading of a kind of groups."""
    return {BY_SHOWS: "test row has", "site": "site"}.get(by, by.replace("_", " "))
