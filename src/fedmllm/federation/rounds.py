"""The round loop: cohort, engine, update validation, aggregator."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Literal, TypeAlias

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.lowrank import rank_of, truncation_error, watched_cuts
from fedmllm.algorithms.privacy.client_dp import NoisyMean
from fedmllm.algorithms.privacy.noise import keyed_uniforms
from fedmllm.config.train import UpdateFilter
from fedmllm.core.errors import ConfigError, FedmllmError, NothingToAverage
from fedmllm.core.rng import stream
from fedmllm.core.tensors import is_finite, lora_bytes, norm, num_bytes, same_names
from fedmllm.core.types import ClientFailure, ClientUpdate, Params, Round, Sent, State
from fedmllm.federation.products import Products, left_out

RoundEngine: TypeAlias = Callable[[Round, Mapping[int, Sent]], Iterable[ClientUpdate | ClientFailure]]

LARGEST = 2**53  # of a number that a client reports
SUMMED = ("num_steps", "num_tokens", "time_s")  # summed over clients and rounds, so never negative


@dataclass(frozen=True)
class Progress:
    """The state of a federation after a round: with the experiment, all that the next round depends on."""

    round: int  # finished rounds
    params: Params
    state: State
    log: dict[str, Any] = field(default_factory=dict)  # of the round just finished, for the record


class Sends(Mapping[int, Sent]):
    """Tensors for each client of a cohort. Made when they are read, so those of a large cohort are not all in memory.

    The last client's are kept: an engine, the round and its record read them one after another.
    """

    def __init__(self, aggregator: Aggregator, params: Params, state: State, at: Round, asked: Sequence[int]) -> None:
        self._aggregator, self._params, self._state, self._at, self._asked = aggregator, params, state, at, asked
        self._last: tuple[int, Sent] | None = None

    def __getitem__(self, client: int) -> Sent:
        if client not in self._asked:
            raise KeyError(client)
        last = self._last
        if last is None or last[0] != client:
            last = self._last = (client, self._aggregator.sends(self._params, self._state, self._at, client))
        return last[1]

    def __iter__(self) -> Iterator[int]:
        return iter(self._asked)

    def __len__(self) -> int:
        return len(self._asked)


def federate(
    progress: Progress,
    engine: RoundEngine,
    aggregator: Aggregator,
    cohorts: Callable[[int], list[int]],
    num_rounds: int,
    update_filter: UpdateFilter,
    drops_out: Callable[[int, int], bool] | None = None,
    seed: int = 0,
    num_clients: int = 0,
    ranks: Sequence[int] = (),
    privacy: NoisyMean | None = None,
    secret_cohorts: bool = False,
    limited_ranks: Callable[[Round], Sequence[int]] | None = None,
) -> Iterator[Progress]:
    """Yield the state after each round from `progress.round + 1` to `num_rounds`.

    Args:
        progress: Where to start from; `round` is 0 for a new federation.
        engine: Trains the clients of a round.
        aggregator: The algorithm.
        cohorts: Round -> the clients that are asked, ascending.
        num_rounds: In all, those of `progress` included.
        update_filter: Which updates may be aggregated.
        drops_out: (round, client) -> True if the client receives the adapter and then does not respond.
        seed: Of the experiment.
        num_clients: That can be asked; 0 = as many as the cohort.
        ranks: Of the clients, in turn; () = all have the adapter's.
        privacy: Makes one noisy update of a round's updates, which is all that the aggregator receives.
        secret_cohorts: True if clients must not learn who else is asked.
        limited_ranks: The ranks of a round whose clients may have limits of their own.

    Raises:
        FedmllmError: an update may not be aggregated and `update_filter.on_bad_update` is not "drop_client"; or the global
            adapter would no longer be finite. No round that is yielded holds NaN or Inf.
    """
    params, state = progress.params, progress.state
    for round_ in range(progress.round + 1, num_rounds + 1):
        began, cohort = time.perf_counter(), cohorts(round_)
        at = Round(round_, seed, num_rounds, tuple(cohort), num_clients or len(cohort), tuple(ranks))
        if limited_ranks:
            at = replace(at, ranks=tuple(limited_ranks(at)))
        dropped_out = [client for client in cohort if drops_out(round_, client)] if drops_out else []
        sends = Sends(aggregator, params, state, at, cohort)
        validator = UpdateValidator(update_filter, aggregator, sends, at, dropped_out)
        released: dict[str, Any] = {}
        try:
            asked = Sends(aggregator, params, state, at, [k for k in cohort if k not in dropped_out])
            # The quality of an aggregation is a number about the clients' own updates, so privacy leaves it out.
            products = Products(sends, seed) if aggregator.global_model and not privacy else None
            known = replace(at, cohort=()) if secret_cohorts else at
            checked: Iterable[ClientUpdate] = validator.checked(validator.timed(engine, known, asked))
            own: State = {}
            if privacy:
                like = aggregator.sends(params, state, at, cohort[0] if cohort else 0).returned()
                update, own, released = privacy(checked, round_, like, state)
                checked = [update]
            with watched_cuts() as cuts:
                params, state = aggregator.apply(params, state, at, products.watched(checked) if products else checked)
            state = {**state, **own}
            if products:
                quality = products.quality(aggregator.result(params, state))
            else:
                quality = left_out("it is a number about single clients" if privacy else "there is no global model")
            if (lost := truncation_error(cuts)) is not None:
                quality["truncation_error"] = lost
            quality |= aggregator.measured(state)
        except NothingToAverage as error:
            quality = {}
            validator.note = f"the global adapter stays as it was: {error}"
        if not (is_finite(params) and all(map(is_finite, state.values()))):
            raise FedmllmError(
                f"round {round_}: {aggregator.name} made NaN or Inf of finite updates: the federation diverges; "
                "lower aggregator.lr or train.lr, or set update_filter.max_norm"
            )
        wall_s = time.perf_counter() - began
        times = {"server_s": wall_s - validator.engine_s, "wall_s": wall_s}
        yield Progress(
            round_,
            params,
            state,
            {
                "round": round_,
                "cohort": cohort,
                **validator.log(),
                **quality,
                **times,
                **({"privacy": released} if released else {}),
            },
        )


class UpdateValidator:
    """The updates of one round on their way to the aggregator: checked, counted and named, one at a time.

    Args:
        update_filter: Which updates may be aggregated.
        aggregator: Gives the tensors that a client returns in addition to its delta.
        sends: What each client of the cohort received.
        at: The round.
        dropped_out: Clients that received the adapter and are not awaited.
    """

    def __init__(
        self,
        update_filter: UpdateFilter,
        aggregator: Aggregator,
        sends: Mapping[int, Sent],
        at: Round,
        dropped_out: Sequence[int] = (),
    ) -> None:
        self._update_filter, self._aggregator, self._sends, self._at = update_filter, aggregator, sends, at
        self._dropped_out, self._awaited = dropped_out, set(at.cohort).difference(dropped_out)
        self._clients: list[dict[str, Any]] = []
        self._dropped: list[dict[str, Any]] = []
        self._up_bytes = self._up_lora_bytes = 0
        self.engine_s = 0.0  # spent in the engine; the rest of a round is the server's own
        self.note = ""

    def timed(
        self, engine: RoundEngine, at: Round, asked: Mapping[int, Sent]
    ) -> Iterator[ClientUpdate | ClientFailure]:
        """The engine's updates as they come, with its time counted, whether it computes them at once or one by one."""
        began = time.perf_counter()
        for update in engine(at, asked) if asked else ():
            self.engine_s += time.perf_counter() - began
            yield update
            began = time.perf_counter()
        self.engine_s += time.perf_counter() - began

    def checked(self, updates: Iterable[ClientUpdate | ClientFailure]) -> Iterator[ClientUpdate]:
        """The updates that may be aggregated. Raises FedmllmError for any other unless they are dropped."""
        for update in updates:
            if isinstance(update, ClientUpdate):
                self._up_bytes += _up_bytes(update)
                self._up_lora_bytes += _up_lora_bytes(update)
            size = norm(update.delta) if isinstance(update, ClientUpdate) else 0.0
            if reason := self._fault(update, size):
                self._leave_out(update.client, reason)
            elif isinstance(update, ClientUpdate):
                down = sum(num_bytes(self._sends[k].travelling()) for k in _clients(update))
                entry: dict[str, Any] = {"client": update.client, "num_examples": update.num_examples, "norm": size}
                entry |= {"up_bytes": _up_bytes(update), "down_bytes": down}
                entry |= {"clients": list(update.clients)} if update.clients else {}
                if self._aggregator.mixed_ranks:
                    entry["rank"] = rank_of(update.delta)
                self._clients.append({**entry, **update.metrics, **entry})  # a client's metrics cannot override these
                yield update
        for client in sorted(self._awaited):
            self._leave_out(client, "no response")

    def _leave_out(self, client: int, reason: str) -> None:
        if self._update_filter.on_bad_update != "drop_client":
            raise FedmllmError(
                f"round {self._at.number}, client {client}: {reason}; nothing was averaged. "
                'update_filter.on_bad_update = "drop_client" leaves such clients out'
            )
        self._dropped.append({"client": client, "reason": reason})

    def _fault(self, update: ClientUpdate | ClientFailure, size: float) -> str:
        """Why an update may not be averaged; "" = it may. Everything here may come from another machine."""
        clients = _clients(update)
        if not self._awaited.issuperset(clients):
            asked = set(clients) <= set(self._at.cohort)
            return "duplicate response" if asked else f"not asked; the cohort is {list(self._at.cohort)}"
        self._awaited.difference_update(clients)
        if isinstance(update, ClientFailure):
            return update.reason
        sent = self._sends[update.client]
        if reason := _mismatch("", sent.returned(), update.delta):
            return reason
        if update.extra and (reason := _mismatch("extra tensor ", self._aggregator.returned_extra(sent), update.extra)):
            return reason
        if not math.isfinite(size):
            return "its delta holds NaN or Inf"
        if not is_finite(update.extra):
            return "its extra tensors hold NaN or Inf"
        if odd := [k for k, v in update.metrics.items() if not _is_amount(v, least=0 if k in SUMMED else -LARGEST)]:
            return f"its {odd[0][:50]} is {_printed(update.metrics[odd[0]])}"
        if not (isinstance(update.num_examples, Integral) and _is_amount(update.num_examples, 0)):
            return f"its number of rows is {_printed(update.num_examples)}"
        limit = self._update_filter.max_norm
        if 0 < limit < size:
            return f"the norm of its delta is {size:.4g}, over update_filter.max_norm = {limit:.4g}"
        return ""

    def log(self) -> dict[str, Any]:
        """The round's part of the record."""
        travelled = [self._sends[client].travelling() for client in self._at.cohort]
        note = {"note": self.note} if self.note else {}
        dropped_out = {"dropped_out": list(self._dropped_out)} if self._dropped_out else {}
        return {
            "clients": self._clients,
            "dropped": self._dropped,
            **dropped_out,
            "up_bytes": self._up_bytes,
            "up_lora_bytes": self._up_lora_bytes,
            "down_bytes": sum(map(num_bytes, travelled)),
            "down_lora_bytes": sum(map(lora_bytes, travelled)),
            **note,
        }


