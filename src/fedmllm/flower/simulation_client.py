"""The ClientApp of the simulation: trains one client in a Ray actor.

An actor keeps the frozen base and the encoded rows between messages. A real site runs no ClientApp that came over the
network: its own process serves the messages (`flower.site.process`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import safetensors.torch
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from ray import cloudpickle

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.objectives import Objective
from fedmllm.algorithms.privacy.row_dp import RowNoise
from fedmllm.config.experiment import Experiment
from fedmllm.core.plugins import load_plugins
from fedmllm.core.types import Params, Round, Shard
from fedmllm.federation.client import Clients
from fedmllm.federation.exchange import Header
from fedmllm.flower.messages import unpack, update_content
from fedmllm.flower.request import KEPT
from fedmllm.flower.wire import ABOUT
from fedmllm.runs.inputs import Inputs
from fedmllm.scenarios.availability import Availability


@dataclass(frozen=True)
class Algorithm:
    """Client half of a phase: of the federation, or of a client's own training after it."""

    objective: Objective
    aggregator: Aggregator
    availability: Availability
    row_noise: RowNoise | None = None


@dataclass(frozen=True)
class SimulationJob:
    """One client's part of a round. It stays between processes of one user, so it may be pickled."""

    experiment: Experiment
    budget: float  # `Clients.budget`
    at: Round
    header: Header
    shard: Shard
    threads: int
    kept: bytes  # the client's state as safetensors; b"" = none
    algorithm: Algorithm


_inputs: dict[str, Inputs] = {}  # of this actor: only of the last experiment
_clients: dict[tuple[str, float], Clients] = {}
_loads = 0  # base models that this actor has loaded

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one client for one round. An exception becomes Flower's error reply; other clients are not affected."""
    imports, pickled = cloudpickle.loads(message.content[ABOUT]["job"])
    load_plugins(imports, "imports")  # before their classes are unpickled
    job = cast("SimulationJob", cloudpickle.loads(pickled))
    torch.set_num_threads(job.threads)
    clients, initial = of_actor(job)
    clients.store.warm([job.shard])
    sent = job.header.sent(unpack(message.content, job.header.like()), initial)
    kept = safetensors.torch.load(job.kept) if job.kept else {}
    update, state = clients.train_one(job.shard.client, job.at, sent, kept)
    content = update_content(replace(update, metrics={**update.metrics, "base_loads": _loads}))
    if state:
        content[ABOUT][KEPT] = safetensors.torch.save(state)
    return Message(content, reply_to=message)


def of_actor(job: SimulationJob) -> tuple[Clients, Params]:
    """The clients of the job's experiment, of which only the job's own has rows; and the adapter before any training."""
    inputs, key = inputs_of(job.experiment), (job.experiment.run_id(), job.budget)
    if key not in _clients:
        _clients.clear()
        _clients[key] = inputs.clients(job.budget)
    shards = [Shard(client, (), ()) for client in range(job.shard.client)] + [job.shard]
    a = job.algorithm
    clients = replace(_clients[key], objective=a.objective, aggregator=a.aggregator, availability=a.availability)
    return replace(clients, shards=shards, row_noise=a.row_noise), inputs.start


def inputs_of(experiment: Experiment) -> Inputs:
    """The inputs of an experiment, loaded once in this actor."""
    global _loads
    key = experiment.run_id()
    if key not in _inputs:
        _inputs.clear()
        _clients.clear()
        _inputs[key] = Inputs.load(experiment)
        _loads += 1
    return _inputs[key]
