"""Each client's own share of the test rows, and its metrics."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.types import Example, Prediction, Shard
from fedmllm.scenarios.partitions import ClientSplit

OwnRows: TypeAlias = ClientSplit  # per client the places of its rows among the test rows

_PREFIX = "own/"  # of an entry "own/CLIENT/METRIC" in the scores of an adapter


def split_test_rows(
    experiment: Experiment, shards: Sequence[Shard], train: Sequence[Example], test: Sequence[Example]
) -> tuple[OwnRows, str]:
    """Split the test rows over the clients as the training rows are, if the experiment evaluates on them.

    Args:
        experiment: Its `evaluate.own_rows`, partition and seed.
        shards: The clients; those without training rows get no test rows.
        train: The training rows.
        test: The test rows.

    Returns:
        The rows of each client, or none; and why there are none although clients have models of their own, for the record.

    Raises:
        ConfigError: `evaluate.own_rows` is "on", and the rows cannot be split.
    """
    e, wanted = experiment, experiment.evaluate.own_rows
    if wanted == "off" or (wanted == "auto" and not e.has_personal_models) or not test:
        return [], ""
    try:
        rows = e.partition.split_test(train, test, e.seed)
    except (ConfigError, DataError) as error:
        if wanted == "on":
            raise ConfigError(f'evaluate.own_rows: got "on"; {error}') from None
        return [], f"no metrics on each client's own test rows: {error}"
    members = {shard.client for shard in shards if shard.rows}
    return [own if client in members else [] for client, own in enumerate(rows)], ""


def own_metrics(
    rows: OwnRows,
    predictions: Sequence[Prediction],
    metrics: Callable[[Sequence[Prediction]], Mapping[str, float | None]],
    client: int | None,
) -> list[dict[str, Any]]:
    """Evaluate predictions for all test rows on the clients' own ones.

    Args:
        rows: Of each client.
        predictions: One per test row.
        metrics: Metric -> value of some predictions.
        client: Whose adapter it is; None = the global one, which is evaluated on every client's rows.

    Returns:
        client, num_rows and metrics of each client that has rows.
    """
    return [
        {"client": k, "num_rows": len(own), "metrics": dict(metrics([predictions[i] for i in own]))}
        for k, own in enumerate(rows)
        if own and client in (None, k)
    ]


def as_scores(own: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return `own_metrics` as entries of an adapter's scores, which a checkpoint keeps."""
    return {f"{_PREFIX}{one['client']}/{name}": value for one in own for name, value in one["metrics"].items()}


def without_own(scores: Mapping[str, float | None]) -> list[str]:
    """Return the metrics on all test rows in an adapter's scores."""
    return [name for name in scores if not name.startswith(_PREFIX)]


def own_columns(results: Sequence[Mapping[str, float | None]], metric: str) -> dict[str, Any]:
    """Return the columns of a summary's row about the clients' own test rows.

    Args:
        results: Scores of each adapter with the same visible modalities.
        metric: The metric.

    Returns:
        own_value, own_std and own_n: mean, standard deviation and number of the clients whose rows define the metric. {} if
        there are none.
    """
    found = (
        value
        for scores in results
        for name, value in scores.items()
        if name.startswith(_PREFIX) and name.split("/", 2)[2] == metric
    )
    values = [value for value in found if value is not None]
    if not values:
        return {}
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"own_value": statistics.fmean(values), "own_std": std, "own_n": len(values)}
