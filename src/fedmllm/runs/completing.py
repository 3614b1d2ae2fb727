"""Federated learning of a completion, before training."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping

from safetensors import safe_open

from fedmllm.algorithms.server_optimizers import FedAvg
from fedmllm.core.storage import read_tensors, write_tensors
from fedmllm.core.types import ClientUpdate, Params, Round, Sent
from fedmllm.federation.rounds import Progress, federate
from fedmllm.runs.events import CompletionRound, Sink
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.inputs import Inputs
from fedmllm.scenarios.modalities.completion import rows_to_learn_from

COSTS = ("completion_up_bytes", "completion_down_bytes", "completion_s")


def learn_completion(inputs: Inputs, folder: RunFolder, resumed: bool, emit: Sink) -> dict[str, float]:
    """Learn the completion of a run, or read it if the run continues from a checkpoint, and use it for its rows.

    Every client with enough complete rows takes part in every round. Updates are checked as those of the federation.

    Args:
        inputs: The run's inputs, whose completer fills rows with the result.
        folder: Of the run, which keeps the result.
        resumed: True if the run continues from a checkpoint.
        emit: Receives an event per round.

    Returns:
        What it cost, by the names in `COSTS`; {} if the completion does not learn.
    """
    e, completer = inputs.experiment, inputs.completer
    if completer is None or not e.completion.learns:
        return {}
    start = e.completion.start(completer.site)
    if resumed and folder.completion.is_file():
        learned = read_tensors(folder.completion, start)
        with safe_open(folder.completion, framework="pt") as file:
            costs: dict[str, float] = json.loads(file.metadata()["costs"])
        completer.with_learned(learned)
        return costs
    complete = rows_to_learn_from(e.completion, inputs.train, inputs.shards, e.data.modalities())
    members = [client for client, rows in complete.items() if len(rows) >= e.completion.min_rows()]

    def engine(at: Round, sents: Mapping[int, Sent]) -> Iterator[ClientUpdate]:
        for client in sorted(sents):
            began = time.perf_counter()
            delta, count, loss = e.completion.learn(completer.site, complete[client], sents[client].start, at, client)
            metrics = {"loss": loss, "num_steps": 0, "num_tokens": 0, "time_s": time.perf_counter() - began}
            yield ClientUpdate(client, delta, count, metrics)

    costs, learned = dict.fromkeys(COSTS, 0.0), start
    rounds = e.completion.num_rounds()
    for progress in federate(
        Progress(0, start, {}), engine, FedAvg(), lambda _: members, rounds, e.update_filter, seed=e.seed
    ):
        log, learned = progress.log, progress.params
        emit(CompletionRound(progress.round, rounds, log["clients"], log["up_bytes"], log["down_bytes"], log["wall_s"]))
        for key, name in zip(COSTS, ("up_bytes", "down_bytes", "wall_s"), strict=True):
            costs[key] += log[name]
    costs = {key: value if key.endswith("_s") else int(value) for key, value in costs.items()}
    write_tensors(folder.completion, _separate(learned), {"format": "pt", "costs": json.dumps(costs)})
    completer.with_learned(learned)
    return costs


def _separate(params: Params) -> Params:
    return {name: t.contiguous() for name, t in params.items()}
