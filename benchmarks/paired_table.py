"""Every method of a suite against one of them, seed by seed, with 95 % intervals.

    python benchmarks/paired_table.py runs/lora --against FedAvg [--metric auc] [--visible all]

Reads finished cells; a mean over the settings takes the seeds that all of them have. p is of Student's paired t-test on those
means, by Holm's correction over the methods of the table. Bytes are in units of the reference's;
those in which a completion is learned before training are included.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmllm.reports.reading import DatasetResults, read_results
from fedmllm.reports.sent import DOWN, UP, sent_bytes
from fedmllm.reports.stats import Paired, holm, mean_of, paired

BySeed = Mapping[int, float]


def signed(value: float) -> str:
    """Return points with a sign, as in +1.2."""
    return f"{100 * value:+.1f}".replace("-", "−")


def interval(test: Paired | None) -> str:
    """Return a difference and half of its 95 % interval, in points."""
    if test is None:
        return "-"
    if test.low is None or test.high is None:
        return f"{signed(test.difference)} ({test.n})"
    return f"{signed(test.difference)} ± {50 * (test.high - test.low):.1f} ({test.n})"


def percent(column: BySeed) -> str:
    """Return the mean over the seeds in percent."""
    return f"{100 * statistics.fmean(column.values()):.1f}" if column else "-"


def table(header: list[str], lines: list[list[str]]) -> None:
    """Print a Markdown table whose first column is text."""
    print(f"| {' | '.join(header)} |\n|---|{'---:|' * (len(header) - 1)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")
    print()


def times(dataset: DatasetResults, method: str, against: str, keys: Sequence[str]) -> str:
    """Return bytes sent in a run, before training as well, in units of those of the reference."""
    means = [
        statistics.fmean(sent_bytes(run.rows[0], keys) for run in dataset.pick(method=name))
        for name in (method, against)
    ]
    return f"{means[0] / means[1]:.2f}" if means[1] else "-"


def compare(dataset: DatasetResults, against: str, metric: str, visible: str) -> None:
    """Print the values, and the paired differences to the reference."""
    # By seed alone: in older records public rows as one more client change the digest of the training rows, and no test row.
    values = {
        cell: {draw.seed: v for draw, v in found.items()} for cell, found in dataset.values(metric, visible).items()
    }
    settings = dataset.settings
    columns = {method: [values.get((setting, method), {}) for setting in settings] for method in dataset.methods}
    print(f"Test rows that show {visible or 'what the run says'}; {metric}, %, mean over the seeds.\n")
    lines = []
    for method, found in columns.items():
        sent = [times(dataset, method, against, keys) for keys in (DOWN, UP)]
        lines.append([method, *map(percent, found), *sent])
    table(["method", *settings, "bytes down", "bytes up"], lines)

    tests: dict[str, Paired | None] = {}
    for method, found in columns.items():
        shared = [(own, other) for own, other in zip(found, columns[against], strict=True) if own]
        means = [mean_of([pair[side] for pair in shared]) for side in (0, 1)]
        tests[method] = paired(*means) if means[0] and means[1] else None
    corrected = holm({name: t.p for name, t in tests.items() if t is not None and t.p is not None})
    print(
        f"Difference to {against} in points, ± half of the 95 % interval (seeds); mean over the settings that the method has.\n"
    )
    lines = []
    for method, found in columns.items():
        if method != against:
            each = [interval(paired(own, other)) for own, other in zip(found, columns[against], strict=True)]
            p = corrected.get(method)
            lines.append([method, *each, interval(tests[method]), "-" if p is None else f"{p:.3f}"])
    table(["method", *settings, "mean", "p (Holm)"], lines)


def main() -> None:
    """Print the tables of each data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", default="FedAvg", help="the reference method, by its label")
    parser.add_argument("--metric", default="", help="default: the main one")
    parser.add_argument("--visible", default="", help="default: as each run says")
    arguments = parser.parse_args()
    for dataset in read_results([arguments.folder]).datasets:
        if arguments.against not in dataset.methods:
            raise SystemExit(f"--against: got {arguments.against!r}; methods here: {', '.join(dataset.methods)}")
        compare(dataset, arguments.against, arguments.metric or dataset.metric, arguments.visible)


if __name__ == "__main__":
    main()
