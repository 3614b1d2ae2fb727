"""FedALT: a client's own adapter and the frozen mean of the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedmllm.algorithms.base import Aggregator, added
from fedmllm.algorithms.lowrank import A, B, Pair, concatenated, others, pairs, rebuilt, unpaired
from fedmllm.core.tensors import mean_delta, tree_map
from fedmllm.core.types import ClientUpdate, Params, Round, Sent, State


class FedAlt(Aggregator):
    """y = W x + a B_k A_k x + (1 - a) B_R A_R x with (B_R, A_R) the factor means of the other clients (arXiv:2503.11880).

    The mixture is fixed: the paper's gate depends on the input and is not a LoRA adapter. A client continues from its own
    adapter, never from a mean. The server keeps the last adapter of every client that ever took part, for those absent: one
    adapter's numbers each. There is no global model; a client's own has rank 2 r. Both adapters travel to the client.
    """

    name: Literal["fedalt"] = "fedalt"
    needs: ClassVar[frozenset[str]] = frozenset({"frozen-adapter", "scale"})
    global_model: ClassVar[bool] = False
    no_server: ClassVar[str] = "has no global adapter that a server optimizer could move"
    own: Annotated[float, Field(gt=0, le=1)] = 0.5
    """a: weight of the client's own adapter."""

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        start, rest = self._own(params, state, client), self._rest(state, client)
        return Sent(start, frozen=unpaired(rest, params), scale=self.own) if rest else Sent(start)

    def _own(self, params: Params, state: State, client: int) -> Params:
        """The client's last adapter, with the global value of other tensors; `params` before its first round."""
        last = state.get(f"client-{client}", {})
        return {n: last[n] if n in last and (A in n or B in n) else t for n, t in params.items()}

    def _rest(self, state: State, client: int) -> dict[str, Pair]:
        """(1 - a) B_R and A_R by the name of A; {} if no other client took part so far."""
        trees = [tree for key, tree in state.items() if key != f"client-{client}"]
        if not trees:
            return {}
        total = trees[0]
        for tree in trees[1:]:
            total = tree_map(lambda x, y: x + y, total, tree)
        mean = {name: t / len(trees) for name, t in total.items()}
        return {name: ((1 - self.own) * b, a) for name, (b, a) in pairs(mean).items()}

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        listed, plain = list(updates), others(params)
        mean = mean_delta(replace(u, delta={n: u.delta[n] for n in plain}) for u in listed)
        after = dict(state)
        for update in listed:
            if update.num_examples:
                local = rebuilt(self.sends(params, state, at, update.client), update)
                after[f"client-{update.client}"] = local
        return added(params, mean), after

    def personal(self, params: Params, state: State, client: int, kept: Params) -> Params:
        start, rest = self._own(params, state, client), self._rest(state, client)
        if not rest:
            return start
        both = {n: concatenated([(self.own * b, a), rest[n]]) for n, (b, a) in pairs(start).items()}
        return {**start, **unpaired(both, params)}
