"""Rows of a run's summary."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from fedmllm.config.experiment import Experiment
from fedmllm.core.types import visible_of
from fedmllm.runs.costs import Totals, peaks
from fedmllm.runs.evaluator import Scores
from fedmllm.runs.own_rows import own_columns, without_own


def summary_rows(
    experiment: Experiment, results: Sequence[Scores], totals: Totals, wall_s: float
) -> list[dict[str, Any]]:
    """Return one row per metric and set of visible modalities, with the metric's ceiling if the data set knows it, and the
    mean and spread over each client's own test rows if these were evaluated.

    Args:
        experiment: What was run.
        results: One evaluation, or one per client; a row has their mean, and their spread if there are several.
        totals: Costs of all rounds; bytes count if there is a federation.
        wall_s: Seconds of the run.
    """
    e, t = experiment, totals
    federated = e.federates
    head = {"scenario": e.scenario.name, "setting": e.setting(), "method": e.method_name(), "prompt": e.prompt.name}
    cost = {
        "num_rounds": t.num_rounds if federated else 0,
        "up_bytes": t.up_bytes if federated else 0,
        "down_bytes": t.down_bytes if federated else 0,
        "up_lora_bytes": t.up_lora_bytes if federated else 0,
        "down_lora_bytes": t.down_lora_bytes if federated else 0,
        "client_s": t.client_s,
        "server_s": t.server_s,
        "num_tokens": t.num_tokens,
        "wall_s": wall_s,
        **peaks(),
    }
    rows = []
    for visible, metrics in results[0].items():
        ceilings = e.data.ceilings(visible_of(visible, e.data.modalities()))
        for name in without_own(metrics):
            values = [v for result in results if (v := result[visible][name]) is not None]
            spread = {"std": statistics.stdev(values) if len(values) > 1 else None, "n": len(values)}
            value = statistics.fmean(values) if values else None
            about: dict[str, Any] = {"metric": name, "value": value, **spread, "visible": visible}
            about |= own_columns([result[visible] for result in results], name)
            if name in ceilings:
                about["ceiling"] = ceilings[name]
            rows.append({**head, "seed": e.seed, **about, **cost, "run_id": e.run_id()})
    return rows
