"""Arithmetic of LoRA products B A without D x C matrices.

Shapes: D channels out, C channels in, r rank, q the sum of several ranks. B [D, r], A [r, C]. A and B are distinguished
by their names, never by shape. The scaling s = alpha / r is the same for every client, so it appears nowhere here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeAlias

from fedmllm.core.errors import FedmllmError
from fedmllm.core.rng import torch_stream
from fedmllm.core.tensors import same_names
from fedmllm.core.types import ClientUpdate, Params, Sent

if TYPE_CHECKING:
    from torch import Tensor

A, B = ".lora_A.", ".lora_B."
Pair: TypeAlias = "tuple[Tensor, Tensor]"  # (B [D, r], A [r, C])
OF_PRODUCTS = (
    "aggregates the clients' products B A, whose factors have other coordinates in every round: an optimizer's moments of them "
    "have no meaning, nor have distances between them"
)  # why a method has no `server`
DEAD = 1e-7  # relative singular value at and below which a direction carries no weight


def names_of(params: Params, factor: str) -> frozenset[str]:
    """Names of the A (`factor` = A) or B tensors."""
    return frozenset(name for name in params if factor in name)


def others(params: Params) -> frozenset[str]:
    """Names of tensors that are not LoRA factors, from `lora.train_extra`: every method averages them."""
    return frozenset(name for name in params if A not in name and B not in name)


def pairs(params: Params) -> dict[str, Pair]:
    """Name of A -> (B, A), in the order of the names of A.

    Raises:
        FedmllmError: an A has no B.
    """
    found = {}
    for name, a in params.items():
        if A in name:
            partner = name.replace(A, B)
            if partner not in params:
                raise FedmllmError(f"{name} has no {partner} next to it")
            found[name] = (params[partner], a)
    return found


def unpaired(products: Mapping[str, Pair], like: Params) -> Params:
    """Inverse of `pairs`: tensors by name, in the order of `like`, for the modules in `products`."""
    tree: Params = {}
    for name, (b, a) in products.items():
        tree |= {name: a, name.replace(A, B): b}
    return {name: tree[name] for name in like if name in tree}


def rebuilt(sent: Sent, update: ClientUpdate) -> Params:
    """A client's adapter after training: the values that it received plus its delta.

    Raises:
        FedmllmError: the delta's names or shapes are not those that the client returns.
    """
    same_names(sent.returned(), update.delta)
    return {n: t + update.delta[n] if n in update.delta else t for n, t in sent.start.items()}


def of_rank(params: Params, rank: int) -> Params:
    """The first `rank` directions of an adapter: views. A rank of 0, or one not below the adapter's, leaves it as it is."""
    if not rank:
        return params
    return {n: t[:, :rank] if B in n else t[:rank] if A in n else t for n, t in params.items()}


def rank_of(params: Params) -> int:
    """The largest rank of an adapter's modules; 0 without any."""
    return max((t.shape[0] for name, t in params.items() if A in name), default=0)


def concatenated(parts: Iterable[Pair]) -> Pair:
    """One pair whose product is the sum of the products: ([B_1, B_2, ..], [A_1; A_2; ..])."""
    import torch

    b, a = zip(*parts, strict=True)
    return torch.cat(list(b), dim=1), torch.cat(list(a), dim=0)


def weighted(pair: Pair, weight: float) -> Pair:
    """A pair with `weight` times the product, split evenly over both factors."""
    root = math.sqrt(abs(weight))
    return pair[0] * math.copysign(root, weight), pair[1] * root


