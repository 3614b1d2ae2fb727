"""`fedmllm compare`: differences of two groups of runs, with paired tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedmllm.core.errors import FedmllmError
from fedmllm.core.text import flat_keys
from fedmllm.reports.numerals import DASH, counted, p_text, signed
from fedmllm.reports.reading import EXECUTION_KEYS, RunRecord, asked, paths_of, read_results
from fedmllm.reports.stats import Paired, paired

DIGESTS = {  # name -> the settings that it follows from: with other settings, another digest is expected
    "rows": ("data.",),
    "partition": ("data.", "partition.", "scenario."),
    "base": ("backbone.",),
}


@dataclass(frozen=True)
class ComparedRow:
    """One metric and kind of test row of both sides; means are over pairs, or over all runs if there is no pair."""

    metric: str
    visible: str
    a: float | None
    b: float | None
    test: Paired | None  # a - b over pairs


@dataclass(frozen=True)
class RunComparison:
    """The content of `fedmllm compare`."""

    settings: dict[str, tuple[str, str]]  # key -> values on either side
    execution_only: dict[str, tuple[str, str]]  # the same for settings that do not change results
    digests: dict[str, tuple[str, str]]  # unequal digests that no setting explains; their runs are not paired
    rows: tuple[ComparedRow, ...]
    num_a: int
    num_b: int
    num_pairs: int


def compare(a: str | Path | Sequence[str | Path], b: str | Path | Sequence[str | Path]) -> RunComparison:
    """Pair runs whose settings agree in all but those that differ between the sides: seed with seed, and so on.

    Runs over other rows are never paired, and neither are those of another partition or base model with equal settings.

    Args:
        a: Folders of runs, or of folders of runs: the first side.
        b: The same: the second side.

    Returns:
        Differing settings, results with their paired tests, and the numbers of runs.

    Raises:
        FedmllmError: A folder has no finished run, runs would be paired twice, or the two sides share no metric.
    """
    side_a, side_b = paths_of(a), paths_of(b)
    runs_a, runs_b = read_results(side_a).runs, read_results(side_b).runs
    differing = {key: words for key, words in setting_differences(runs_a, runs_b).items() if key != "seed"}
    keys = [_key(run, differing) for run in runs_a], [_key(run, differing) for run in runs_b]
    for runs, of_side, place in ((runs_a, keys[0], side_a), (runs_b, keys[1], side_b)):
        if len(set(of_side)) < len(of_side):
            twice = next(run.run_id for run, key in zip(runs, of_side, strict=True) if of_side.count(key) > 1)
            raise FedmllmError(
                f"{', '.join(map(str, place))}: several runs (one is {twice}) would be paired with the same run of the other "
                "side; give folders whose runs differ from the other side's in one way"
            )
    left, right = dict(zip(keys[0], runs_a, strict=True)), dict(zip(keys[1], runs_b, strict=True))
    shared = [key for key in left if key in right]
    unequal = {key: _unequal(left[key], right[key], differing) for key in shared}
    digests = {name: words for key in shared for name, words in unequal[key].items()}
    pairs = [(left[key], right[key]) for key in shared if not unequal[key]]
    kinds = dict.fromkeys((r["metric"], r["visible"]) for run in (*runs_a, *runs_b) for r in run.rows)
    rows = [row for kind in kinds if (row := _row(*kind, runs_a, runs_b, pairs))]
    rows = [row for row in rows if not row.a is row.b is None] or rows  # a metric that no row of either side defines
    if not rows:
        raise FedmllmError("the two sides share no metric; compare runs on the same data set")
    execution = {key: words for key, words in differing.items() if f"{key}.".startswith(EXECUTION_KEYS)}
    others = {key: words for key, words in differing.items() if key not in execution}
    return RunComparison(others, execution, digests, tuple(rows), len(runs_a), len(runs_b), len(pairs))


def _unequal(a: RunRecord, b: RunRecord, differing: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Digests that differ, though no setting that differs explains it; rows must be equal in any case."""
    found = {}
    for name, causes in DIGESTS.items():
        words = a.digests.get(name, "unknown")[:16], b.digests.get(name, "unknown")[:16]
        explained = name != "rows" and any(f"{key}.".startswith(causes) for key in differing)
        if words[0] != words[1] and not explained:
            found[name] = words
    return found


