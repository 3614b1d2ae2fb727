"""Arithmetic over all LoRA tensors at once. A loop over keys is where one key gets a different sum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from fedmllm.types import ClientUpdate, FedmllmError, Params

if TYPE_CHECKING:
    from torch import Tensor


def same_names(*trees: Params) -> None:
    """Raise if the trees do not hold the same tensors in the same shapes, naming the first that differ."""
    shapes = [{name: tuple(t.shape) for name, t in tree.items()} for tree in trees]
    for other in shapes[1:]:
        odd = sorted(shapes[0].items() ^ other.items())
        if odd:
            raise FedmllmError(f"parameter names or shapes differ: {odd[:3]}")


def tree_map(f: Callable[..., Tensor], *trees: Params) -> Params:
    """`f` applied name by name. Raises FedmllmError where names or shapes differ."""
    same_names(*trees)
    return {name: f(*(tree[name] for tree in trees)) for name in trees[0]}


def zeros(params: Params) -> Params:
    """Zeros in the shapes of `params`."""
    return tree_map(lambda t: t.new_zeros(t.shape), params)


def subtract(a: Params, b: Params) -> Params:
    """`a - b`, name by name."""
    return tree_map(lambda x, y: x - y, a, b)


def mean_delta(updates: Iterable[ClientUpdate]) -> Params:
    """sum_k (n_k / sum n) * delta_k, summed in client order so that the bytes do not depend on who answered first.

    Raises:
        FedmllmError: no update, or no update has a row.
    """
    in_order = sorted(updates, key=lambda u: u.client)
    total = sum(u.num_examples for u in in_order)
    if not total:
        raise FedmllmError("nothing to average: no client trained on any row this round")
    weighted = [(u.num_examples / total, u.delta) for u in in_order]
    return weighted_sum(weighted)


def weighted_sum(terms: Sequence[tuple[float, Params]]) -> Params:
    """sum_k w_k * x_k, in the order given."""
    total = zeros(terms[0][1])
    for weight, params in terms:
        total = tree_map(lambda t, p, w=weight: t + w * p, total, params)
    return total


def norm(params: Params) -> float:
    """L2 norm over all tensors together."""
    return float(sum(float(t.double().pow(2).sum()) for t in params.values()) ** 0.5)


def num_bytes(params: Params) -> int:
    """Bytes of all tensors as they are held."""
    return sum(t.numel() * t.element_size() for t in params.values())


def is_finite(params: Params) -> bool:
    """False where any value is NaN or infinite."""
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
    """Inverse of `flatten` for tensors shaped as in `like`, which also gives the order of the names."""
    sizes = {name: like[name].numel() for name in sorted(like)}
    if flat.ndim != 1 or flat.numel() != sum(sizes.values()):
        raise FedmllmError(f"flat vector has shape {tuple(flat.shape)}; the manifest needs [{sum(sizes.values())}]")
    pieces = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
    return {name: pieces[name].reshape(like[name].shape).clone() for name in like}


def digest(params: Params) -> str:
    """sha256 over names, shapes and bytes, in manifest order."""
    h = hashlib.sha256(json.dumps(manifest(params)).encode())
    for name in sorted(params):
        h.update(params[name].detach().float().contiguous().numpy().tobytes())
    return h.hexdigest()
