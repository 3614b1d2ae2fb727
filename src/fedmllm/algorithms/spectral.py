"""FlexLoRA, raFLoRA, FLoRIST, FedSVD: aggregation of products by SVD.

The clients' products are summed and cut to a rank.
The stream of updates is held as factors: sum of n_k numbers, never a D x C matrix. No optimizer follows, since the
coordinates change in every round.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from fedmllm.algorithms.base import Aggregator, added
from fedmllm.algorithms.lowrank import (
    OF_PRODUCTS,
    A,
    Pair,
    concatenated,
    cut_at,
    names_of,
    of_rank,
    of_width,
    others,
    pairs,
    rebuilt,
    revived,
    svd,
    truncated,
    unpaired,
    weighted,
)
from fedmllm.core.spec import ADDED_LATER
from fedmllm.core.tensors import mean_delta
from fedmllm.core.types import ClientUpdate, Params, Round, Sent, State

if TYPE_CHECKING:
    from torch import Tensor


class Spectral(Aggregator):
    """Clients receive the leading r_k directions; the new global adapter is the best of its rank for a sum of products."""

    mixed_ranks: ClassVar[bool] = True
    no_server: ClassVar[str] = OF_PRODUCTS

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        return Sent(of_rank(params, at.rank(client)))

    @abstractmethod
    def terms(
        self, old: Pair, starts: Sequence[Pair], locals_: Sequence[Pair], counts: Sequence[int], at: Round
    ) -> list[Pair]:
        """Pairs whose products sum to the target of one module.

        Args:
            old: The global pair before the round.
            starts: What each client with rows received.
            locals_: The same clients' pairs after training.
            counts: Their rows.
            at: The round.
        """

    def cut(self, target: Pair, rank: int) -> Pair:
        """The target as a pair of that rank, padded with zeros if it needs fewer."""
        return truncated(target, rank)

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        starts: list[dict[str, Pair]] = []
        locals_: list[dict[str, Pair]] = []
        counts: list[int] = []

        def rest() -> Iterator[ClientUpdate]:
            """Each update without its factors, which are kept once: as the client's adapter."""
            for update in updates:
                if update.num_examples:
                    sent = self.sends(params, state, at, update.client)
                    starts.append(pairs(sent.start))
                    locals_.append(pairs(rebuilt(sent, update)))
                    counts.append(update.num_examples)
                yield replace(update, delta={n: update.delta[n] for n in others(params)})

        mean, after = mean_delta(rest()), {}
        for name, old in pairs(params).items():
            terms = self.terms(old, [s[name] for s in starts], [local.pop(name) for local in locals_], counts, at)
            after[name] = self.cut(concatenated(terms), old[1].shape[0])
        whole = {n: t + mean[n] if n in mean else t for n, t in params.items()} | unpaired(after, params)
        return revived({n: whole[n] for n in params}, at.seed, at.number), state


class FactorSplit(Spectral):
    """A choice of the factors of the product."""

    split: Annotated[Literal["balanced", "orthonormal"], ADDED_LATER] = "balanced"
    """Factors of the sum's SVD, U S V': (U sqrt S, sqrt S V'), or (U S, V'). Real sites need "orthonormal": sqrt S makes A
    so small that they refuse it (`lora_a` of their limits)."""

    def not_over_sites(self) -> str:
        if self.split == "orthonormal":
            return ""
        return (
            f'split: got "balanced" with {self.name}, which makes A so small that sites refuse it (allow.lora_a); allowed over '
            'real sites: "orthonormal"'
        )

    def cut(self, target: Pair, rank: int) -> Pair:
        if self.split == "balanced":
            return truncated(target, rank)
        u, s, vt = svd(target)
        return orthonormal(u, cut_at(s, rank), vt, rank, like=target)


class ProductSum(Spectral):
    """The sum of the clients' products, or of their changes."""

    weights: Literal["innovation", "plain"] = "innovation"
    """Whether the clients' changes are summed, or their products."""

    def terms(
        self, old: Pair, starts: Sequence[Pair], locals_: Sequence[Pair], counts: Sequence[int], at: Round
    ) -> list[Pair]:
        total = sum(counts)
        if self.weights == "plain":
            return [weighted(local, n / total) for local, n in zip(locals_, counts, strict=True)]
        changes = [
            part
            for start, local, n in zip(starts, locals_, counts, strict=True)
            for part in (weighted(local, n / total), weighted(start, -n / total))
        ]
        return [old, *changes]


