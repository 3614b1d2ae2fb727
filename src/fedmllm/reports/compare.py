"""`fedmllm compare`: differences of two groups of runs, with paired tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedmllm.core.errors import FedmllmError
from fedmllm.core.metrics import METRICS
from fedmllm.core.text import flat_keys
from fedmllm.reports.comparisons import not_established
from fedmllm.reports.numerals import COUNTS, DASH, counted, p_text, signed
from fedmllm.reports.reading import EXECUTION_KEYS, RunRecord, asked, paths_of, read_results
from fedmllm.reports.rows import evaluations, row_identities
from fedmllm.reports.stats import LEVEL, Paired, holm, mean_of, paired
from fedmllm.runs.predictions import Evaluation, groups_of
from fedmllm.runs.row_statistics import paired_rows

DIGESTS = {  # name -> the settings that it follows from: with other settings, another digest is expected
    "rows": ("data.",),
    "partition": ("data.", "partition.", "scenario."),
    "base": ("backbone.",),
}


# Metrics whose bootstrap takes milliseconds; of the others the first one alone has its error.
FAST = ("auc", "accuracy")
Key = tuple[str, int]  # settings on which both sides of a pair agree, and the seed


@dataclass(frozen=True)
class ComparedRow:
    """One metric and kind of test row of both sides.

    A seed counts once: its value is the mean over its pairs, which differ in other settings. The means are over the seeds that
    have every pair; if there is none, over pairs, or over all runs if there is no pair.
    """

    metric: str
    visible: str
    a: float | None
    b: float | None
    test: Paired | None  # a - b over seeds
    num_pairs: int = 0
    num_cells: int = 0  # pairs of a seed
    p_holm: float | None = None  # corrected for the rows of its family: the headline alone, or all others
    family: int = 1  # tests that are corrected together
    row_half: float | None = None  # half of the 95 % interval of a - b from drawing the test rows, by kept predictions


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

    Pairs of one seed are averaged before the test, so that n is the number of seeds. The headline metric is tested alone;
    Holm's correction is over the other rows of the table. Runs over other rows are never paired, and neither are those of
    another partition or base model with equal settings.

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
    kept: dict[tuple[Path, str], list[Evaluation]] = {}

    def predicted(run: RunRecord, visible: str) -> list[Evaluation]:
        place = run.folder, visible
        if place not in kept:
            kept[place] = evaluations(run, visible)
        return kept[place]

    shared = [key for key in left if key in right]
    unequal = {key: _unequal(left[key], right[key], differing) for key in shared}
    digests = {name: words for key in shared for name, words in unequal[key].items()}
    pairs = {key: (left[key], right[key]) for key in shared if not unequal[key]}
    kinds = dict.fromkeys((r["metric"], r["visible"]) for run in (*runs_a, *runs_b) for r in run.rows)
    rows = [row for kind in kinds if (row := _row(*kind, runs_a, runs_b, pairs, predicted))]
    rows = [row for row in rows if not row.a is row.b is None] or rows  # a metric that no row of either side defines
    if not rows:
        unseen = [r.method for r in (*runs_a, *runs_b) if all(row["visible"] == "none" for row in r.rows)]
        advice = (
            f"{unseen[0]} reads no modality, so its rows have visible = none"
            if unseen
            else "compare runs on the same data set"
        )
        raise FedmllmError(f"the two sides share no metric and visibility; {advice}")
    headline = next((i for i, row in enumerate(rows) if (row.metric, row.visible) == runs_a[0].headline), None)
    for family in ([i for i in range(len(rows)) if i == headline], [i for i in range(len(rows)) if i != headline]):
        adjusted = holm({i: t.p for i in family if (t := rows[i].test) and t.p is not None})
        for i in family:
            rows[i] = replace(rows[i], p_holm=adjusted.get(i), family=max(1, len(adjusted)))
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
    pairs: Mapping[Key, tuple[RunRecord, RunRecord]],
    predicted: Callable[[RunRecord, str], list[Evaluation]],
) -> ComparedRow | None:
    """None if one side does not have the metric, or if both have no unparsed answer."""
    has = [any((r["metric"], r["visible"]) == (metric, visible) for run in side for r in run.rows) for side in (a, b)]
    if not all(has):
        return None
    values = {key: (x.value(metric, visible), y.value(metric, visible)) for key, (x, y) in pairs.items()}
    both = {key: (x, y) for key, (x, y) in values.items() if x is not None and y is not None}
    cells = list(dict.fromkeys(cell for cell, _ in both))
    of_seeds = [
        mean_of([{seed: pair[i] for (own, seed), pair in both.items() if own == cell} for cell in cells])
        for i in (0, 1)
    ]
    if of_seeds[0]:
        sides = [list(of_seed.values()) for of_seed in of_seeds]
    elif both:
        sides = [[pair[i] for pair in both.values()] for i in (0, 1)]
    else:
        sides = [[v for run in side if (v := run.value(metric, visible)) is not None] for side in (a, b)]
    if metric == "unparsed" and not any(sides[0]) and not any(sides[1]):
        return None
    means = [sum(side) / len(side) if side else None for side in sides]
    used = [pairs[key] for key in both if key[1] in of_seeds[0]]
    half = _row_half(metric, visible, used, predicted)
    test = paired(*of_seeds)
    return ComparedRow(metric, visible, means[0], means[1], test, len(both), len(cells), row_half=half)


def _row_half(
    metric: str,
    visible: str,
    pairs: Sequence[tuple[RunRecord, RunRecord]],
    predicted: Callable[[RunRecord, str], list[Evaluation]],
) -> float | None:
    """Half of the 95 % interval of the mean difference from drawing the test rows; None without all predictions.

    Pairs on the same test rows are drawn together; test sets are independent of each other.
    """
    if not pairs or metric in COUNTS or metric not in METRICS or metric not in (*FAST, pairs[0][0].headline[0]):
        return None
    sets: dict[tuple[object, ...], tuple[list[Evaluation], list[Evaluation]]] = {}
    for pair in pairs:
        of_pair = [predicted(run, visible) for run in pair]
        rows = {tuple(row_identities(one)) for side in of_pair for one in side}
        if not all(of_pair) or len(rows) > 1:
            return None
        of_set = sets.setdefault(rows.pop(), ([], []))
        for side, own in zip(of_set, of_pair, strict=True):
            side += own
    total, column = 0.0, str(pairs[0][0].settings["data"].get("group") or "")
    for of_set in sets.values():
        a, b = ([one.predictions for one in side] for side in of_set)
        test = paired_rows(metric, a, b, groups_of(a[0], column))
        if test is None or test.low is None or test.high is None:
            return None
        share = len(a) / sum(len(side) for side, _ in sets.values())
        total += (share * (test.high - test.low) / 2) ** 2
    return float(total**0.5)


def setting_differences(a: Sequence[RunRecord], b: Sequence[RunRecord]) -> dict[str, tuple[str, str]]:
    """Keys whose sets of values over a side's runs differ, with these values; "-" if a key does not exist."""
    sides = [[flat_keys(run.settings) for run in runs] for runs in (a, b)]
    found = {}
    for key in dict.fromkeys(key for side in sides for settings in side for key in settings):
        words = [sorted({str(settings.get(key, "-")) for settings in side}) for side in sides]
        if words[0] != words[1]:
            found[key] = (", ".join(words[0]), ", ".join(words[1]))
    return found


