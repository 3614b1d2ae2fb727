"""Tables of one data set's results, as values."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from fedmllm.reports.published import Published, published_for
from fedmllm.reports.reading import DatasetResults, RunRecord, Seeds
from fedmllm.reports.stats import Paired, Spread, holm, mean_over_settings, paired

ALL = "mean over settings"


@dataclass(frozen=True)
class Cell:
    """One result: its spread over seeds, and its place in its row."""

    spread: Spread
    mark: str = ""  # "best", "second" or ""

    @property
    def text(self) -> str:
        """Percent: "97.3 ± 0.4"."""
        std = f" ± {100 * self.spread.std:.1f}" if self.spread.std is not None else ""
        return f"{100 * self.spread.mean:.1f}{std}"


@dataclass(frozen=True)
class ResultRow:
    """One setting: a cell a method, and whether the first place is more than noise."""

    scenario: str
    setting: str
    cells: Mapping[str, Cell]
    lead: Paired | None  # best minus second, paired over seeds
    p_holm: float | None  # of the lead, corrected for all rows of the table
    published: Mapping[str, float]  # percent, in the paper's own setting of this name

    @property
    def is_clear(self) -> bool:
        return self.p_holm is not None and self.p_holm < 0.05


@dataclass(frozen=True)
class ResultTable:
    """The main table of a dataset."""

    metric: str
    visible: str
    methods: tuple[str, ...]
    rows: tuple[ResultRow, ...]
    overall: ResultRow | None  # over the settings that every method has
    published: Published | None


def result_table(dataset: DatasetResults, metric: str = "", visible: str = "") -> ResultTable:
    """Mean, std and n over seeds of every setting and method; best and second; the published columns."""
    values = dataset.values(metric, visible)
    metric, visible = metric or dataset.metric, visible or dataset.visible
    published = published_for(dataset.data)
    methods = tuple(m for m in dataset.methods if any((s, m) in values for s in dataset.settings))
    rows = []
    for scenario, settings in dataset.scenarios.items():
        for setting in settings:
            own = {m: values[setting, m] for m in methods if (setting, m) in values}
            theirs = {m: row[setting] for m, row in (published.values if published else {}).items() if setting in row}
            if own:
                rows.append(_row(scenario, setting, own, theirs))
    corrected = holm({row.setting: row.lead.p for row in rows if row.lead and row.lead.p is not None})
    rows = [ResultRow(**{**row.__dict__, "p_holm": corrected.get(row.setting)}) for row in rows]
    whole = {m: mean_over_settings(values, m, [row.setting for row in rows]) for m in methods}
    whole = {m: seeds for m, seeds in whole.items() if seeds}
    overall = None
    if len(rows) > 1 and whole:
        means = published.values if published else {}
        overall = _row("", ALL, whole, {m: statistics.fmean(row.values()) for m, row in means.items()})
        overall = ResultRow(**{**overall.__dict__, "p_holm": overall.lead.p if overall.lead else None})
    return ResultTable(metric, visible, methods, tuple(rows), overall, published)


def _row(scenario: str, setting: str, own: Mapping[str, Seeds], theirs: Mapping[str, float]) -> ResultRow:
    spreads = {method: Spread.of(list(seeds.values())) for method, seeds in own.items()}
    ranked = sorted(spreads, key=lambda method: -spreads[method].mean)
    marks = dict(zip(ranked, ("best", "second"), strict=False)) if len(ranked) > 1 else {}
    lead = paired(own[ranked[0]], own[ranked[1]]) if len(ranked) > 1 else None
    cells = {method: Cell(spread, marks.get(method, "")) for method, spread in spreads.items()}
    return ResultRow(scenario, setting, cells, lead, None, theirs)


@dataclass(frozen=True)
class CostRow:
    """What a method costs: means over its runs, and the sum over all of them."""

    method: str
    num_runs: int
    num_rounds: float
    up_bytes: float
    down_bytes: float
    lora_share: float | None  # of the bytes sent, LoRA tensors; None where nothing was sent
    client_s: float
    server_s: float
    wall_s: float
    peak_host_bytes: float
    peak_device_bytes: float
    num_tokens: float
    total_bytes: float
    total_wall_s: float


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
        total_bytes=sent * len(runs),
        total_wall_s=sum(run.wall_s for run in runs),
    )


@dataclass(frozen=True)
class Matrix:
    """Train setting x what test rows show: means over seeds of one method."""

    method: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Spread]]


def matrices(dataset: DatasetResults) -> list[Matrix]:
    """One a method; none where only one kind of test was made."""
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
                rows[setting] = {v: Spread.of(list(seeds.values())) for v, seeds in own.items() if seeds}
        if rows:
            found.append(Matrix(method, columns, rows))
    return found
