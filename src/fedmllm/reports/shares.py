"""Results as shares of the ceiling.

For data sets whose law of the labels is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedmllm.reports.comparisons import mean_over_settings
from fedmllm.reports.names import metric_label, visible_label
from fedmllm.reports.numerals import DASH, counted
from fedmllm.reports.reading import DatasetResults
from fedmllm.reports.stats import Spread

CHANCE = {"auc": 0.5, "auc_hard": 0.5}  # of a model that ranks at random; other metrics begin at 0


@dataclass(frozen=True)
class ShareTable:
    """Share of the reachable result by method and by what the test rows show, mean over settings, spread over seeds."""

    metric: str
    ceilings: Mapping[str, float]  # visible modalities of the test rows -> the metric's ceiling
    rows: Mapping[str, Mapping[str, Spread]]  # method -> visible modalities -> (result - chance) / (ceiling - chance)
    settings: Mapping[str, int]  # method -> settings in its mean


def share_table(dataset: DatasetResults, metric: str = "") -> ShareTable | None:
    """Each method's share of what is reachable, over all settings in which it was run.

    Args:
        dataset: Runs on one data set.
        metric: Default: the main one.

    Returns:
        The table; None if no run states a ceiling, or if runs state different ceilings, as runs on different laws do.
    """
    metric = metric or dataset.metric
    stated: dict[str, set[float | None]] = {}
    for run in dataset.runs:
        for row in run.rows:
            if row["metric"] == metric:
                stated.setdefault(row["visible"], set()).add(row.get("ceiling"))
    ceilings: dict[str, float] = {}
    chance = CHANCE.get(metric, 0.0)
    for visible, found in stated.items():
        ceiling = found.pop() if len(found) == 1 else None
        if ceiling is not None and ceiling > chance:
            ceilings[visible] = ceiling
    rows: dict[str, dict[str, Spread]] = {}
    settings: dict[str, int] = {}
    for visible, ceiling in ceilings.items():
        values = dataset.values(metric, visible)
        for method in dataset.methods:
            own = [setting for setting in dataset.settings if values.get((setting, method))]
            if own and (seeds := mean_over_settings(values, method, own)):
                share = [(value - chance) / (ceiling - chance) for value in seeds.values()]
                rows.setdefault(method, {})[visible] = Spread.of(share)
                settings[method] = len(own)
    return ShareTable(metric, ceilings, rows, settings) if rows else None


def share_text(spread: Spread | None) -> str:
    """ "0.94 ± 0.02"; a dash for None."""
    if spread is None:
        return DASH
    text = f"{spread.mean:.2f}".replace("-", "\N{MINUS SIGN}")
    return text if spread.std is None else f"{text} ± {spread.std:.2f}"


def about_shares(table: ShareTable, num_settings: int) -> str:
    """The caption: the definition, the ceilings, and methods that were not run in all settings."""
    chance = CHANCE.get(table.metric, 0.0)
    label = metric_label(table.metric)
    above = f"({label} - {chance:g}) / (ceiling - {chance:g})" if chance else f"{label} / ceiling"
    ceilings = ", ".join(f"{visible_label(v)} {c:.3f}" for v, c in table.ceilings.items())
    text = f"{above}, mean over settings ± standard deviation over seeds. Ceilings: {ceilings}."
    if few := [f"{m} in {counted(n, 'setting')}" for m, n in table.settings.items() if n < num_settings]:
        text += f" Not in all {num_settings} settings: {', '.join(few)}."
    return text
