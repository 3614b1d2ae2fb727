"""Tables of one data set's results, as values."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from fedmllm.reports.comparisons import mean_over_settings
from fedmllm.reports.names import scenario_label
from fedmllm.reports.numerals import Scale, scale_of
from fedmllm.reports.published import PublishedNumbers, published_for
from fedmllm.reports.reading import BySeed, DatasetResults, RunRecord
from fedmllm.reports.sent import sent_bytes
from fedmllm.reports.stats import LEVEL, Spread, detectable, holm, paired, pooled_std
from fedmllm.scenarios.modalities.completion import Role

_ALL = "mean over settings"


@dataclass(frozen=True)
class TableCell:
    """One result: its spread over seeds, and its place in its row."""

    spread: Spread
    mark: str = ""  # "best", "second" or ""


@dataclass(frozen=True)
class ResultRow:
    """One setting: a cell a method.

    Marks are given to candidates with the same seeds: a baseline, control or bound is not one, and means of other seeds have
    no order.
    """

    scenario: str
    setting: str
    cells: Mapping[str, TableCell]
    is_clear: (
        bool  # whether the first place is above the second, corrected for all pairs of federated methods in the table
    )
    uneven: bool  # whether methods have different seeds


@dataclass(frozen=True)
class ResultTable:
    """The main table of a data set's results."""

    metric: str
    visible: str
    scale: Scale
    methods: tuple[str, ...]
    rows: tuple[ResultRow, ...]
    overall: ResultRow | None  # over the settings that every method has
    detectable_row: float | None  # difference of two federated methods in one setting that the seeds can detect
    detectable_mean: float | None  # the same for the mean over settings
    num_seeds: int
    roles: Mapping[str, Role]  # of the methods that are controls or bounds, which have no marks


def result_table(dataset: DatasetResults, metric: str = "", visible: str = "") -> ResultTable:
    """Mean, std and n over seeds of every setting and method; best and second of the federated methods."""
    values = dataset.values(metric, visible)
    metric, visible = metric or dataset.metric, visible or dataset.visible
    scale = scale_of(metric, [v for seeds in values.values() for v in seeds.values()])
    methods = tuple(m for m in dataset.methods if any((s, m) in values for s in dataset.settings))
    own = {
        (scenario_label(scenario, dataset.has_gaps), setting): {
            m: values[setting, m] for m in methods if (setting, m) in values
        }
        for scenario, settings in dataset.scenarios.items()
        for setting in settings
    }
    own = {place: of_row for place, of_row in own.items() if of_row}
    whole = {m: seeds for m in methods if (seeds := mean_over_settings(values, m, [s for _, s in own]))}
    if len(own) > 1 and whole:
        own["", _ALL] = whole
    rows = {place: _row(*place, of_row, dataset.candidates, scale) for place, of_row in own.items()}
    rows = _with_clear_leads(rows, own, dataset.candidates)
    overall = rows.pop(("", _ALL), None)
    federated = [m for m in methods if m in dataset.candidates]
    return ResultTable(
        metric=metric,
        visible=visible,
        scale=scale,
        methods=methods,
        rows=tuple(rows.values()),
        overall=overall,
        detectable_row=_detectable([seeds for place, seeds in own.items() if place[1] != _ALL], federated),
        detectable_mean=_detectable([whole], federated),
        num_seeds=max((len(seeds) for of_row in own.values() for seeds in of_row.values()), default=0),
        roles={m: role for m, role in dataset.roles.items() if m in methods},
    )


def _row(scenario: str, setting: str, own: Mapping[str, BySeed], federated: Sequence[str], scale: Scale) -> ResultRow:
    spreads = {method: Spread.of(seeds.values()) for method, seeds in own.items()}
    candidates = [m for m in own if m in federated]
    uneven = len({frozenset(seeds) for seeds in own.values()}) > 1
    marks: dict[str, str] = {}
    if len(candidates) > 1 and len({frozenset(own[m]) for m in candidates}) == 1:
        ranked = sorted(candidates, key=lambda m: spreads[m].mean, reverse=scale.higher_is_better)
        if spreads[ranked[0]].mean != spreads[ranked[1]].mean:
            marks = dict(zip(ranked, ("best", "second"), strict=False))
    cells = {method: TableCell(spread, marks.get(method, "")) for method, spread in spreads.items()}
    return ResultRow(scenario, setting, cells, False, uneven)


Place = tuple[str, str]


def _with_clear_leads(
    rows: dict[Place, ResultRow], own: Mapping[Place, Mapping[str, BySeed]], federated: Sequence[str]
) -> dict[Place, ResultRow]:
    """First places are chosen on the same results as they are tested on, so the family is every pair in every row."""
    p_values: dict[str, float] = {}
    for place, of_row in own.items():
        for a, b in combinations([m for m in of_row if m in federated], 2):
            test = paired(of_row[a], of_row[b])
            if test and test.p is not None:
                p_values[f"{place}|{frozenset((a, b))}"] = test.p
    adjusted = holm(p_values)
    found = {}
    for place, row in rows.items():
        first = {mark: method for method, cell in row.cells.items() if (mark := cell.mark)}
        key = f"{place}|{frozenset((first.get('best'), first.get('second')))}"
        found[place] = replace(row, is_clear=adjusted.get(key, 1.0) < LEVEL)
    return found


def _detectable(rows: Sequence[Mapping[str, BySeed]], federated: Sequence[str]) -> float | None:
    """Pooled over all pairs of federated methods of the rows; None without two of them and two seeds."""
    pooled = pooled_std(
        paired(of_row[a], of_row[b])
        for of_row in rows
        for a, b in combinations([m for m in of_row if m in federated], 2)
    )
    return detectable(*pooled) if pooled else None