class FlexLora(ProductSum, FactorSplit):
    """M = G + sum p_k (B_k A_k - start of k), G the global product: unbiased under unequal ranks (FedHL, arXiv:2505.18494).

    `weights = "plain"` is FlexLoRA as published (arXiv:2402.11505), M = sum p_k B_k A_k: there every round shrinks the
    directions above a rank by the share of the clients that lack them. With equal ranks the two agree.
    """

    name: Literal["flexlora"] = "flexlora"


class RaFLora(FactorSplit):
    """Directions are averaged level by level over the clients whose rank reaches them (raFLoRA, arXiv:2602.13486).

    Between consecutive ranks l < h: sum over r_k >= h of n_k / N_h B_k[:, l:h] A_k[l:h]. A level that no client of the round
    reaches keeps its value.
    """

    name: Literal["raflora"] = "raflora"

    def terms(
        self, old: Pair, starts: Sequence[Pair], locals_: Sequence[Pair], counts: Sequence[int], at: Round
    ) -> list[Pair]:
        levels = sorted({0, old[1].shape[0], *at.ranks})
        parts = []
        for low, high in itertools.pairwise(levels):
            able = [(local, n) for local, n in zip(locals_, counts, strict=True) if local[1].shape[0] >= high]
            reached = sum(n for _, n in able)
            for (b, a), share in [(local, n / reached) for local, n in able] or [(old, 1.0)]:
                parts.append(weighted((b[:, low:high], a[low:high]), share))
        return parts


class Florist(ProductSum):
    """FlexLoRA whose rank follows from the energy: per module the least rank with sum s_i^2 >= tau of all (arXiv:2506.09199).

    The split is (U S, V'). The rank of the clients' adapters, `lora.r`, is the upper limit. Below tau = 1 every round drops
    energy, also if no client learns anything.
    """

    name: Literal["florist"] = "florist"
    tau: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the energy that is kept."""

    def cut(self, target: Pair, rank: int) -> Pair:
        u, s, vt = svd(target)
        energy = s.pow(2).cumsum(0)
        needed = int((energy < self.tau * energy[-1]).sum()) + 1
        kept = min(rank, needed, len(s))
        return orthonormal(u, cut_at(s, kept), vt, rank, like=target)

    def result(self, params: Params, state: State) -> Params:
        """Without the directions that carry no weight: modules differ in rank."""
        own = {}
        for name, (b, a) in pairs(params).items():
            used = max(1, int((b.norm(dim=0) > 0).sum()))
            own[name] = (b[:, :used], a[:used])
        return {**params, **unpaired(own, params)}


class FedSvd(Aggregator):
    """Only B trains; every `period` rounds A becomes orthonormal: B A = U S V', A <- V', B <- U S (arXiv:2505.12805).

    Exact, and the product is the same before and after. While B = 0, A stays.
    """

    name: Literal["fedsvd"] = "fedsvd"
    no_server: ClassVar[str] = OF_PRODUCTS
    needs: ClassVar[frozenset[str]] = frozenset({"partial"})
    weighted_by: ClassVar[Literal["", "rows", "clients"]] = "rows"
    period: PositiveInt = 1
    """Rounds between two re-parametrizations."""

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        return Sent(params, trains=frozenset(params) - names_of(params, A))

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        after = added(params, mean_delta(updates))
        if at.number % self.period:
            return after, state
        turned = {name: self._turned(pair) for name, pair in pairs(after).items() if bool(pair[0].any())}
        return after | unpaired(turned, params), state

    def _turned(self, pair: Pair) -> Pair:
        u, s, vt = svd(pair)
        rank = pair[1].shape[0]
        return orthonormal(u, s[:rank], vt, rank, like=pair)


def orthonormal(u: Tensor, s: Tensor, vt: Tensor, rank: int, like: Pair) -> Pair:
    """The directions of the values `s` as the pair (U S, V'), padded with zeros up to a rank, in the type of `like`."""
    return of_width((u[:, : len(s)] * s, vt[: len(s)]), rank, like)
