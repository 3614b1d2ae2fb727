"""The round loop: cohort -> engine -> screen -> aggregator. What is done with a finished round is the caller's."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, TypeAlias

from fedmllm.algorithms.base import Aggregator
from fedmllm.config.train import UpdateFilter
from fedmllm.core.errors import ConfigError, FedmllmError, NothingToAverage
from fedmllm.core.rng import stream
from fedmllm.core.tensors import is_finite, lora_bytes, norm, num_bytes, same_names
from fedmllm.core.types import ClientFailure, ClientUpdate, Params, State

Engine: TypeAlias = Callable[[Params, int, Sequence[int]], Iterable[ClientUpdate | ClientFailure]]

LARGEST = 2**53  # of a number that a client tells of itself
SUMMED = ("num_steps", "num_tokens", "time_s")  # sums, which cannot become less


@dataclass(frozen=True)
class Progress:
    """Where a federation stands after a round: all that the next round depends on, besides the experiment."""

    round: int  # finished rounds
    params: Params
    state: State
    log: dict[str, Any] = field(default_factory=dict)  # of the round just finished, for the record


def federate(
    progress: Progress, engine: Engine, aggregator: Aggregator, cohorts: Callable[[int], list[int]], num_rounds: int,
    update_filter: UpdateFilter, drops_out: Callable[[int, int], bool] | None = None,
) -> Iterator[Progress]:  # fmt: skip
    """Yield the state after each round from `progress.round + 1` to `num_rounds`.

    `drops_out` (round, client) says who of a cohort receives the adapter and then gives no answer.

    Raises FedmllmError for an update that may not be averaged, where update_filter.on_bad_update = "fail", and for a global
    adapter that would no longer be finite: no round that is yielded holds NaN or Inf.
    """
    params, state = progress.params, progress.state
    for round_ in range(progress.round + 1, num_rounds + 1):
        began, cohort = time.perf_counter(), cohorts(round_)
        dropped_out = [client for client in cohort if drops_out(round_, client)] if drops_out else []
        validator = UpdateValidator(update_filter, params, aggregator.broadcast(state), round_, cohort, dropped_out)
        try:
            updates = validator.timed(
                engine, params, round_, [client for client in cohort if client not in dropped_out]
            )
            params, state = aggregator.apply(params, state, validator.checked(updates))
        except NothingToAverage as error:
            validator.note = f"the global adapter stays as it was: {error}"
        if not (is_finite(params) and all(map(is_finite, state.values()))):
            raise FedmllmError(
                f"round {round_}: {aggregator.name} made NaN or Inf of finite updates: the federation diverges; "
                "lower aggregator.lr or train.lr, or set update_filter.max_norm"
            )
        wall_s = time.perf_counter() - began
        times = {"server_s": wall_s - validator.engine_s, "wall_s": wall_s}
        yield Progress(round_, params, state, {"round": round_, "cohort": cohort, **validator.log(), **times})


class UpdateValidator:
    """The updates of one round on their way to the aggregator: checked, counted and named, one at a time."""

    def __init__(
        self,
        update_filter: UpdateFilter,
        params: Params,
        broadcast: Params,
        round_: int,
        cohort: Sequence[int],
        dropped_out: Sequence[int] = (),
    ) -> None:
        self._update_filter, self._params, self._broadcast, self._round = update_filter, params, broadcast, round_
        self._cohort, self._dropped_out, self._awaited = cohort, dropped_out, set(cohort).difference(dropped_out)
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
        for update in engine(params, round_, cohort) if cohort else ():
            self.engine_s += time.perf_counter() - began
            yield update
            began = time.perf_counter()
        self.engine_s += time.perf_counter() - began

    def checked(self, updates: Iterable[ClientUpdate | ClientFailure]) -> Iterator[ClientUpdate]:
        for update in updates:
            if isinstance(update, ClientUpdate):
                self._up_bytes += num_bytes(update.delta) + num_bytes(update.control or {})
                self._up_lora_bytes += lora_bytes(update.delta) + lora_bytes(update.control or {})
            size = norm(update.delta) if isinstance(update, ClientUpdate) else 0.0
            if reason := self._fault(update, size):
                self._leave_out(update.client, reason)
            elif isinstance(update, ClientUpdate):
                entry = {"client": update.client, "num_examples": update.num_examples, "norm": size}
                self._clients.append({**entry, **update.metrics, **entry})  # its own words do not rename it
                yield update
        for client in sorted(self._awaited):
            self._leave_out(client, "it gave no answer")

    def _leave_out(self, client: int, reason: str) -> None:
        if self._update_filter.on_bad_update == "fail":
            raise FedmllmError(
                f"round {self._round}, client {client}: {reason}; nothing was averaged. "
                'update_filter.on_bad_update = "drop_client" leaves such clients out'
            )
        self._dropped.append({"client": client, "reason": reason})

    def _fault(self, update: ClientUpdate | ClientFailure, size: float) -> str:
        """Why an update may not be averaged; "" = it may. Everything here may come from another machine."""
        if update.client not in self._awaited:
            asked = update.client in self._cohort
            return "it answered twice" if asked else f"it was not asked; the cohort is {list(self._cohort)}"
        self._awaited.remove(update.client)
        if isinstance(update, ClientFailure):
            return update.reason
        try:
            same_names(self._params, update.delta, *([update.control] if update.control else []))
        except FedmllmError as error:
            return str(error)
        if odd := [n for n, d in update.delta.items() if d.dtype != self._params[n].dtype]:
            return f"the type of {odd[0]} is {update.delta[odd[0]].dtype}, not {self._params[odd[0]].dtype}"
        if not math.isfinite(size):
            return "its delta holds NaN or Inf"
        if not is_finite(update.control or {}):
            return "its control variate holds NaN or Inf"
        if odd := [k for k, v in update.metrics.items() if not _is_amount(v, least=0 if k in SUMMED else -LARGEST)]:
            return f"its {odd[0][:50]} is {_shown(update.metrics[odd[0]])}"
        if not (isinstance(update.num_examples, Integral) and _is_amount(update.num_examples, 0)):
            return f"its number of rows is {_shown(update.num_examples)}"
        limit = self._update_filter.max_norm
        return (
            f"the norm of its delta is {size:.4g}, over update_filter.max_norm = {limit:.4g}"
            if 0 < limit < size
            else ""
        )

    def log(self) -> dict[str, Any]:
        asked = len(self._cohort)
        up = {"up_bytes": self._up_bytes, "up_lora_bytes": self._up_lora_bytes}
        sent = (self._params, self._broadcast)
        down = {"down_bytes": asked * sum(map(num_bytes, sent)), "down_lora_bytes": asked * sum(map(lora_bytes, sent))}
        note = {"note": self.note} if self.note else {}
        dropped_out = {"dropped_out": list(self._dropped_out)} if self._dropped_out else {}
        return {"clients": self._clients, "dropped": self._dropped, **dropped_out, **up, **down, **note}


def _is_amount(value: object, least: float) -> bool:
    """Whether sums over clients and rounds of such values stay exact enough to be said; False for NaN."""
    return isinstance(value, int | float | Integral) and bool(least <= value < LARGEST)  # type: ignore[operator]


def _shown(value: object) -> str:
    return repr(value)[:50] if not isinstance(value, int) or abs(value) < 10**50 else "a number of over 50 digits"


def cohorts(
    rule: Literal["seeded", "reference"], clients: Sequence[int], size: int, seed: int
) -> Callable[[int], list[int]]:
    """Round (from 1) -> the clients asked, ascending. "reference" is the published draw, the same for every seed.

    `clients` are those that hold rows; the published draw is made over all of 0..9 and leaves out those that hold none.
    """
    if rule == "reference" and max(clients, default=0) > 9:
        raise ConfigError(
            f'cohort: got "reference", the published draw over 10 clients; there are {max(clients) + 1}; allowed: seeded'
        )
    if size > len(clients):
        raise ConfigError(f"cohort_size: got {size}; only {len(clients)} clients hold rows")

    def seeded(round_: int) -> list[int]:
        drawn = stream(seed, "cohort", round_).choice(len(clients), size=size, replace=False)
        return sorted(clients[int(i)] for i in drawn)

    def reference(round_: int) -> list[int]:
        drawn = random.Random(round_ - 1).sample(range(10), size)
        return sorted(client for client in drawn if client in clients)

    return seeded if rule == "seeded" else reference
