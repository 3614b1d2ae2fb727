"""SCAFFOLD: control variates against client drift (Karimireddy et al., arXiv:1910.06378, Alg. 1).

Client k trains with c - c_k added to its gradients. Its new c_k is the mean of its uncorrected gradients, which for SGD at
a constant rate is the paper's option II exactly: (x - y) / (K lr) = mean(g) - c_k + c, so that c_k - c + (x - y) / (K lr) =
mean(g). In this form it stays valid for AdamW, whose steps are not gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

from pydantic import PositiveFloat

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.objectives import ClientView
from fedmllm.core.tensors import plain_mean_delta, subtract, tree_map, zeros
from fedmllm.core.types import ClientUpdate, LocalRule, Outcome, Params, Round, Sent, State


class Scaffold(Aggregator):
    """Control variates against client drift (Karimireddy et al., arXiv:1910.06378, Alg. 1).

    Client k trains with c - c_k added to its gradients; its new c_k is the mean of its uncorrected gradients. Server:
    w += lr * mean of the deltas; c += sum over the cohort of (new c_k - old c_k) / N, N the number of all clients.
    """

    name: Literal["scaffold"] = "scaffold"
    needs: ClassVar[frozenset[str]] = frozenset({"client-state", "extra"})
    no_server: ClassVar[str] = (
        "corrects the gradients of the one adapter that all clients share: a factor that stays with its client has no control "
        "variate of the server, and another step than the mean is outside of its formula"
    )
    lr: PositiveFloat = 1.0
    """Factor of the mean delta."""

    def init(self, params: Params) -> State:
        return {"c": zeros(params)}

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        return Sent(params, extra=state["c"])

    def returned_extra(self, sent: Sent) -> Params:
        return sent.extra

    def begin(self, at: Round, view: ClientView, sent: Sent, kept: Params) -> LocalRule:
        return LocalRule(shift=subtract(sent.extra, kept) if kept else sent.extra, mean_gradient=True)

    def finish(self, at: Round, view: ClientView, outcome: Outcome, kept: Params) -> tuple[Params, Params]:
        new = outcome.mean_gradient
        if not new:
            return {}, {}
        return tree_map(lambda new, old: (new - old) / at.num_clients, new, kept or zeros(new)), new

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        c = state["c"]

        def summed() -> Iterator[ClientUpdate]:
            nonlocal c
            for update in updates:
                if update.extra and update.num_examples:
                    c = tree_map(lambda c, change: c + change, c, update.extra)
                yield update

        delta = plain_mean_delta(summed())
        return tree_map(lambda w, d: w + self.lr * d, params, delta), {"c": c}
