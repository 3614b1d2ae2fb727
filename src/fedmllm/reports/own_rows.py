"""Results on each client's own test rows.

Of personal models, of those trained alone, and of the global one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmllm.reports.names import metric_label
from fedmllm.reports.numerals import DASH, Scale
from fedmllm.reports.reading import DatasetResults, RunRecord
from fedmllm.reports.stats import Spread

OWN_TEXT = (
    "Own rows: each client's share of the test rows, split by the law of the training rows and the same seed. Mean over "
    "clients; spread is the standard deviation over the clients of a run, lowest the value of the client with the least; all "
    "are means over the seeds."
)


@dataclass(frozen=True)
class OwnRow:
    """One method's models in one setting.

    Attributes:
        setting: As in the other tables.
        method: As in the other tables; with ", global adapter" for the one that personal models start from.
        whole: On all test rows, over the seeds.
        own: On the clients' own test rows: mean over clients, over the seeds.
        spread: Mean over the seeds of the standard deviation over clients; None for a single client.
        lowest: Mean over the seeds of the least value of a client.
        num_clients: Whose rows define the metric, in the first run.
    """

    setting: str
    method: str
    whole: Spread
    own: Spread
    spread: float | None
    lowest: float
    num_clients: int


def own_table(dataset: DatasetResults, metric: str = "") -> list[OwnRow]:
    """Results on the clients' own test rows.

    Args:
        dataset: Runs on one data set.
        metric: Default: the main one.

    Returns:
        One row for each setting and kind of model that was evaluated so; [] if none was.
    """
    metric, found = metric or dataset.metric, []
    for setting in dataset.settings:
        for method in dataset.methods:
            runs = dataset.pick(setting, method)
            for is_personal in (True, False):
                if seeds := [one for run in runs if (one := _of_run(run, metric, is_personal))]:
                    others = any(_of_run(run, metric, True) for run in runs) and not is_personal
                    found.append(_row(setting, f"{method}, global adapter" if others else method, seeds))
    return found


def _of_run(run: RunRecord, metric: str, is_personal: bool) -> tuple[list[float], list[float]] | None:
    """(values on all test rows, of each client on its own ones) of the clients' last models, or of the last global one."""
    last: dict[int | None, Mapping[str, Any]] = {}
    for event in run.evals:
        if event["visible"] == run.headline[1] and (event.get("client") is not None) == is_personal:
            last[event.get("client")] = event
    whole = [event["metrics"].get(metric) for event in last.values()]
    own = [one["metrics"].get(metric) for event in last.values() for one in event.get("own") or ()]
    known = [value for value in whole if value is not None], [value for value in own if value is not None]
    return known if all(known) else None


def _row(setting: str, method: str, seeds: Sequence[tuple[list[float], list[float]]]) -> OwnRow:
    whole, own = (Spread.of(Spread.of(values[i]).mean for values in seeds) for i in (0, 1))
    stds = [std for _, values in seeds if (std := Spread.of(values).std) is not None]
    lowest = Spread.of(min(values) for _, values in seeds).mean
    return OwnRow(setting, method, whole, own, Spread.of(stds).mean if stds else None, lowest, len(seeds[0][1]))


def own_markdown(rows: Sequence[OwnRow], metric: str, scale: Scale) -> str:
    """The table as Markdown.

    Args:
        rows: Of one data set.
        metric: Of the values.
        scale: How they are printed.

    Returns:
        Text that ends with a line feed.
    """
    lines = [f"{metric_label(metric)}. {OWN_TEXT}\n"]
    lines += [
        "| setting | method | all test rows | own rows | spread | lowest | clients | seeds |",
        "|---|---|" + "---:|" * 6,
    ]
    for row in rows:
        numbers = [row.whole.mean, row.own.mean, row.spread, row.lowest]
        words = [DASH if value is None else scale.number(value) for value in numbers]
        words += [str(row.num_clients), str(row.own.n)]
        lines.append(f"| {row.setting} | {row.method} | {' | '.join(words)} |")
    return "\n".join(lines) + "\n"
