"""What is trained where, and which adapter is judged: federated, and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedmllm.config.experiment import Experiment
from fedmllm.federation.evaluation import judge
from fedmllm.federation.baselines import majority_predictions
from fedmllm.runs.record import finite
from fedmllm.core.types import Shard

if TYPE_CHECKING:
    from fedmllm.runs.session import Run


def majority(run: Run) -> list[dict[str, Any]]:
    """No model: the most frequent training answer to each kind of question."""
    e = run.experiment
    predictions = majority_predictions([run.world.train[i] for s in run.world.shards for i in s.rows], run.world.test)
    metrics = {k: finite(v) for k, v in judge(predictions, e.data.metrics()).items()}
    run.emit("eval", visible="none", metrics=metrics, num_rows=len(predictions), wall_s=0.0)
    return run.rows([{"none": metrics}])


def zero_shot(run: Run) -> list[dict[str, Any]]:
    """The frozen model as it is."""
    return run.rows([run.judge(run.world.start)])


def federated(run: Run) -> list[dict[str, Any]]:
    """The global adapter after the last round, or the best on validation."""
    e = run.experiment
    members = [shard.client for shard in run.world.shards if shard.rows]
    params, round_ = run.federation(e.num_rounds, members)
    run.save(params, "adapter")
    return run.rows([run.judge(params, round=round_)])


def visits(experiment: Experiment, shards: Sequence[Shard]) -> int:
    """Rounds in which a client of the federation takes part, in expectation: the budget of what is not federated."""
    num_asked = 10 if experiment.cohort == "reference" else sum(1 for shard in shards if shard.rows)
    return max(1, round(experiment.num_rounds * experiment.cohort_size / num_asked))


def local(run: Run) -> list[dict[str, Any]]:
    """Every client alone, for as many rounds as it would have been asked in: mean and spread over the clients."""
    num_rounds = visits(run.experiment, run.world.shards)
    clients = [shard.client for shard in run.world.shards if shard.rows]
    for client in clients[len(run.results) :]:  # those before it were done when the run was stopped
        params, _ = run.federation(num_rounds, [client], client=client)
        run.save(params, f"adapters/client-{client}")
        run.results.append(run.judge(params, client=client))
    return run.rows(run.results)


def centralised(run: Run) -> list[dict[str, Any]]:
    """All rows in one place, hidden as they are on the clients, seen as often as the federation sees them."""
    shards = run.world.shards
    rows = tuple(row for shard in shards for row in shard.rows)
    visible = tuple(mask for shard in shards for mask in shard.visible)
    params, _ = run.federation(visits(run.experiment, shards), [0], [Shard(0, rows, visible)])
    run.save(params, "adapter")
    return run.rows([run.judge(params)])


METHODS = {
    "majority": majority,
    "zero-shot": zero_shot,
    "federated": federated,
    "local": local,
    "centralised": centralised,
}
