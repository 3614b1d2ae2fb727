"""What is trained where, and which adapter is judged: federated, and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedmllm.config.experiment import Experiment
from fedmllm.core.types import Shard
from fedmllm.federation.baselines import majority_predictions

if TYPE_CHECKING:
    from fedmllm.runs.session import Session


def majority(session: Session) -> list[dict[str, Any]]:
    """No model: the most frequent training answer to each kind of question."""
    inputs = session.inputs
    train = [inputs.train[row] for shard in inputs.shards for row in shard.rows]
    return session.rows([session.evaluator.baseline(majority_predictions(train, inputs.test))])


def zero_shot(session: Session) -> list[dict[str, Any]]:
    """The frozen model as it is."""
    return session.rows([session.evaluator.test(session.inputs.start)])


def federated(session: Session) -> list[dict[str, Any]]:
    """The global adapter after the last round, or the best on validation."""
    e = session.experiment
    members = [shard.client for shard in session.inputs.shards if shard.rows]
    params, round_ = session.federation(e.num_rounds, members)
    session.save(params)
    return session.rows([session.evaluator.test(params, round_)])


def equivalent_rounds(experiment: Experiment, shards: Sequence[Shard]) -> int:
    """Rounds in which a client of the federation takes part, in expectation: the budget of what is not federated."""
    num_asked = 10 if experiment.cohort == "reference" else sum(1 for shard in shards if shard.rows)
    return max(1, round(experiment.num_rounds * experiment.cohort_size / num_asked))


def local(session: Session) -> list[dict[str, Any]]:
    """Every client alone, for as many rounds as it would have been asked in: mean and spread over the clients."""
    num_rounds = equivalent_rounds(session.experiment, session.inputs.shards)
    clients = [shard.client for shard in session.inputs.shards if shard.rows]
    for client in clients[len(session.results) :]:  # those before it were done when the run was stopped
        params, _ = session.federation(num_rounds, [client], client=client)
        session.save(params, client)
        session.results.append(session.evaluator.test(params, client=client))
    return session.rows(session.results)


def centralised(session: Session) -> list[dict[str, Any]]:
    """All rows in one place, hidden as they are on the clients, seen as often as the federation sees them."""
    shards = session.inputs.shards
    rows = tuple(row for shard in shards for row in shard.rows)
    visible = tuple(mask for shard in shards for mask in shard.visible)
    params, _ = session.federation(equivalent_rounds(session.experiment, shards), [0], [Shard(0, rows, visible)])
    session.save(params)
    return session.rows([session.evaluator.test(params)])


METHODS = {
    "majority": majority,
    "zero-shot": zero_shot,
    "federated": federated,
    "local": local,
    "centralised": centralised,
}
