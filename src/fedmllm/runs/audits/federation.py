"""A federation for an audit: without folder, record or evaluation."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

from fedmllm.algorithms.privacy.client_dp import ClientDp, NoisyMean
from fedmllm.algorithms.privacy.guarantee import Guarantee
from fedmllm.algorithms.privacy.noise import NOISE_KEY_BYTES, simulation_key
from fedmllm.algorithms.privacy.row_dp import RowDp, RowNoise
from fedmllm.config.engine import InProcess, Stacked
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError
from fedmllm.core.types import Example, Params
from fedmllm.federation.client import Clients
from fedmllm.federation.rounds import Progress, cohorts, federate
from fedmllm.runs.inputs import Inputs, start_engine
from fedmllm.runs.privacy import holders, most_rounds


def check_auditable(experiment: Experiment) -> None:
    """Check that an audit can run the experiment.

    Raises:
        ConfigError: Its method is not a federation, or its engine or aggregator needs more than one process's memory.
    """
    e = experiment
    if e.method != "federated":
        raise ConfigError(f'method: got "{e.method}"; an audit attacks a federation; allowed: federated')
    if not isinstance(e.engine, InProcess | Stacked):
        raise ConfigError(
            f"engine.name: got {e.engine.name!r}; an audit runs in one process: allowed: in-process, stacked"
        )
    if e.relation.name != "one":
        raise ConfigError(f"relation: got {e.relation.name!r}; an audit attacks one global model; allowed: one")
    if "client-state" in e.aggregator.needs or not e.aggregator.global_model:
        raise ConfigError(
            f"aggregator.name: got {e.aggregator.name!r}, whose clients keep state; an audit has no folder for it"
        )


def noise_key(experiment: Experiment) -> bytes:
    """A new secret key; the public one if the experiment simulates its noise."""
    simulated = isinstance(experiment.privacy, ClientDp | RowDp) and experiment.privacy.simulate_noise
    return simulation_key(experiment.seed) if simulated else secrets.token_bytes(NOISE_KEY_BYTES)


def cohort_of(experiment: Experiment, clients: Clients, key: bytes = b"") -> tuple[list[int], list[list[int]]]:
    """Clients with rows, and the cohorts of all rounds."""
    e, members = experiment, [shard.client for shard in clients.shards if shard.rows]
    draw = cohorts(e.cohort, members, e.cohort_size, e.seed, key or noise_key(e))
    return members, [draw(round_) for round_ in range(1, e.num_rounds + 1)]


def claimed(experiment: Experiment, clients: Clients, examples: Sequence[Example]) -> Guarantee | None:
    """Return the experiment's guarantee after its last round; None without privacy."""
    e = experiment
    members, asked = cohort_of(e, clients)
    most = max(sum(client in cohort for cohort in asked) for client in members)
    if isinstance(e.privacy, ClientDp):
        poisson = e.cohort == "poisson"
        return e.privacy.guarantee(e.cohort_size, len(members), [1] * (e.num_rounds if poisson else most), poisson)
    if not isinstance(e.privacy, RowDp):
        return None
    column = e.data.group_column()
    rounds = most_rounds(asked, holders(e.privacy, clients.shards, examples, column))
    return e.privacy.guarantee(rounds * e.train.epochs, column=column)


def trained_adapter(
    inputs: Inputs, clients: Clients, mean: NoisyMean | None = None, noise: RowNoise | None = None
) -> Params:
    """Federate once, with the experiment's privacy.

    Args:
        inputs: Of the experiment.
        clients: Its clients, or changed ones.
        mean: In place of the experiment's own, for client-dp.
        noise: In place of the experiment's own, for row-dp.

    Returns:
        The resulting adapter.
    """
    e = inputs.experiment
    key = noise_key(e)
    if isinstance(e.privacy, ClientDp):
        mean = mean or NoisyMean(e.privacy, e.cohort_size, key)
    if isinstance(e.privacy, RowDp):
        clients = replace(clients, row_noise=noise or RowNoise(e.privacy, key, e.run_id(), e.data.group_column()))
    members, asked = cohort_of(e, clients, key)
    aggregator = inputs.aggregator()
    progress = Progress(0, inputs.start, inputs.initial_state())
    rounds = federate(
        progress,
        start_engine(e.engine, clients),
        aggregator,
        lambda round_: asked[round_ - 1],
        e.num_rounds,
        e.update_filter,
        None,
        e.seed,
        len(members),
        inputs.ranks,
        mean,
        e.cohort == "poisson",
    )
    last = list(rounds)[-1]
    return aggregator.result(last.params, last.state)