def _clients(update: ClientUpdate | ClientFailure) -> tuple[int, ...]:
    """The clients that a response is from: several of a secure sum."""
    return (update.clients if isinstance(update, ClientUpdate) else ()) or (update.client,)


def _up_bytes(update: ClientUpdate) -> int:
    return update.sent_bytes or num_bytes(update.delta) + num_bytes(update.extra)


def _up_lora_bytes(update: ClientUpdate) -> int:
    if update.sent_bytes:  # masked words of all tensors alike
        return update.sent_bytes * lora_bytes(update.delta) // max(1, num_bytes(update.delta))
    return lora_bytes(update.delta) + lora_bytes(update.extra)


def _mismatch(kind: str, like: Params, got: Params) -> str:
    """Describe how names, shapes or types differ from what a client returns; "" if they do not."""
    try:
        same_names(like, got)
    except FedmllmError as error:
        return f"{kind}{error}"
    odd = next((name for name, t in got.items() if t.dtype != like[name].dtype), None)
    return f"the type of {kind}{odd} is {got[odd].dtype}, not {like[odd].dtype}" if odd is not None else ""


def _is_amount(value: object, least: float) -> bool:
    """True if the value is a finite number that can be summed without losing precision."""
    return isinstance(value, int | float | Integral) and bool(least <= value < LARGEST)  # type: ignore[operator]