def _row(
    metric: str,
    visible: str,
    a: Sequence[RunRecord],
    b: Sequence[RunRecord],
    pairs: Sequence[tuple[RunRecord, RunRecord]],
) -> ComparedRow | None:
    """None if one side does not have the metric, or if both have no unparsed answer."""
    has = [any((r["metric"], r["visible"]) == (metric, visible) for run in side for r in run.rows) for side in (a, b)]
    if not all(has):
        return None
    values = [(x.value(metric, visible), y.value(metric, visible)) for x, y in pairs]
    both = {i: (x, y) for i, (x, y) in enumerate(values) if x is not None and y is not None}
    if both:
        sides = [[pair[i] for pair in both.values()] for i in (0, 1)]
    else:
        sides = [[v for run in side if (v := run.value(metric, visible)) is not None] for side in (a, b)]
    if metric == "unparsed" and not any(sides[0]) and not any(sides[1]):
        return None
    test = paired({i: x for i, (x, _) in both.items()}, {i: y for i, (_, y) in both.items()})
    means = [sum(side) / len(side) if side else None for side in sides]
    return ComparedRow(metric, visible, means[0], means[1], test)


def setting_differences(a: Sequence[RunRecord], b: Sequence[RunRecord]) -> dict[str, tuple[str, str]]:
    """Keys whose sets of values over a side's runs differ, with these values; "-" if a key does not exist."""
    sides = [[flat_keys(run.settings) for run in runs] for runs in (a, b)]
    found = {}
    for key in dict.fromkeys(key for side in sides for settings in side for key in settings):
        words = [sorted({str(settings.get(key, "-")) for settings in side}) for side in sides]
        if words[0] != words[1]:
            found[key] = (", ".join(words[0]), ", ".join(words[1]))
    return found


def _key(run: RunRecord, differing: dict[str, Any]) -> str:
    return str(sorted((k, str(v)) for k, v in {**asked(run.settings), "seed": run.seed}.items() if k not in differing))


def row_verdict(row: ComparedRow) -> str:
    """Statement about the difference."""
    if row.a is None or row.b is None:
        sides = [name for name, mean in (("A", row.a), ("B", row.b)) if mean is None]
        return "not defined on either side" if len(sides) == 2 else f"not defined for {sides[0]}"
    t = row.test
    if t is None:
        return "no pairs"
    if t.p is None:
        return "one pair: no test" if t.n < 2 else "no spread over seeds: no test"
    if t.p >= 0.05:
        needed = f"about {n:,} needed" if (n := t.needed()) else "over 10,000 needed"
        return f"not established with {t.n} pairs, {needed}"
    return "A is higher" if t.difference > 0 else "A is lower"


def show_comparison(comparison: RunComparison, console: Console | None = None) -> None:
    """Print the settings and digests that differ, and the results with their tests."""
    console = console or Console()
    c = comparison
    settings = Table("setting", "A", "B", title="Differences", title_justify="left")
    for key, (left, right) in {**c.settings, **c.execution_only}.items():
        settings.add_row(key, left, right, style="dim" if key in c.execution_only else "")
    for name, (left, right) in c.digests.items():
        settings.add_row(f"digest of {name}", left, right, style="bold")
    console.print(settings if settings.row_count else "No setting and no digest differs.")
    if c.digests:
        console.print(f"The runs are not over equal {' and '.join(c.digests)}, so they are not paired.", style="bold")
    results = Table("metric", "visible", title="Results", title_justify="left")
    for column in ("A", "B", "A - B", "95 % interval", "p"):
        results.add_column(column, justify="right")
    results.add_column("")
    for row in c.rows:
        t = row.test
        ends = f"{signed(t.low, 3)} to {signed(t.high, 3)}" if t and t.low is not None and t.high is not None else DASH
        difference = signed(t.difference, 3) if t else DASH
        means = [DASH if mean is None else f"{mean:.3f}" for mean in (row.a, row.b)]
        results.add_row(row.metric, row.visible, *means, difference, ends, p_text(t.p if t else None), row_verdict(row))
    console.print(results)
    console.print(
        f"A: {counted(c.num_a, 'run')}, B: {counted(c.num_b, 'run')}, {counted(c.num_pairs, 'pair')} with equal rows and other "
        "settings; means and paired t-test over pairs."
        + ("" if c.num_pairs > 2 or c.digests else " More seeds are needed: fedmllm run ... --seed N.")
    )
