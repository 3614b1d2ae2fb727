"""Error of an aggregation relative to the mean of the products."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedmllm.algorithms.lowrank import Pair, concatenated, pairs, product_norm, rank_of, rebuilt
from fedmllm.core.types import ClientUpdate, Params, Sent

MAX_RANK = 512  # of all clients' pairs of a module together; above it the error is not computed


class Products:
    """The clients' pairs (B_k, A_k) of one round, as the aggregator reads the updates.

    Args:
        sends: What each client received.
    """

    def __init__(self, sends: Mapping[int, Sent]) -> None:
        self._sends = sends
        self._parts: dict[str, list[Pair]] | None = {}
        self._counts: list[int] = []
        self._frozen: list[tuple[int, Params]] = []  # each different frozen adapter with the rows of those that had it

    def watched(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """The same updates; the pairs of those with rows are kept until there are too many."""
        for update in updates:
            if update.clients:
                self._parts = None  # the products of the clients are not known
            elif update.num_examples and self._parts is not None:
                self._add(update)
            yield update

    def _add(self, update: ClientUpdate) -> None:
        sent = self._sends[update.client]
        assert self._parts is not None
        for name, pair in pairs(rebuilt(sent, update)).items():
            self._parts.setdefault(name, []).append(pair)
        self._counts.append(update.num_examples)
        known = next((i for i, (_, frozen) in enumerate(self._frozen) if frozen is sent.frozen), None)
        if known is not None:
            self._frozen[known] = (self._frozen[known][0] + update.num_examples, sent.frozen)
        elif sent.frozen:
            self._frozen.append((update.num_examples, sent.frozen))
        rank = max((sum(a.shape[0] for _, a in part) for part in self._parts.values()), default=0)
        if rank + sum(rank_of(frozen) for _, frozen in self._frozen) > MAX_RANK:
            self._parts = None

    def quality(self, result: Params) -> dict[str, Any]:
        """`aggregation_error`, |result - M| / |M| over all modules with M the weighted mean of the clients' products, frozen
        adapters included; and `result_rank`. {} without LoRA tensors.

        A server optimizer's step counts as error, too. By Gram matrices of the factors: D x C is never formed, and values
        below 1e-7 are rounding.
        """
        if not rank_of(result):
            return {}
        quality: dict[str, Any] = {"result_rank": rank_of(result)}
        total = sum(self._counts)
        if not self._parts or not total:
            return quality
        square, whole = 0.0, 0.0
        for name, (b, a) in pairs(result).items():
            mean = [(n / total * b_k, a_k) for n, (b_k, a_k) in zip(self._counts, self._parts[name], strict=True)]
            mean += [(n / total * f[0], f[1]) for n, frozen in self._frozen for f in [pairs(frozen)[name]]]
            target = concatenated(mean)
            square += product_norm([(-b, a), target]) ** 2
            whole += product_norm([target]) ** 2
        return quality | ({"aggregation_error": (square / whole) ** 0.5} if whole else {})
