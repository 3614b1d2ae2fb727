"""Unequal ranks by averaging factors: HetLoRA, FediLoRA, Fed-PLoRA.

Each direction of a module (column d of B, row d of A) is averaged over the clients that trained it. With equal ranks every
member is plain averaging, except where it says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, model_validator

from fedmllm.algorithms.base import Aggregator, WithServer
from fedmllm.algorithms.lowrank import A, B, names_of, of_rank, others, pairs, product_norm, rank_of, rebuilt, revived
from fedmllm.algorithms.objectives import ClientView
from fedmllm.core.errors import FedmllmError, NothingToAverage
from fedmllm.core.rng import stream
from fedmllm.core.spec import ADDED_LATER
from fedmllm.core.tensors import padded, same_names
from fedmllm.core.types import ClientUpdate, LocalRule, Params, Round, Sent, State

if TYPE_CHECKING:
    from torch import Tensor

LEAST_NORM = 1e-12  # norm below which a tail counts as zero, where its norm has no gradient
TrainedDirections = Mapping[int, Sequence[int]]  # client -> the directions that it trained


def with_rows(updates: Iterable[ClientUpdate]) -> list[ClientUpdate]:
    """The updates that have rows, in ascending client order.

    Raises:
        NothingToAverage: there is none.
        FedmllmError: the order is wrong.
    """
    listed = list(updates)
    clients = [update.client for update in listed]
    if clients != sorted(set(clients)):
        raise FedmllmError(f"clients came as {clients}; updates must be in ascending client order")
    used = [update for update in listed if update.num_examples]
    if not used:
        raise NothingToAverage("nothing to average: no client trained on any row this round")
    return used


class ByDirection(WithServer):
    """Directions that no client of the round trained keep their value and their optimizer state."""

    mixed_ranks: ClassVar[bool] = True

    def directions(self, params: Params, at: Round, client: int) -> list[int]:
        """The directions that a client trains, ascending."""
        return list(range(at.rank(client) or _rank(params)))

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        used = with_rows(updates)
        picked = {update.client: self.directions(params, at, update.client) for update in used}
        deltas = [self.edited(params, state, at, update) for update in used]
        delta, touched = averaged(params, used, deltas, picked)
        after, moved = self.step(params, state, at, delta)
        if all(bool(mask.all()) for mask in touched.values()):
            return after, moved
        return _where(touched, after, params), {
            k: _where(touched, tree, state[k]) if k in state else tree for k, tree in moved.items()
        }

    def edited(self, params: Params, state: State, at: Round, update: ClientUpdate) -> Params:
        """The delta of one client as it enters the mean."""
        same_names(self.sends(params, state, at, update.client).returned(), update.delta)
        return update.delta


def _rank(params: Params) -> int:
    return max((a.shape[0] for _, a in pairs(params).values()), default=0)


def averaged(
    params: Params, updates: Sequence[ClientUpdate], deltas: Sequence[Params], picked: TrainedDirections
) -> tuple[Params, dict[str, Tensor]]:
    """The mean delta of each direction over those who trained it, weighted by rows; and which directions that are.

    Returns:
        The delta in the shapes of `params`, and per LoRA tensor a mask that broadcasts over it.
    """
    import torch

    total = {name: torch.zeros_like(t) for name, t in params.items()}
    for update, delta in zip(updates, deltas, strict=True):
        index = torch.tensor(picked[update.client], dtype=torch.int64)
        for name, d in delta.items():
            weighted = float(update.num_examples) * d
            if A in name:
                total[name].index_add_(0, index, weighted)
            elif B in name:
                total[name].index_add_(1, index, weighted)
            else:
                total[name] += weighted
    every = float(sum(update.num_examples for update in updates))
    reach_r = torch.zeros(_rank(params), dtype=torch.float64)
    for update in updates:
        reach_r[picked[update.client]] += float(update.num_examples)
    touched = {}
    for name, t in total.items():
        if A not in name and B not in name:
            total[name] = t / every
            continue
        reach = reach_r[: t.shape[0]][:, None] if A in name else reach_r[: t.shape[1]][None, :]
        touched[name] = reach > 0
        total[name] = t / reach.clamp(min=1.0).to(t.dtype)
    return total, touched


def _where(touched: Mapping[str, Tensor], new: Params, old: Params) -> Params:
    import torch

    return {n: torch.where(touched[n], t, old[n]) if n in touched and n in old else t for n, t in new.items()}


class FediLora(ByDirection):
    """Each direction is averaged over the clients whose rank reaches it (FediLoRA, arXiv:2509.06984).

    From round 2 on, the A of each client that turned away most from the global one, by its cosine c, is drawn back:
    A <- (1 - c) A_global + c A, if c < `edit_below`; c is limited to 0..1, since a negative one would extrapolate. Only that
    layer of the client is edited.
    """

    name: Literal["fedilora"] = "fedilora"
    edit_below: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Cosine below which the edit takes place; 0 = never."""

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        return Sent(of_rank(params, at.rank(client)))

    def edited(self, params: Params, state: State, at: Round, update: ClientUpdate) -> Params:
        delta = super().edited(params, state, at, update)
        names = sorted(names_of(delta, A))
        if at.number == 1 or not names:
            return delta
        start = self.sends(params, state, at, update.client).start
        cosines = {name: _cosine(start[name], start[name] + delta[name]) for name in names}
        name = min(names, key=lambda name: cosines[name])
        c = max(0.0, cosines[name])
        return delta if c >= self.edit_below else {**delta, name: c * delta[name]}


