"""FedNova: updates normalized by local steps (arXiv:2007.07481, Eq. 6)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import PositiveFloat

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.objectives import ClientView
from fedmllm.core.tensors import mean_delta, tree_map
from fedmllm.core.types import ClientUpdate, Outcome, Params, Round, Sent, State


class FedNova(Aggregator):
    """Deltas are normalized by their clients' local steps (Wang et al., arXiv:2007.07481, Eq. 6).

    w += lr * (sum_k p_k tau_k) * sum_k p_k delta_k / tau_k, tau_k the client's steps, p_k its share of the rows. The
    paper's tau_eff with a_k = (1, .., 1). The number of steps travels with the update: rows do not give it where a client
    straggles or `train.max_steps` ends its round.
    """

    name: Literal["fednova"] = "fednova"
    needs: ClassVar[frozenset[str]] = frozenset({"extra"})
    no_server: ClassVar[str] = "applies its normalized mean with its own lr"
    lr: PositiveFloat = 1.0
    """Factor of the normalized mean delta."""

    def returned_extra(self, sent: Sent) -> Params:
        like = next(iter(sent.start.values()))
        return {"num_steps": like.new_zeros(1)}

    def finish(self, at: Round, view: ClientView, outcome: Outcome, kept: Params) -> tuple[Params, Params]:
        return {"num_steps": self.returned_extra(outcome.sent)["num_steps"] + outcome.num_steps}, {}

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        weight = weighted_steps = 0.0

        def normalized() -> Iterator[ClientUpdate]:
            nonlocal weight, weighted_steps
            for update in updates:
                steps = max(1.0, float(update.extra["num_steps"]) if update.extra else 1.0)
                weight += update.num_examples
                weighted_steps += update.num_examples * steps
                yield replace(update, delta={name: d / steps for name, d in update.delta.items()})

        delta = mean_delta(normalized())
        factor = self.lr * weighted_steps / weight
        return tree_map(lambda w, d: w + factor * d, params, delta), state
