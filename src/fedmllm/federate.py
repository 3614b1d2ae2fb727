"""The round loop: cohort -> engine -> screen -> aggregator. What is done with a finished round is the caller's."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from fedmllm.aggregators import Aggregator
from fedmllm.config import Screen
from fedmllm.rng import stream
from fedmllm.tensors import is_finite, lora_bytes, norm, num_bytes, same_names
from fedmllm.types import ClientFailure, ClientUpdate, ConfigError, FedmllmError, NothingToAverage, Params, State

Engine: TypeAlias = Callable[[Params, int, Sequence[int]], Iterable[ClientUpdate | ClientFailure]]


@dataclass(frozen=True)
class Progress:
    """Where a federation stands after a round: all that the next round depends on, besides the experiment."""

    round: int  # finished rounds
    params: Params
    state: State
    log: dict[str, Any] = field(default_factory=dict)  # of the round just finished, for the record


def federate(
    progress: Progress, engine: Engine, aggregator: Aggregator, cohorts: Callable[[int], list[int]], num_rounds: int,
    screen: Screen,
) -> Iterator[Progress]:  # fmt: skip
    """Yield the state after each round from `progress.round + 1` to `num_rounds`.

    Raises FedmllmError for an update that may not be averaged, where screen.on_bad_update = "fail".
    """
    params, state = progress.params, progress.state
    for round_ in range(progress.round + 1, num_rounds + 1):
        began, cohort = time.perf_counter(), cohorts(round_)
        intake = Intake(screen, params, round_)
        try:
            updates = intake.timed(engine, params, round_, cohort)
            params, state = aggregator.apply(params, state, intake.checked(updates))
        except NothingToAverage as error:
            intake.note = f"the global adapter stays as it was: {error}"
        wall_s = time.perf_counter() - began
        times = {"server_s": wall_s - intake.engine_s, "wall_s": wall_s}
        yield Progress(round_, params, state, {"round": round_, "cohort": cohort, **intake.log(), **times})


class Intake:
    """The updates of one round on their way to the aggregator: checked, counted and named, one at a time."""

    def __init__(self, screen: Screen, params: Params, round_: int) -> None:
        self._screen, self._params, self._round = screen, params, round_
        self._clients: list[dict[str, Any]] = []
        self._dropped: list[dict[str, Any]] = []
        self._up_bytes = self._up_lora_bytes = 0
        self.engine_s = 0.0  # spent in the engine; the rest of a round is the server's own
        self.note = ""

    def timed(
        self, engine: Engine, params: Params, round_: int, cohort: Sequence[int]
    ) -> Iterator[ClientUpdate | ClientFailure]:
        """The engine's updates as they come, whether it computes them at once or one by one."""
        began = time.perf_counter()
        for update in engine(params, round_, cohort):
            self.engine_s += time.perf_counter() - began
            yield update
            began = time.perf_counter()
        self.engine_s += time.perf_counter() - began

    def checked(self, updates: Iterable[ClientUpdate | ClientFailure]) -> Iterator[ClientUpdate]:
        for update in updates:
            if isinstance(update, ClientUpdate):
                self._up_bytes += num_bytes(update.delta)
                self._up_lora_bytes += lora_bytes(update.delta)
            if reason := self._fault(update):
                if self._screen.on_bad_update == "fail":
                    raise FedmllmError(
                        f"round {self._round}, client {update.client}: {reason}; nothing was averaged. "
                        'screen.on_bad_update = "drop_client" leaves such clients out'
                    )
                self._dropped.append({"client": update.client, "reason": reason})
            elif isinstance(update, ClientUpdate):
                entry = {"client": update.client, "num_examples": update.num_examples, "norm": norm(update.delta)}
                self._clients.append({**entry, **update.metrics})
                yield update

    def _fault(self, update: ClientUpdate | ClientFailure) -> str:
        if isinstance(update, ClientFailure):
            return update.reason
        try:
            same_names(self._params, update.delta)
        except FedmllmError as error:
            return str(error)
        if not is_finite(update.delta):
            return "its delta holds NaN or Inf"
        if (loss := update.metrics.get("loss", 0.0)) - loss != 0:
            return f"its loss is {loss}"
        limit, size = self._screen.max_norm, norm(update.delta)
        return f"the norm of its delta is {size:.4g}, over screen.max_norm = {limit:.4g}" if 0 < limit < size else ""

    def log(self) -> dict[str, Any]:
        asked = len(self._clients) + len(self._dropped)
        up = {"up_bytes": self._up_bytes, "up_lora_bytes": self._up_lora_bytes}
        down = {"down_bytes": asked * num_bytes(self._params), "down_lora_bytes": asked * lora_bytes(self._params)}
        note = {"note": self.note} if self.note else {}
        return {"clients": self._clients, "dropped": self._dropped, **up, **down, **note}


def cohorts(
    rule: Literal["seeded", "reference"], clients: Sequence[int], size: int, seed: int
) -> Callable[[int], list[int]]:
    """Round (from 1) -> the clients asked, ascending. "reference" is the published draw, the same for every seed.

    `clients` are those that hold rows; the published draw is made over all of 0..9 and leaves out those that hold none.
    """
    if size > len(clients):
        raise ConfigError(f"cohort_size: got {size}; only {len(clients)} clients hold rows")

    def seeded(round_: int) -> list[int]:
        drawn = stream(seed, "cohort", round_).choice(len(clients), size=size, replace=False)
        return sorted(clients[int(i)] for i in drawn)

    def reference(round_: int) -> list[int]:
        drawn = random.Random(round_ - 1).sample(range(10), size)
        return sorted(client for client in drawn if client in clients)

    return seeded if rule == "seeded" else reference
