"""Error of an aggregation relative to the mean of the products."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fedmllm.algorithms.lowrank import Pair, concatenated, pairs, product_norm, rank_of, rebuilt
from fedmllm.core.rng import torch_stream
from fedmllm.core.tensors import num_bytes
from fedmllm.core.types import ClientUpdate, Params, Sent

if TYPE_CHECKING:
    from torch import Tensor

EXACT_RANK = 512  # largest rank of all clients' pairs of a module together up to which the error is exact
EXACT_BYTES = 256 * 2**20  # most memory of the kept pairs up to which it is
SKETCH = 64  # columns of the random projections beyond


class Products:
    """The clients' pairs (B_k, A_k) of one round, as the aggregator reads the updates.

    Pairs are kept, for an exact error, up to EXACT_RANK and EXACT_BYTES. Beyond, each module keeps one sketch M Omega of the
    sum of its products alone, D x SKETCH with Omega Gaussian, so that memory does not grow with the cohort:
    E |M Omega|^2 = SKETCH |M|^2. The relative standard deviation of either norm in the error is at most
    1 / sqrt(2 SKETCH) = 9 %, that of a single module of rank 1; many modules make it smaller.

    Args:
        sends: What each client received.
        seed: Of the projections.
    """

    def __init__(self, sends: Mapping[int, Sent], seed: int = 0) -> None:
        self._sends, self._seed = sends, seed
        self._why = ""  # the products of the clients are not known
        self._parts: list[tuple[int, dict[str, Pair]]] = []  # (rows, pairs) of each client, while the error is exact
        self._sums: dict[str, Tensor] = {}  # sketch of each module's sum of n_k B_k A_k, after that
        self._omegas: dict[str, Tensor] = {}
        self._total = self._rank = self._bytes = 0
        self._frozen: list[tuple[int, Params]] = []  # each different frozen adapter with the rows of those that had it

    def watched(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """The same updates, with the products of those that have rows added."""
        for update in updates:
            if update.clients:  # a sum over clients
                self._why, self._parts = "the server has only the sum of the clients' updates", []
            elif update.num_examples and not self._why:
                self._add(update)
            yield update

    def _add(self, update: ClientUpdate) -> None:
        sent = self._sends[update.client]
        local = rebuilt(sent, update)
        self._total += update.num_examples
        self._rank += rank_of(local)
        self._bytes += num_bytes(local)
        known = next((i for i, (_, frozen) in enumerate(self._frozen) if frozen is sent.frozen), None)
        if known is not None:
            self._frozen[known] = (self._frozen[known][0] + update.num_examples, sent.frozen)
        elif sent.frozen:
            self._frozen.append((update.num_examples, sent.frozen))
            self._rank += rank_of(sent.frozen)
        self._parts.append((update.num_examples, pairs(local)))
        if self._rank > EXACT_RANK or self._bytes > EXACT_BYTES:
            for rows, products in self._parts:
                for name, pair in products.items():
                    self._sums[name] = self._sums.get(name, 0) + rows * self._sketch(name, pair)
            self._parts = []

    def _sketch(self, name: str, pair: Pair) -> Tensor:
        """B A Omega, [D, SKETCH], with the module's own Omega."""
        import torch

        b, a = pair
        if name not in self._omegas:
            draw = torch_stream(self._seed, "sketch", name)
            self._omegas[name] = torch.randn(a.shape[1], SKETCH, generator=draw, dtype=torch.float32)
        return b.float() @ (a.float() @ self._omegas[name])

    def quality(self, result: Params) -> dict[str, Any]:
        """`aggregation_error`, |result - M| / |M| over all modules with M the weighted mean of the clients' products, frozen
        adapters included, or `aggregation_note`, why it is left out; `result_rank`; and `aggregation_error_sketch`, the
        columns of the projection, if the error is estimated. {} without LoRA tensors.

        A server optimizer's step counts as error, too. D x C is never formed, and values below 1e-7 are rounding.
        """
        if not rank_of(result):
            return {}
        quality: dict[str, Any] = {"result_rank": rank_of(result)}
        if self._why or not self._total:
            return quality | left_out(self._why or "no client has rows")
        square, whole = self._sketched(result) if self._sums else self._exact(result)
        if not whole:
            return quality | left_out("the mean of the products is zero")
        estimated = {"aggregation_error_sketch": SKETCH} if self._sums else {}
        return quality | {"aggregation_error": (square / whole) ** 0.5} | estimated

    def _exact(self, result: Params) -> tuple[float, float]:
        """|result - M|^2 and |M|^2 by Gram matrices of the factors."""
        square, whole = 0.0, 0.0
        for name, (b, a) in pairs(result).items():
            mean = [(n / self._total * part[name][0], part[name][1]) for n, part in self._parts]
            mean += [(n / self._total * f[0], f[1]) for n, frozen in self._frozen for f in [pairs(frozen)[name]]]
            target = concatenated(mean)
            square += product_norm([(-b, a), target]) ** 2
            whole += product_norm([target]) ** 2
        return square, whole

    def _sketched(self, result: Params) -> tuple[float, float]:
        """The same two numbers times SKETCH, in expectation."""
        square, whole = 0.0, 0.0
        frozens = [(rows, pairs(frozen)) for rows, frozen in self._frozen]
        for name, pair in pairs(result).items():
            target = self._sums[name]
            for rows, frozen in frozens:
                target = target + rows * self._sketch(name, frozen[name])
            target = target / self._total
            square += float((self._sketch(name, pair) - target).norm().double() ** 2)
            whole += float(target.norm().double() ** 2)
        return square, whole


def left_out(why: str) -> dict[str, Any]:
    """The record's `aggregation_note`, in place of `aggregation_error`."""
    return {"aggregation_note": f"aggregation_error is left out: {why}"}