def _key(run: RunRecord, differing: dict[str, Any]) -> Key:
    return str(sorted((k, str(v)) for k, v in asked(run.settings).items() if k not in differing)), run.seed


def row_verdict(row: ComparedRow) -> str:
    """Statement about the difference."""
    if row.a is None or row.b is None:
        sides = [name for name, mean in (("A", row.a), ("B", row.b)) if mean is None]
        return "not defined on either side" if len(sides) == 2 else f"not defined for {sides[0]}"
    t = row.test
    if t is None:
        return "no seed has every pair of settings" if row.num_pairs else "no pairs"
    if t.p is None or row.p_holm is None:
        return "one seed: no test" if t.n < 2 else "no spread over seeds: no test"
    if row.p_holm >= LEVEL:
        return not_established(t, row.family)
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
    tests = Table(
        "metric", "visible", title="Tests", title_justify="left"
    )  # of its own, so that both fit into 80 columns
    has_rows = any(row.row_half is not None for row in c.rows)
    for column in ("A", "B", "A - B", "95 % interval", *(["± test rows"] if has_rows else [])):
        results.add_column(column, justify="right")
    for column in ("detectable", "p (Holm)"):
        tests.add_column(column, justify="right")
    tests.add_column("")
    for row in c.rows:
        t = row.test
        words = [DASH if mean is None else f"{mean:.3f}" for mean in (row.a, row.b)]
        words += [signed(t.difference, 3) if t else DASH]
        words += [
            f"{signed(t.low, 3)} to {signed(t.high, 3)}" if t and t.low is not None and t.high is not None else DASH
        ]
        words += [DASH if row.row_half is None else f"{row.row_half:.3f}"] if has_rows else []
        results.add_row(row.metric, row.visible, *words)
        detectable = DASH if t is None or t.detectable is None else f"{t.detectable:.3f}"
        tests.add_row(row.metric, row.visible, detectable, p_text(row.p_holm), row_verdict(row))
    console.print(results)
    console.print(tests)
    console.print(about_comparison(c))


def about_comparison(comparison: RunComparison) -> str:
    """The lines below the table: numbers of runs, and how the tests were made."""
    c = comparison
    seeds = max((row.test.n for row in c.rows if row.test), default=0)
    parts = [
        f"A: {counted(c.num_a, 'run')}, B: {counted(c.num_b, 'run')}, {counted(c.num_pairs, 'pair')} with equal rows and other "
        "settings."
    ]
    cells = max(row.num_cells for row in c.rows)
    if cells > 1 and seeds:
        parts.append(
            f"A seed counts once: the mean over its {counted(cells, 'pair')} of runs; seeds that lack one are left out."
        )
    if seeds > 1:
        family = max(row.family for row in c.rows)
        parts.append(
            f"Paired t-test over {counted(seeds, 'seed')}; the headline metric is tested alone, Holm over "
            f"{counted(family, 'other row')}. Detectable: smallest true "
            "difference that the test finds with 80 % power at the 5 % level, before the correction."
        )
    elif seeds:
        parts.append(
            "One seed: differences alone. The paired test needs at least two seeds on both sides: fedmllm run ... --seed N."
        )
    if any(row.row_half is not None for row in c.rows):
        parts.append(
            "± test rows: half of the 95 % interval of A - B from drawing the test rows alone, for these trained adapters."
        )
    return " ".join(parts)
