"""The federated method and its baselines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedmllm.algorithms.relations import One
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError
from fedmllm.core.tensors import padded
from fedmllm.core.types import Example, Params, Shard
from fedmllm.federation.baselines import majority_predictions, question_prior_predictions
from fedmllm.runs.checkpoint import any_rank, read_adapter

if TYPE_CHECKING:
    from fedmllm.runs.session import Session

MAX_DRAWS = 10_000  # of availability, for its mean


def majority(session: Session) -> list[dict[str, Any]]:
    """No model: the most frequent training answer to each kind of question."""
    predictions = majority_predictions(training_rows(session), session.inputs.test)
    return session.rows([session.evaluator.baseline(predictions, one_hot=True)])


def question_prior(session: Session) -> list[dict[str, Any]]:
    """No model: the most frequent training answer to each question text."""
    predictions = question_prior_predictions(training_rows(session), session.inputs.test)
    return session.rows([session.evaluator.baseline(predictions)])


def training_rows(session: Session) -> list[Example]:
    """Return the rows of all clients, one client after the other."""
    inputs = session.inputs
    return [inputs.train[row] for shard in inputs.shards for row in shard.rows]


def zero_shot(session: Session) -> list[dict[str, Any]]:
    """The frozen model as it is."""
    return session.rows([session.evaluator.test(session.inputs.start)])


def federated(session: Session) -> list[dict[str, Any]]:
    """The global adapter after the last round, or the best on validation.

    An aggregator without a global model: the client's own adapters, mean and spread over the clients.
    """
    e = session.experiment
    members = [shard.client for shard in session.inputs.shards if shard.rows]
    params, round_ = session.federation(e.num_rounds, members)
    if e.relation != One():
        return over_a_graph(session, members, params, round_)
    if not e.server().global_model:
        results = []
        for client in members:
            own = session.personal(client)
            session.save(own, client)
            results.append(session.evaluator.test(own, round_, client))
        return session.rows(results)
    session.save(params)
    return session.rows([session.evaluator.test(params, round_)])


def over_a_graph(session: Session, members: Sequence[int], mean: Params, round_: int) -> list[dict[str, Any]]:
    """Evaluate the adapters of a graph; the record has the metrics of their mean as well.

    Every client's own adapter is saved. The result is that of the clients' own adapters, mean and spread, if the relation is
    personal; otherwise a test row is answered by the node whose clients see what it shows, or by the mean.
    """
    session.save(mean)
    session.evaluator.test(mean, round_, node="mean")
    results = []
    for client in members:
        own = session.personal(client)
        session.save(own, client)
        if session.experiment.relation.personal:
            results.append(session.evaluator.test(own, round_, client))
    return session.rows(results or [session.evaluator.test(session.for_visible, round_)])


def equivalent_rounds(experiment: Experiment, shards: Sequence[Shard]) -> float:
    """Training budget of a baseline: the rounds' worth of steps that a client of the federation trains, in expectation.

    The expectation is over cohorts; who drops out or straggles when asked is drawn as in the federation.

    Args:
        experiment: Its rounds, cohort size, availability and seed.
        shards: All clients; those without rows are never asked.

    Returns:
        Rounds, not rounded: 25 rounds of two of nine clients are 5.56.

    Raises:
        ConfigError: No asked client ever trains.
    """
    num_asked = 10 if experiment.cohort == "reference" else sum(1 for shard in shards if shard.rows)
    asked = [(round_, s.client) for round_ in range(1, experiment.num_rounds + 1) for s in shards if s.rows]
    asked = asked[:: max(1, len(asked) // MAX_DRAWS)]
    share = statistics.fmean(experiment.availability.share(experiment.seed, *place) for place in asked)
    if not share:
        raise ConfigError(
            f"availability: no client trains in any of the {experiment.num_rounds} rounds; lower its rates"
        )
    return share * (experiment.num_rounds * (experiment.cohort_size or num_asked) / num_asked)


def baseline_rounds(experiment: Experiment, shards: Sequence[Shard]) -> float:
    """Rounds of a baseline that trains: those of the federation's budget, or all of them if it trains until converged."""
    if experiment.budget == "converged":
        return float(experiment.num_rounds)
    return equivalent_rounds(experiment, shards)


def local(session: Session) -> list[dict[str, Any]]:
    """Every client alone, with the experiment's budget: mean and spread over the clients."""
    budget = baseline_rounds(session.experiment, session.inputs.shards)
    clients = [shard.client for shard in session.inputs.shards if shard.rows]
    for client in clients[len(session.results) :]:  # those before it were done when the run was stopped
        params, _ = session.federation(budget, [client], client=client)
        session.save(params, client)
        session.results.append(session.evaluator.test(params, client=client))
    return session.rows(session.results)


def centralised(session: Session) -> list[dict[str, Any]]:
    """All rows in one place, hidden as they are on the clients, with the experiment's budget."""
    params, _ = session.federation(baseline_rounds(session.experiment, session.inputs.shards), [0])
    session.save(params)
    return session.rows([session.evaluator.test(params)])


def personal(session: Session) -> list[dict[str, Any]]:
    """The federation; then each client alone from the global adapter: mean and spread over the clients.

    The record has the metrics of the global adapter, too. A resume within the second phase reads it from the folder.
    """
    e, folder = session.experiment, session.folder
    members = [shard.client for shard in session.inputs.shards if shard.rows]
    if session.in_second_phase:
        params = read_adapter(folder.adapter(), any_rank(session.inputs.start))
    else:
        params, round_ = session.federation(e.num_rounds, members)
        session.save(params)
        session.evaluator.test(params, round_)
    start = padded(params, session.inputs.start)
    for client in members[len(session.results) :]:
        own, _ = session.federation(e.personal.rounds, [client], client=client, start=start)
        session.save(own, client)
        session.results.append(session.evaluator.test(own, client=client))
    return session.rows(session.results)


METHODS = {
    "majority": majority,
    "question-prior": question_prior,
    "zero-shot": zero_shot,
    "federated": federated,
    "local": local,
    "centralised": centralised,
    "personal": personal,
}
