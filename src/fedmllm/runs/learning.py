"""Comparison of a result with the frozen model and the majority."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedmllm.core.metrics import METRICS
from fedmllm.federation.baselines import majority_predictions
from fedmllm.federation.client import planned_steps
from fedmllm.runs.events import Learned
from fedmllm.runs.inputs import Inputs
from fedmllm.runs.predictions import final_evaluations, groups_of
from fedmllm.runs.row_statistics import paired_rows

if TYPE_CHECKING:
    from pathlib import Path

    from fedmllm.runs.evaluator import Evaluator

LOWER_IS_BETTER = ("unparsed", "ungraded")
FEW_STEPS = 100  # optimizer steps of all clients over all rounds


def learned(inputs: Inputs, evaluator: Evaluator, predictions: Path) -> Learned | None:
    """Compare a run's result with the frozen model and the most frequent training answer.

    Args:
        inputs: Of the run.
        evaluator: To evaluate the frozen model.
        predictions: The run's file of predictions, with the result's.

    Returns:
        The comparison in the run's first metric; None if the test rows do not define it, or if fewer is better.
    """
    e = inputs.experiment
    metric, visible = (e.metrics() or ("",))[0], e.evaluate.visible[0]
    result = [one.predictions for one in final_evaluations(predictions, visible)]
    if not result or not metric or metric in LOWER_IS_BETTER:
        return None
    train = [inputs.train[row] for shard in inputs.shards for row in shard.rows]
    frozen = evaluator.predict(inputs.start, inputs.test, visible)
    groups = groups_of(result[0], e.data.group_column())
    value, baselines = 0.0, []
    most_frequent = majority_predictions(train, inputs.test)
    for name, predicted in (("start", frozen), ("majority", most_frequent)):
        test, base = paired_rows(metric, result, [predicted], groups), METRICS[metric](predicted)
        if test is None or base is None:
            return None
        value = base + test.difference
        baselines.append(
            {"name": name, "value": base, "difference": test.difference, "low": test.low, "high": test.high}
        )
    found = Learned(metric, visible, len(inputs.test), value, baselines, [])
    if not found.nothing:
        return found
    ahead = paired_rows(metric, [frozen], [most_frequent], groups) if e.backbone.adapter else None
    return replace(found, advice=advice(inputs, found, bool(ahead and ahead.low is not None and ahead.low > 0)))


def advice(inputs: Inputs, result: Learned, trained: bool) -> list[str]:
    """Settings that are likely to be the reason that nothing was learned, the likeliest first.

    After a start from a trained adapter, what helps a new one to learn anything at all is not a reason (`backbone.adapter`).

    Args:
        inputs: Of the run.
        result: The comparison with the baselines, without advice.
        trained: Whether the start is an adapter that is better than the most frequent answer by more than its interval.
    """
    e, found = inputs.experiment, list[str]()
    usual = e.backbone.usual_lr
    scores = {baseline["name"]: float(baseline["value"]) for baseline in result.baselines}
    if e.backbone.adapter:
        below = "" if trained else f", not clearly above the most frequent answer ({scores['majority']:.3f})"
        already = "already " if trained else ""
        found.append(f"the start adapter ({e.backbone.adapter}) {already}scores {scores['start']:.3f} here{below}")
    if trained:
        if result.value < scores["start"]:
            found.append(f"training lost {scores['start'] - result.value:.3f}: try a train.lr below {e.train.lr:g}")
        found.append(
            "these rows may hold little that the start adapter has not learned: add rows of the kind it answers wrong"
        )
        return found
    if e.train.lr * 3 < usual:
        found.append(f'train.lr = {e.train.lr:g} is low for this model: try {usual:g}, which "usual" stands for')
    members = [shard for shard in inputs.shards if shard.rows]
    cohort = min(e.cohort_size or len(members), len(members))
    mean = sum(planned_steps(e.train, len(shard.rows)) for shard in members) / len(members)
    steps = round(mean * e.num_rounds * (cohort if e.federates else 1))
    if steps < FEW_STEPS:
        length = f"train.max_steps = {e.train.max_steps}" if e.train.max_steps else "train.epochs"
        found.append(f"about {steps} optimizer steps in all: raise num_rounds = {e.num_rounds} or {length}")
    if e.federates and cohort * 2 < len(members):
        found.append(f"cohort_size = {cohort} of {len(members)} sites a round: raise it, or num_rounds")
    server_lr = getattr(e.server(), "lr", None)
    if isinstance(server_lr, float) and e.aggregator.name in ("fedadam", "fedyogi", "fedadagrad") and server_lr < 1e-3:
        found.append(f"aggregator.lr = {server_lr:g} moves the adapter little: try 0.01")
    if not found:
        found.append("more rows, or a model that knows more about such rows; see the troubleshooting page")
    return found