@dataclass(frozen=True)
class PublishedRow:
    """Ours and published percents in one setting that agrees."""

    setting: str
    ours: Mapping[str, str]
    published: Mapping[str, float]


@dataclass(frozen=True)
class PublishedTable:
    """Published numbers next to ours, in the settings that agree alone."""

    source: PublishedNumbers
    methods: tuple[str, ...]
    rows: tuple[PublishedRow, ...]
    mean: Mapping[str, float]  # published, over the rows of this table
    agreeing: int  # orderings of two methods in a setting that are the same here
    stable: int  # of them, for every seed
    num_stable: int  # orderings that are the same for every seed here, whatever was published
    num_orderings: int


def published_table(dataset: DatasetResults, table: ResultTable) -> PublishedTable | None:
    """None if nothing is published for the data set, or no setting agrees."""
    source = published_for(dataset.data)
    if source is None or dataset.metric != table.metric:
        return None
    values, rows = dataset.values(), []
    orderings: list[tuple[bool, bool]] = []
    for row in table.rows:
        theirs = source.of(dataset.pick(row.setting)[0].settings)
        if theirs:
            ours = {m: table.scale.spread(c.spread.mean, c.spread.std) for m, c in row.cells.items() if m in theirs}
            rows.append(PublishedRow(row.setting, ours, theirs))
            orderings += _orderings(row.setting, values, theirs)
    if not rows:
        return None
    methods = tuple(rows[0].published)
    return PublishedTable(
        source=source,
        methods=methods,
        rows=tuple(rows),
        mean={m: statistics.fmean(row.published[m] for row in rows) for m in methods},
        agreeing=sum(same for same, _ in orderings),
        stable=sum(same for same, is_stable in orderings if is_stable),
        num_stable=sum(is_stable for _, is_stable in orderings),
        num_orderings=len(orderings),
    )


def _orderings(
    setting: str, values: Mapping[tuple[str, str], BySeed], theirs: Mapping[str, float]
) -> list[tuple[bool, bool]]:
    """(same direction as published?, same direction in every seed?) of each pair of methods."""
    found = []
    for a, b in combinations([m for m in theirs if (setting, m) in values], 2):
        ours = [x - values[setting, b][k] for k, x in values[setting, a].items() if k in values[setting, b]]
        published = theirs[a] - theirs[b]
        if ours and published and (mean := statistics.fmean(ours)):
            found.append((mean * published > 0, all(d * mean > 0 for d in ours) and len(ours) > 1))
    return found


@dataclass(frozen=True)
class CostRow:
    """Costs of a method: means over its runs, and the sum over all of them."""

    method: str
    num_runs: int
    num_rounds: float
    up_bytes: float
    down_bytes: float
    lora_share: float | None  # of the bytes sent, LoRA tensors; None if nothing was sent
    client_s: float
    server_s: float
    wall_s: float
    peak_host_bytes: float
    peak_device_bytes: float
    num_tokens: float
    completion_up_bytes: float  # before training, of a completion that learns
    completion_down_bytes: float
    completion_s: float  # of wall_s
    total_bytes: float  # of all runs, those before training included
    total_wall_s: float

    @property
    def before_training_bytes(self) -> float:
        return self.completion_up_bytes + self.completion_down_bytes


def costs(dataset: DatasetResults) -> list[CostRow]:
    """One row a method."""
    return [_costs(method, dataset.pick(method=method)) for method in dataset.methods]


def _costs(method: str, runs: list[RunRecord]) -> CostRow:
    def mean(key: str) -> float:
        return statistics.fmean(float(run.rows[0].get(key) or 0) for run in runs)

    sent = mean("up_bytes") + mean("down_bytes")
    return CostRow(
        method=method,
        num_runs=len(runs),
        num_rounds=mean("num_rounds"),
        up_bytes=mean("up_bytes"),
        down_bytes=mean("down_bytes"),
        lora_share=(mean("up_lora_bytes") + mean("down_lora_bytes")) / sent if sent else None,
        client_s=mean("client_s"),
        server_s=mean("server_s"),
        wall_s=mean("wall_s"),
        peak_host_bytes=max(float(run.rows[0].get("peak_host_bytes") or 0) for run in runs),
        peak_device_bytes=max(float(run.rows[0].get("peak_device_bytes") or 0) for run in runs),
        num_tokens=mean("num_tokens"),
        completion_up_bytes=mean("completion_up_bytes"),
        completion_down_bytes=mean("completion_down_bytes"),
        completion_s=mean("completion_s"),
        total_bytes=sum(sent_bytes(run.rows[0]) for run in runs),
        total_wall_s=sum(run.wall_s for run in runs),
    )


@dataclass(frozen=True)
class Matrix:
    """Train setting x visible modalities of the test rows: means over seeds of one method."""

    method: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Spread]]
    gaps: bool = False  # whether rows lack modalities by themselves


def matrices(dataset: DatasetResults) -> list[Matrix]:
    """One a method; none if only one kind of test was made."""
    columns = tuple(dict.fromkeys(row["visible"] for run in dataset.runs for row in run.rows))
    if len(columns) < 2:
        return []
    by_visible = {visible: dataset.values(dataset.metric, visible) for visible in columns}
    found = []
    for method in dataset.methods:
        rows = {}
        for setting in dataset.settings:
            own = {v: by_visible[v].get((setting, method)) for v in columns}
            if all(own.values()):
                rows[setting] = {v: Spread.of(seeds.values()) for v, seeds in own.items() if seeds}
        if rows:
            found.append(Matrix(method, columns, rows, dataset.has_gaps))
    return found
