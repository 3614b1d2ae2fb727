"""Arithmetic over all LoRA tensors at once.

Use these functions instead of hand-written loops over parameter names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedmllm.core.errors import FedmllmError, NothingToAverage
from fedmllm.core.types import ClientUpdate, Params

if TYPE_CHECKING:
    from torch import Tensor


def same_names(*trees: Params) -> None:
    """Check that all trees have the same names and shapes.

    Raises:
        FedmllmError: They do not; it names the first that differ.
    """
    shapes = [{name: tuple(t.shape) for name, t in tree.items()} for tree in trees]
    for other in shapes[1:]:
        odd = sorted(shapes[0].items() ^ other.items())
        if odd:
            raise FedmllmError(f"parameter names or shapes differ: {odd[:3]}")


def tree_map(f: Callable[..., Tensor], *trees: Params) -> Params:
    """`f` applied name by name.

    Raises:
        FedmllmError: Names or shapes differ.
    """
    same_names(*trees)
    return {name: f(*(tree[name] for tree in trees)) for name in trees[0]}


def zeros(params: Params) -> Params:
    """Zeros in the shapes of `params`."""
    return tree_map(lambda t: t.new_zeros(t.shape), params)


def rank_dim(name: str) -> int | None:
    """The dimension of a LoRA tensor that is its rank: 0 of A [r, C], 1 of B [D, r]; None for any other tensor."""
    return 0 if ".lora_A." in name else 1 if ".lora_B." in name else None


def fits(name: str, shape: Sequence[int], like: Sequence[int]) -> bool:
    """True if a tensor has the shape `like`, or a smaller rank than that."""
    dim = rank_dim(name)
    return len(shape) == len(like) and all(
        have == want or (i == dim and 0 <= have < want) for i, (have, want) in enumerate(zip(shape, like, strict=True))
    )


def padded(params: Params, like: Mapping[str, Tensor]) -> Params:
    """`params` with zero rows of A and zero columns of B appended, up to the ranks of `like`; names of `params` only.

    Zeros in both factors have zero gradients, so an adapter padded to a larger rank trains to the same values.

    Raises:
        FedmllmError: `like` lacks a name, or a shape differs in more than a smaller rank.
    """
    out = {}
    for name, t in params.items():
        shape = tuple(like[name].shape) if name in like else ()
        if not fits(name, t.shape, shape):
            raise FedmllmError(f"parameter names or shapes differ: {name} {list(t.shape)} does not fit {list(shape)}")
        if shape != tuple(t.shape):
            wide = t.new_zeros(shape)
            wide[tuple(slice(n) for n in t.shape)] = t
            t = wide
        out[name] = t
    return out


def cut(params: Params, like: Mapping[str, Tensor]) -> Params:
    """Inverse of `padded`: the leading part of each tensor, in the shapes of `like`."""
    return {name: t[tuple(slice(n) for n in like[name].shape)].contiguous() for name, t in params.items()}


def subtract(a: Params, b: Params) -> Params:
    """`a - b`, name by name."""
    return tree_map(lambda x, y: x - y, a, b)


def mean_delta(updates: Iterable[ClientUpdate]) -> Params:
    """FedAvg's mean (arXiv:1602.05629): (sum_k n_k delta_k) / (sum_k n_k).

    Args:
        updates: In ascending order of clients; read once, so that memory does not grow with the cohort.

    Raises:
        NothingToAverage: No update has a row.
        FedmllmError: The order is another one: a float sum depends on it, and the bytes must not depend on the order of
            arrival.
    """
    return _mean((u.client, float(u.num_examples), u.delta) for u in updates)


def plain_mean_delta(updates: Iterable[ClientUpdate]) -> Params:
    """(sum_k delta_k) / K over the clients that have rows; otherwise as `mean_delta`."""
    return _mean((u.client, 1.0, u.delta) for u in updates if u.num_examples)


def _mean(terms: Iterable[tuple[int, float, Params]]) -> Params:
    total: Params | None = None
    total_weight, last = 0.0, -1
    for client, weight, delta in terms:
        if client <= last:
            raise FedmllmError(f"client {client} came after client {last}; updates must be in ascending client order")
        last = client
        if weight:
            weighted = {name: weight * d for name, d in delta.items()}
            total = weighted if total is None else tree_map(lambda t, d: t + d, total, weighted)
            total_weight += weight
    if total is None:
        raise NothingToAverage("nothing to average: no client trained on any row this round")
    return {name: t / total_weight for name, t in total.items()}


def norm(params: Params) -> float:
    """L2 norm over all tensors together."""
    return float(sum(float(t.double().pow(2).sum()) for t in params.values()) ** 0.5)


def num_bytes(params: Params) -> int:
    """Bytes of all tensors in their own types."""
    return sum(t.numel() * t.element_size() for t in params.values())


def lora_bytes(params: Params) -> int:
    """As `num_bytes`, of the LoRA tensors alone: without the modules of `lora.train_extra`."""
    return num_bytes({name: t for name, t in params.items() if "lora_" in name})


def is_finite(params: Params) -> bool:
    """False if any value is NaN or infinite."""
    return all(bool(t.isfinite().all()) for t in params.values())


def manifest(params: Params) -> list[tuple[str, list[int]]]:
    """(name, shape) in sorted order: the layout in which `flatten` packs."""
    return [(name, list(params[name].shape)) for name in sorted(params)]


def manifest_digest(params: Params) -> str:
    """sha256 of the manifest: two sites that agree on it can exchange flat vectors."""
    return hashlib.sha256(json.dumps(manifest(params)).encode()).hexdigest()


def flatten(params: Params) -> Tensor:
    """All tensors as one float32 vector [P], in manifest order."""
    import torch

    return torch.cat([params[name].detach().float().reshape(-1) for name in sorted(params)])


def unflatten(flat: Tensor, like: Params) -> Params:
    """Inverse of `flatten` for the shapes and the order of names of `like`.

    Raises:
        FedmllmError: The vector has another length.
    """
    sizes = {name: like[name].numel() for name in sorted(like)}
    if flat.ndim != 1 or flat.numel() != sum(sizes.values()):
        raise FedmllmError(f"flat vector has shape {tuple(flat.shape)}; the manifest needs [{sum(sizes.values())}]")
    pieces = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))  # type: ignore[no-untyped-call]
    return {name: pieces[name].reshape(like[name].shape).clone() for name in like}


def params_digest(params: Params) -> str:
    """sha256 over names, shapes and bytes, in manifest order."""
    h = hashlib.sha256(json.dumps(manifest(params)).encode())
    for name in sorted(params):
        h.update(params[name].detach().float().contiguous().numpy().tobytes())
    return h.hexdigest()
