"""Tables of one data set's results, as values."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from fedmllm.reports.comparisons import all_pairs, mean_over_settings
from fedmllm.reports.names import scenario_label
from fedmllm.reports.numerals import Scale, listed_words, scale_of
from fedmllm.reports.published import PublishedNumbers, published_for
from fedmllm.reports.reading import BySeed, DatasetResults, RunRecord
from fedmllm.reports.sent import sent_bytes
from fedmllm.reports.stats import LEVEL, Paired, Spread, detectable, holm, paired, pooled_std
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
    is_clear: bool  # whether the lead of the first place over the second is established
    uneven: bool  # whether methods have different seeds

    def is_unsure(self, method: str) -> bool:
        """True if the method is the best of the row, and a test does not establish its lead."""
        cell = self.cells[method]
        return cell.mark == "best" and not self.is_clear and cell.spread.n > 1


@dataclass(frozen=True)
class Detectable:
    """Difference of two federated methods that a test finds with 80 % power at the 5 % level."""

    difference: float
    methods: tuple[str, ...]  # the two methods, in alphabetical order; () if it is pooled over several pairs

    @property
    def of(self) -> str:
        """ "FedAdam and FedAvg", or "two federated methods"."""
        return listed_words(self.methods) or "two federated methods"


@dataclass(frozen=True)
class ResultTable:
    """The main table of a data set's results."""

    metric: str
    visible: str
    scale: Scale
    methods: tuple[str, ...]
    rows: tuple[ResultRow, ...]
    overall: ResultRow | None  # over the settings that every method has
    row_family: int  # tests that are corrected together for the marks of the rows; 0 if a row is the mean over settings
    mean_family: int  # tests of means over settings that are corrected together: every pair with a federated method
    detectable_row: Detectable | None  # in one setting
    detectable_mean: Detectable | None  # in the mean over settings
    roles: Mapping[str, Role]  # of the methods that are controls or bounds, which have no marks

    def seeds(self, methods: Collection[str] = ()) -> tuple[int, int]:
        """Return the fewest and the most seeds of a cell.

        Args:
            methods: Whose cells are counted; () = all methods.
        """
        rows = (*self.rows, *([self.overall] if self.overall else []))
        found = [c.spread.n for row in rows for m, c in row.cells.items() if not methods or m in methods]
        return min(found, default=0), max(found, default=0)


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
    overall = rows.pop(("", _ALL), None)
    federated = [m for m in methods if m in dataset.candidates]
    tests = {place: _pair_tests(own[place], federated) for place in rows}
    of_means = all_pairs(dataset, metric, visible)
    sure_means = {frozenset((c.higher, c.lower)) for c in of_means if c.is_established}
    in_rows = holm({(at, pair): t.p for at, found in tests.items() for pair, t in found.items() if t.p is not None})
    if len(rows) > 1:
        sure_rows = {key for key, p in in_rows.items() if p < LEVEL}
    else:  # the only setting is the mean over settings
        sure_rows = {(at, pair) for at in rows for pair in sure_means}
    rows = {at: replace(row, is_clear=(at, _first_two(row)) in sure_rows) for at, row in rows.items()}
    overall = replace(overall, is_clear=_first_two(overall) in sure_means) if overall else None
    return ResultTable(
        metric=metric,
        visible=visible,
        scale=scale,
        methods=methods,
        rows=tuple(rows.values()),
        overall=overall,
        row_family=len(in_rows) if len(rows) > 1 else 0,
        mean_family=sum(c.p_holm is not None for c in of_means),
        detectable_row=_detectable(tests.values()),
        detectable_mean=_detectable([_pair_tests(whole, federated)]),
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


def _pair_tests(of_row: Mapping[str, BySeed], federated: Sequence[str]) -> dict[frozenset[str], Paired]:
    """Tests of the pairs of federated methods of a row that share a seed."""
    pairs = combinations([m for m in of_row if m in federated], 2)
    return {frozenset((a, b)): test for a, b in pairs if (test := paired(of_row[a], of_row[b]))}


def _first_two(row: ResultRow) -> frozenset[str]:
    return frozenset(method for method, cell in row.cells.items() if cell.mark)


def _detectable(rows: Iterable[Mapping[frozenset[str], Paired]]) -> Detectable | None:
    """Pooled over the tests of the rows; None without a spread over seeds."""
    known = [(pair, test) for tests in rows for pair, test in tests.items() if test.std is not None]
    pooled = pooled_std(test for _, test in known)
    if pooled is None:
        return None
    pairs = {pair for pair, _ in known}
    return Detectable(detectable(*pooled), tuple(sorted(pairs.pop())) if len(pairs) == 1 else ())


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
