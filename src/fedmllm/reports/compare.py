"""`fedmllm compare`: differences of two groups of runs, with paired tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedmllm.core.errors import FedmllmError
from fedmllm.core.text import flat
from fedmllm.reports.findings import p_text
from fedmllm.reports.reading import EXECUTION_ONLY, RunRecord, asked, read_results
from fedmllm.reports.stats import Paired, paired


@dataclass(frozen=True)
class Row:
    """One metric and kind of test row of both sides."""

    metric: str
    visible: str
    a: float
    b: float
    test: Paired | None  # a - b over pairs; None where no run of one side has a partner on the other


@dataclass(frozen=True)
class Comparison:
    """What `fedmllm compare` prints."""

    settings: dict[str, tuple[str, str]]  # key -> values on either side
    execution_only: dict[str, tuple[str, str]]  # the same for what may not change results
    rows: tuple[Row, ...]
    num_a: int
    num_b: int
    num_pairs: int


def compare(a: Sequence[Path], b: Sequence[Path]) -> Comparison:
    """Runs are paired where all settings but those that differ between the sides agree: seed with seed, and so on.

    Raises FedmllmError for a folder without a finished run, and if the two sides share no metric.
    """
    runs_a, runs_b = read_results(a).runs, read_results(b).runs
    differing = {key: words for key, words in differences(runs_a, runs_b).items() if key != "seed"}
    keys = [_key(run, differing) for run in runs_a], [_key(run, differing) for run in runs_b]
    for runs, of_side, place in ((runs_a, keys[0], a), (runs_b, keys[1], b)):
        if len(set(of_side)) < len(of_side):
            twice = next(run.run_id for run, key in zip(runs, of_side, strict=True) if of_side.count(key) > 1)
            raise FedmllmError(
                f"{', '.join(map(str, place))}: several runs (one is {twice}) would be paired with the same run of the other "
                "side; give folders whose runs differ from the other side's in one way"
            )
    left, right = dict(zip(keys[0], runs_a, strict=True)), dict(zip(keys[1], runs_b, strict=True))
    shared = [key for key in left if key in right]
    rows = []
    for metric, visible in dict.fromkeys((r["metric"], r["visible"]) for run in runs_a for r in run.rows):
        values = {key: (left[key].value(metric, visible), right[key].value(metric, visible)) for key in shared}
        pairs = {i: (x, y) for i, (x, y) in enumerate(values.values()) if x is not None and y is not None}
        ours = [v for run in runs_a if (v := run.value(metric, visible)) is not None]
        theirs = [v for run in runs_b if (v := run.value(metric, visible)) is not None]
        if ours and theirs and (metric != "unparsed" or any(ours) or any(theirs)):
            test = paired({i: x for i, (x, _) in pairs.items()}, {i: y for i, (_, y) in pairs.items()})
            rows.append(Row(metric, visible, sum(ours) / len(ours), sum(theirs) / len(theirs), test))
    if not rows:
        raise FedmllmError("the two sides share no metric")
    execution = {key: words for key, words in differing.items() if f"{key}.".startswith(EXECUTION_ONLY)}
    what = {key: words for key, words in differing.items() if key not in execution}
    return Comparison(what, execution, tuple(rows), len(runs_a), len(runs_b), len(shared))


def differences(a: Sequence[RunRecord], b: Sequence[RunRecord]) -> dict[str, tuple[str, str]]:
    """Keys whose sets of values over a side's runs differ, with these values; "-" where a key does not exist."""
    sides = [[flat(run.settings) for run in runs] for runs in (a, b)]
    found = {}
    for key in dict.fromkeys(key for side in sides for settings in side for key in settings):
        words = [sorted({str(settings.get(key, "-")) for settings in side}) for side in sides]
        if words[0] != words[1]:
            found[key] = (", ".join(words[0]), ", ".join(words[1]))
    return found


def _key(run: RunRecord, differing: dict[str, Any]) -> str:
    return str(sorted((k, str(v)) for k, v in {**asked(run.settings), "seed": run.seed}.items() if k not in differing))


def verdict(row: Row) -> str:
    """What may be said about the difference."""
    if row.test is None:
        return "no pairs"
    if row.test.p is None:
        return "one pair: no claim"
    if row.test.p >= 0.05:
        return "within noise"
    return "A is higher" if row.test.difference > 0 else "A is lower"


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print the settings that differ and the results with their tests."""
    console = console or Console()
    c = comparison
    settings = Table("setting", "A", "B", title="What differs", title_justify="left")
    for key, (left, right) in {**c.settings, **c.execution_only}.items():
        settings.add_row(key, left, right, style="dim" if key in c.execution_only else "")
    if c.settings or c.execution_only:
        console.print(settings)
    else:
        console.print("No setting differs.")
    results = Table("metric", "test shows", title="Results", title_justify="left")
    for column in ("A", "B", "A - B", "95 % interval", "p"):
        results.add_column(column, justify="right")
    results.add_column("")
    for row in c.rows:
        t = row.test
        interval = f"{t.low:+.3f} .. {t.high:+.3f}" if t and t.low is not None and t.high is not None else "-"
        difference = f"{t.difference:+.3f}" if t else "-"
        words = [
            row.metric,
            row.visible,
            f"{row.a:.3f}",
            f"{row.b:.3f}",
            difference,
            interval,
            p_text(t.p if t else None),
        ]
        results.add_row(*words, verdict(row))
    console.print(results)
    console.print(
        f"A: {c.num_a} runs, B: {c.num_b} runs, {c.num_pairs} pairs with all other settings alike; paired t-test over pairs."
        + ("" if c.num_pairs > 2 else " Run more seeds to tell a difference from noise: fedmllm run ... --seed N.")
    )