def _printed(value: object) -> str:
    return repr(value)[:50] if not isinstance(value, int) or abs(value) < 10**50 else "a number of over 50 digits"


def cohorts(
    rule: Literal["seeded", "reference", "poisson"], clients: Sequence[int], size: int, seed: int, key: bytes = b""
) -> Callable[[int], list[int]]:
    """Round (from 1) -> the clients asked, ascending.

    Args:
        rule: "reference" is the published draw, the same for every seed: over all of 0..9, without those that hold no rows.
        clients: Those that hold rows.
        size: Clients a round, on average if "poisson"; 0 = all of them.
        seed: Of the draw "seeded".
        key: Of the draw "poisson": 32 secret bytes.

    Raises:
        ConfigError: the draw is not possible with these clients.
    """
    if rule == "reference" and max(clients, default=0) > 9:
        raise ConfigError(
            f'cohort: got "reference", the published draw over 10 clients; there are {max(clients) + 1}; allowed: seeded'
        )
    size = size or len(clients)
    if size > len(clients):
        raise ConfigError(f"cohort_size: got {size}; only {len(clients)} clients hold rows")

    def seeded(round_: int) -> list[int]:
        drawn = stream(seed, "cohort", round_).choice(len(clients), size=size, replace=False)
        return sorted(clients[int(i)] for i in drawn)

    def reference(round_: int) -> list[int]:
        drawn = random.Random(round_ - 1).sample(range(10), size)
        return sorted(client for client in drawn if client in clients)

    def poisson(round_: int) -> list[int]:
        drawn = keyed_uniforms(key, len(clients), "cohort", round_) < size / len(clients)
        return sorted(client for client, is_in in zip(clients, drawn, strict=True) if is_in)

    return {"seeded": seeded, "reference": reference, "poisson": poisson}[rule]