def svd(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of B A in float64 on the CPU: (U [D, m], S [m], V' [m, C]), m = min(q, D, C).

    QR of both factors, then SVD of the q x q core. In each column of U the entry of largest magnitude is positive.
    """
    import torch

    b, a = (t.to("cpu", torch.float64) for t in pair)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    left, right = q_b @ u, vt @ q_a.mT
    sign = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
    sign[sign == 0] = 1.0
    return left * sign, s, right * sign.mT


_CUTS: ContextVar[list[tuple[float, float]] | None] = ContextVar("cuts", default=None)


@contextmanager
def watched_cuts() -> Iterator[list[tuple[float, float]]]:
    """Collect what every `cut_at` within the block loses: (energy lost, energy before), energy = sum of s_i^2."""
    cuts: list[tuple[float, float]] = []
    token = _CUTS.set(cuts)
    try:
        yield cuts
    finally:
        _CUTS.reset(token)


def truncation_error(cuts: Sequence[tuple[float, float]]) -> float | None:
    """Relative Frobenius error of all truncations together, sqrt(lost / before); None if nothing was truncated."""
    before = sum(energy for _, energy in cuts)
    return math.sqrt(sum(lost for lost, _ in cuts) / before) if before else None


def cut_at(s: Tensor, rank: int) -> Tensor:
    """The leading singular values. What the others lose goes to `watched_cuts`, and so into the round's record.

    Every aggregator that drops directions of its result does so through this function.
    """
    energy = s.pow(2)
    if (cuts := _CUTS.get()) is not None:
        cuts.append((float(energy[rank:].sum()), float(energy.sum())))
    return s[:rank]


def truncated(pair: Pair, rank: int) -> Pair:
    """The best approximation of B A of a rank, split as (U sqrt S, sqrt S V'); zeros where the product has less rank."""
    u, s, vt = svd(pair)
    return _balanced(u, cut_at(s, rank), vt, rank, pair)


def compacted(pair: Pair, rank: int) -> Pair:
    """As `truncated`, for a product that has no higher rank: nothing is lost."""
    u, s, vt = svd(pair)
    return _balanced(u, s[:rank], vt, rank, pair)


def _balanced(u: Tensor, s: Tensor, vt: Tensor, rank: int, like: Pair) -> Pair:
    root = s.sqrt()
    return of_width((u[:, :rank] * root, root[:, None] * vt[:rank]), rank, like)


def of_width(pair: Pair, rank: int, like: Pair) -> Pair:
    """A pair with zeros appended up to a rank, in the type of `like`."""
    b, a = pair
    short = rank - a.shape[0]
    if short > 0:
        b, a = _appended(b, short, 1), _appended(a, short, 0)
    return b.to(like[0].dtype), a.to(like[1].dtype)


def _appended(t: Tensor, number: int, dim: int) -> Tensor:
    import torch

    shape = list(t.shape)
    shape[dim] = number
    return torch.cat([t, t.new_zeros(shape)], dim=dim)


def revived(params: Params, seed: int, round_: int, least: float = DEAD) -> Params:
    """`params` with every dead direction made trainable: B's column 0, A's row drawn uniformly from +-1 / sqrt C.

    A direction of zero in both factors has zero gradients for ever.

    Args:
        params: An adapter.
        seed: Of the experiment.
        round_: Number of the round.
        least: A direction of at most this share of the largest one's size is dead: its product is lost. 0 = only one that is
            zero in both factors, so that the product is untouched and a B that has not been trained yet keeps its A.
    """
    import torch

    out = dict(params)
    for name, (b, a) in pairs(params).items():
        size = b.norm(dim=0).double() * a.norm(dim=1).double()
        dead = size <= least * size.max() if least else (b == 0).all(dim=0) & (a == 0).all(dim=1)
        if bool(dead.any()):
            bound = 1 / math.sqrt(a.shape[1])
            fresh = torch.empty(a.shape, dtype=a.dtype)
            fresh.uniform_(-bound, bound, generator=torch_stream(seed, "fresh", round_, name))
            out[name] = torch.where(dead[:, None], fresh, a)
            out[name.replace(A, B)] = torch.where(dead[None, :], torch.zeros((), dtype=b.dtype), b)
    return out


def product_norm(parts: Sequence[Pair]) -> float:
    """Frobenius norm of the sum of products, by the q x q Gram matrices: |B A|^2 = sum of (B'B) * (A A').

    In float64; differences below 1e-8 of the summands are lost to cancellation.
    """
    b, a = concatenated(parts)
    b, a = b.double(), a.double()
    return math.sqrt(max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum())))


def shares(updates: Sequence[ClientUpdate]) -> list[float]:
    """p_k = n_k / sum n of each update."""
    total = sum(update.num_examples for update in updates)
    return [update.num_examples / total for update in updates]