def _cosine(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    size = float(x.norm() * y.norm())
    return float((x * y).sum()) / size if size else 1.0


class FedPLora(ByDirection):
    """A client trains r_k of the R rank-one pairs, drawn again in each round; the others ride along frozen, so that every
    client starts at the global function (Fed-PLoRA, arXiv:2602.16936).
    """

    name: Literal["fed-plora"] = "fed-plora"
    needs: ClassVar[frozenset[str]] = frozenset({"frozen-adapter"})

    def directions(self, params: Params, at: Round, client: int) -> list[int]:
        number, rank = at.rank(client), _rank(params)
        if not 0 < number < rank:
            return list(range(rank))
        return sorted(stream(at.seed, "pick", at.number, client).choice(rank, size=number, replace=False).tolist())

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        picked = self.directions(params, at, client)
        rest = sorted(set(range(_rank(params))) - set(picked))
        if not rest:
            return Sent(params)
        factors = names_of(params, A) | names_of(params, B)
        frozen = {n: t[rest] if A in n else t[:, rest] for n, t in params.items() if n in factors}
        return Sent(
            {n: t[picked] if A in n else t[:, picked] if B in n else t for n, t in params.items()}, frozen=frozen
        )


class HetLora(Aggregator):
    """Zero-padded factors are averaged with weights |B_k A_k|_F / sum, over all modules together (HetLoRA, arXiv:2401.06432).

    A baseline: every round shrinks the directions above a rank by the weight of the clients that lack them, also if no
    client learns anything. A direction that every client of a round lacks becomes zero; A is then drawn again, or no client
    could ever train the direction again.

    Self-pruning of ranks, the paper's second part, is off unless `tail_penalty` is set: a client of rank r has the term
    tail_penalty * sum over modules of |B[:, f:]| |A[f:]| with f = floor(tail_from * r), Frobenius norms. If that sum fell in a
    round, the client's rank is f from then on, and its directions from f on count as zeros in that round's mean already. A
    rank never falls below 1. The server sees this from the delta and keeps the ranks.
    """

    name: Literal["hetlora"] = "hetlora"
    mixed_ranks: ClassVar[bool] = True
    tail_penalty: Annotated[NonNegativeFloat, ADDED_LATER] = 0.0
    """Weight of a client's last directions in its loss; 0 = ranks stay as they are."""
    tail_from: Annotated[float, Field(gt=0, lt=1), ADDED_LATER] = 0.99
    """Share of a client's directions that are not in the tail; 0.99 is published, and leaves one direction to the tail of
    every rank from 2 to 100."""

    @model_validator(mode="after")
    def _tail_is_penalized(self) -> HetLora:
        if not self.tail_penalty and self.tail_from != type(self).model_fields["tail_from"].default:
            raise ValueError(f"tail_from: got {self.tail_from}; no effect with tail_penalty = 0; set tail_penalty")
        return self

    def init(self, params: Params) -> State:
        import torch

        return {"pruned": {"ranks": torch.zeros(0)}} if self.tail_penalty else {}

    def rank(self, state: State, at: Round, client: int) -> int:
        """The rank of a client in a round: its own, or what pruning left; 0 = the full rank."""
        pruned = state["pruned"]["ranks"][client : client + 1].tolist() if "pruned" in state else []
        return min((int(r) for r in (at.rank(client), *pruned) if r), default=0)

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        return Sent(of_rank(params, self.rank(state, at, client)))

    def begin(self, at: Round, view: ClientView, sent: Sent, kept: Params) -> LocalRule:
        ranks = {name: a.shape[0] for name, (_, a) in pairs(sent.start).items()}

        def penalty(done: float, weights: Params) -> Params:
            gradients: Params = {}
            for name, (b, a) in pairs(weights).items():  # an engine may have padded them to another client's rank
                tail = slice(self._first(ranks[name]), ranks[name])
                tail_b, tail_a = b[:, tail], a[tail]
                size_b, size_a = tail_b.norm(), tail_a.norm()
                of_b, of_a = b.new_zeros(b.shape), a.new_zeros(a.shape)
                of_b[:, tail] = self.tail_penalty * size_a / size_b.clamp(min=LEAST_NORM) * tail_b
                of_a[tail] = self.tail_penalty * size_b / size_a.clamp(min=LEAST_NORM) * tail_a
                gradients |= {name: of_a, name.replace(A, B): of_b}
            return gradients

        return LocalRule(penalty=penalty if self.tail_penalty else None)

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        used, pruned = with_rows(updates), dict[int, int]()
        locals_ = [rebuilt(self.sends(params, state, at, update.client), update) for update in used]
        if self.tail_penalty:
            for i, update in enumerate(used):
                before = self.sends(params, state, at, update.client).start
                if self._tail(locals_[i]) < self._tail(before):
                    pruned[update.client] = self._first(rank_of(before))
                    locals_[i] = of_rank(locals_[i], pruned[update.client])
        sizes = [sum(product_norm([pair]) ** 2 for pair in pairs(local).values()) ** 0.5 for local in locals_]
        total = sum(sizes)
        shares = [size / total for size in sizes] if total else [1 / len(sizes)] * len(sizes)
        rows = sum(update.num_examples for update in used)
        after = {name: t.new_zeros(t.shape) for name, t in params.items()}
        plain = others(params)
        for update, local, share in zip(used, locals_, shares, strict=True):
            for name, t in padded(local, params).items():
                after[name] += (update.num_examples / rows if name in plain else share) * t
        return revived(after, at.seed, at.number, least=0.0), _with_ranks(state, pruned)

    def _first(self, rank: int) -> int:
        """The first direction of the tail; `rank` = there is no tail."""
        return max(1, math.floor(self.tail_from * rank))

    def _tail(self, params: Params) -> float:
        """The penalty without its weight, in float64."""
        total = 0.0
        for b, a in pairs(params).values():
            first = self._first(a.shape[0])
            total += float(b[:, first:].double().norm() * a[first:].double().norm())
        return total


def _with_ranks(state: State, pruned: Mapping[int, int]) -> State:
    """`state` of HetLoRA with the ranks of these clients; [largest client + 1], 0 = not pruned."""
    import torch

    if not pruned:
        return state
    old = state["pruned"]["ranks"]
    ranks = torch.zeros(max(len(old), max(pruned) + 1))
    ranks[: len(old)] = old
    for client, rank in pruned.items():
        ranks[client] = rank
    return {**state, "pruned": {"ranks": ranks}}
