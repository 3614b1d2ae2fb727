"""FedEx-LoRA and FLoRA: exact aggregation by an adapter that grows.

"Exact": the global model adds sum p_k B_k A_k, the mean of the clients' products, which is not the product of the mean
factors. What exceeds the live adapter is a frozen adapter F in the server's state; the global model is one PEFT adapter.
All updates of a round are in memory at once, K n numbers, n those of one adapter; in addition F before and after the round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.lowrank import (
    OF_PRODUCTS,
    A,
    B,
    Pair,
    compacted,
    concatenated,
    names_of,
    of_rank,
    others,
    pairs,
    rank_of,
    shares,
    truncated,
    unpaired,
)
from fedmllm.core.rng import torch_stream
from fedmllm.core.tensors import mean_delta, same_names
from fedmllm.core.types import ClientUpdate, Params, Round, Sent, State


class Growing(Aggregator):
    """The frozen adapter F: sent to every client, grown after every round, compressed above a rank."""

    needs: ClassVar[frozenset[str]] = frozenset({"frozen-adapter"})
    grows: ClassVar[bool] = True
    no_server: ClassVar[str] = OF_PRODUCTS
    cap: PositiveInt = 256
    """Largest rank of F. Above it the best approximation of this rank is kept; the record's `truncation_error` has the
    loss."""

    def init(self, params: Params) -> State:
        factors = ((n, t) for n, t in params.items() if A in n or B in n)
        return {"frozen": {n: t[:0].clone() if A in n else t[:, :0].clone() for n, t in factors}}

    def frozen(self, state: State) -> Params:
        """F as it travels; {} while it is empty."""
        return state["frozen"] if rank_of(state["frozen"]) else {}

    def grown(self, state: State, parts: Callable[[str], list[Pair]]) -> State:
        """The state with the pairs of each module (by the name of its A) added to F: one module's are in memory at a time."""
        frozen = {}
        for name, pair in pairs(state["frozen"]).items():
            b, a = concatenated([pair, *parts(name)])
            frozen[name] = truncated((b, a), self.cap) if a.shape[0] > self.cap else (b, a)
        return {**state, "frozen": unpaired(frozen, state["frozen"])}


class FedExLora(Growing):
    """Factors are averaged as in FedAvg; the error of that, sum p_k (B_k - Bm)(A_k - Am), joins F (arXiv:2410.09432).

    One client, or equal A_k, give no error.
    """

    name: Literal["fedex-lora"] = "fedex-lora"

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        return Sent(params, frozen=self.frozen(state))

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        listed = list(updates)
        delta = mean_delta(listed)
        after = {name: t + delta[name] for name, t in params.items()}
        used = [update for update in listed if update.num_examples]
        if len(used) == 1:
            return after, state
        weights = [math.sqrt(share) for share in shares(used)]

        def error(name: str) -> list[Pair]:
            b_mean, a_mean = after[name.replace(A, B)], after[name]
            locals_ = [local_pair(params, update, name) for update in used]
            parts = [(w * (b - b_mean), w * (a - a_mean)) for w, (b, a) in zip(weights, locals_, strict=True)]
            # The K differences of a factor sum to 0, so the rank of the error is (K - 1) r at most.
            return [compacted(concatenated(parts), (len(used) - 1) * len(a_mean))]

        return after, self.grown(state, error)

    def result(self, params: Params, state: State) -> Params:
        frozen, live = pairs(state["frozen"]), pairs(params)
        return {**params, **unpaired({n: concatenated([live[n], frozen[n]]) for n in live}, params)}


class FLora(Growing):
    """Every round starts from F with a fresh A and B = 0, of any rank; the clients' pairs are stacked onto F: with
    F = (B_F, A_F), F <- ([B_F, B_1, .., B_K], [A_F; p_1 A_1; ..; p_K A_K]) (arXiv:2409.05976).
    """

    name: Literal["flora"] = "flora"
    mixed_ranks: ClassVar[bool] = True
    warm_start: ClassVar[bool] = False
    lr: PositiveFloat = 1.0
    """Factor of a round's increment, and of the mean delta of other tensors."""

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        start = of_rank(self._fresh(params, at), at.rank(client))
        return Sent(start, known=names_of(start, B), frozen=self.frozen(state))

    def _fresh(self, params: Params, at: Round) -> Params:
        """The start of a round at full rank."""
        start = dict(params)
        for name, (b, a) in pairs(params).items():
            bound = 1 / math.sqrt(a.shape[1])
            generator = torch_stream(at.seed, "flora", at.number, name)
            start[name] = a.new_empty(a.shape).uniform_(-bound, bound, generator=generator)
            start[name.replace(A, B)] = b.new_zeros(b.shape)
        return start

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        listed, fresh = list(updates), self._fresh(params, at)
        mean = mean_delta(replace(u, delta={n: u.delta[n] for n in others(params)}) for u in listed)
        used = [update for update in listed if update.num_examples]
        starts = [of_rank(fresh, at.rank(update.client)) for update in used]
        for update, start in zip(used, starts, strict=True):
            same_names(start, update.delta)

        def parts(name: str) -> list[Pair]:
            locals_ = [local_pair(start, update, name) for start, update in zip(starts, used, strict=True)]
            return [(b, self.lr * share * a) for share, (b, a) in zip(shares(used), locals_, strict=True)]

        after = {n: t + self.lr * mean[n] if n in others(params) else t for n, t in params.items()}
        return after, self.grown(state, parts)

    def result(self, params: Params, state: State) -> Params:
        frozen = self.frozen(state)
        return {name: frozen.get(name, t) for name, t in params.items()}


def local_pair(start: Params, update: ClientUpdate, name: str) -> Pair:
    """A client's pair of one module, by the name of its A, after training."""
    partner = name.replace(A, B)
    return start[partner] + update.delta[partner], start[name] + update.delta[name]
