"""SCAFFOLD (Karimireddy et al., arXiv:1910.06378, Alg. 1): control variates against the drift of clients whose rows differ.

A client k trains with its gradients corrected by c - c_k. Afterwards its c_k is the mean of its uncorrected gradients, which
for SGD at a constant rate is the paper's option II exactly: (x - y) / (K lr) = mean(g) - c_k + c, so that
c_k - c + (x - y) / (K lr) = mean(g). Said so, it keeps its meaning for AdamW, whose steps are no gradients.

c is the server's and lies in the aggregator's state; each c_k lies on the disk (`controls.py`). Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from pydantic import PositiveFloat

from fedmllm.algorithms.base import Aggregator
from fedmllm.core.tensors import plain_mean_delta, tree_map, zeros
from fedmllm.core.types import ClientUpdate, Params, State


class Scaffold(Aggregator):
    """w += lr * mean of the deltas; c += sum over the cohort of (new c_k - old c_k) / N, N the number of all clients."""

    name: Literal["scaffold"] = "scaffold"
    lr: PositiveFloat = 1.0

    def init(self, params: Params) -> State:
        return {"c": zeros(params)}

    def broadcast(self, state: State) -> Params:
        return state["c"]

    def apply(self, params: Params, state: State, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        c = state["c"]

        def summed() -> Iterator[ClientUpdate]:
            nonlocal c
            for update in updates:
                if update.control and update.num_examples:
                    c = tree_map(lambda c, change: c + change, c, update.control)
                yield update

        delta = plain_mean_delta(summed())
        return tree_map(lambda w, d: w + self.lr * d, params, delta), {"c": c}
