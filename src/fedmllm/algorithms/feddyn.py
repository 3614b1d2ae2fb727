"""FedDyn: dynamic regularization of each client's loss (Acar et al., arXiv:2111.04263, Alg. 1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

from pydantic import PositiveFloat

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.objectives import ClientView
from fedmllm.core.tensors import plain_mean_delta, tree_map, zeros
from fedmllm.core.types import ClientUpdate, LocalRule, Outcome, Params, Round, Sent, State


class FedDyn(Aggregator):
    """Dynamic regularization of each client's loss (Acar et al., arXiv:2111.04263, Alg. 1).

    Client: minimize L_k(w) - <h_k, w> + alpha/2 |w - w_t|^2, then h_k -= alpha (w_k - w_t).

    Server: h -= alpha / N sum_k (w_k - w_t), N the number of all clients; w = mean_k w_k - h / alpha over the cohort.
    """

    name: Literal["feddyn"] = "feddyn"
    needs: ClassVar[frozenset[str]] = frozenset({"client-state"})
    weighted_by: ClassVar[Literal["", "rows", "clients"]] = "clients"
    alpha: PositiveFloat = 0.01
    """Weight of the regularization."""

    def init(self, params: Params) -> State:
        return {"h": zeros(params)}

    def begin(self, at: Round, view: ClientView, sent: Sent, kept: Params) -> LocalRule:
        shift = {name: -t for name, t in kept.items()}
        return LocalRule(mu=dict.fromkeys(sent.start, self.alpha), shift=shift)

    def finish(self, at: Round, view: ClientView, outcome: Outcome, kept: Params) -> tuple[Params, Params]:
        old = kept or zeros(outcome.delta)
        return {}, tree_map(lambda h, d: h - self.alpha * d, old, outcome.delta) if outcome.num_steps else {}

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        h = state["h"]

        def summed() -> Iterator[ClientUpdate]:
            nonlocal h
            for update in updates:
                if update.num_examples:
                    share = self.alpha / at.num_clients * update.num_clients
                    h = tree_map(lambda h, d, share=share: h - share * d, h, update.delta)
                yield update

        delta = plain_mean_delta(summed())
        return tree_map(lambda w, d, h: w + d - h / self.alpha, params, delta, h), {"h": h}
