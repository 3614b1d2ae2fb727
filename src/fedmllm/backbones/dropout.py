"""Dropout by row seed instead of a random stream.

A token's mask in a module is a window of one long fixed strip of coin flips. The start of the window is a hash of (row
seed, token position, module), the same integers on CPU and GPU. So a row drops the same values alone, in any batch, padded
or recomputed by gradient checkpointing, and a mask costs a gather.

Shapes: B rows, L tokens, C channels.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache

import torch
from torch import Tensor, nn

STRIP_BITS = 22  # windows begin anywhere in 4 million flips: two tokens of a step rarely share a flip
WIDEST = 1 << 16  # channels


def module_key(name: str) -> int:
    """Key of a module in `dropout_mask`: stable over runs, machines and target lists."""
    return zlib.crc32(name.encode())


def dropout_mask(seeds_B: Tensor, module: int, shape_BLC: tuple[int, int, int], p: float) -> Tensor:
    """True for each value that is not dropped, with probability 1 - p (in steps of 1/65536).

    Args:
        seeds_B: int64, one seed a row.
        module: `module_key` of the layer.
        shape_BLC: Shape of the input; the token position is the index along L, so pad on the right.
        p: Probability to drop, 0 <= p < 1.

    Returns:
        bool [B, L, C].
    """
    _, num_tokens, num_channels = shape_BLC
    return _windows(token_keys(seeds_B, num_tokens), module, num_channels, p)


def token_keys(seeds_B: Tensor, num_tokens: int) -> Tensor:
    """int64 [B, L], a hash of (row seed, position)."""
    return _mix64(_mix64(seeds_B)[:, None] + torch.arange(num_tokens, device=seeds_B.device))


def _windows(key_BL: Tensor, module: int, num_channels: int, p: float) -> Tensor:
    # the upper bits of a product depend on all bits of the key
    start_BL = ((key_BL * _odd(module)) >> (64 - STRIP_BITS)) & ((1 << STRIP_BITS) - 1)
    strip = _strip(p, str(key_BL.device))
    return strip.as_strided((1 << STRIP_BITS, num_channels), (1, 1))[start_BL]


@cache
def _odd(module: int) -> int:
    return int(_mix64(torch.tensor(module))) | 1


@lru_cache(maxsize=16)  # 4 MB each; an engine or a model may have several devices
def _strip(p: float, device: str) -> Tensor:
    """Coin flips, bool [2^STRIP_BITS + WIDEST]; one 64-bit hash serves four."""
    numbers = _mix64(torch.arange(1, ((1 << STRIP_BITS) + WIDEST) // 4 + 1))
    return (numbers.view(torch.int16) >= round(p * 65536) - 32768).to(device)


def _mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose products wrap; masks make right shifts logical."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47  # 0xbf58476d1ce4e5b9
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15  # 0x94d049bb133111eb
    return x ^ ((x >> 31) & ((1 << 33) - 1))


class Seeds:
    """Seeds of the rows in the current forward pass; None = dropout is off. One object for all layers of a model."""

    def __init__(self) -> None:
        self.current: Tensor | None = None  # [B] int64, on the model's device
        self._keys_BL: Tensor | None = None  # of `current`, made once a pass for all layers

    @contextmanager
    def set(self, seeds_B: Tensor | None) -> Iterator[None]:
        """`seeds_B` [B] are the current seeds in this block."""
        before = self.current, self._keys_BL
        self.current, self._keys_BL = seeds_B, None
        try:
            yield
        finally:
            self.current, self._keys_BL = before

    def keys(self, num_tokens: int) -> Tensor:
        """`token_keys` of the current rows."""
        assert self.current is not None
        if self._keys_BL is None or self._keys_BL.shape[1] != num_tokens:
            self._keys_BL = token_keys(self.current, num_tokens)
        return self._keys_BL


class RowDropout(nn.Module):
    """Replacement for PEFT's nn.Dropout. Ignores train() and eval(): `Seeds` alone turn it on."""

    def __init__(self, p: float, module: int, seeds: Seeds) -> None:
        super().__init__()
        self.p, self.module, self.seeds = p, module, seeds

    def mask(self, x_BLC: Tensor) -> tuple[Tensor | None, float]:
        """(values that are not dropped, their factor); (None, 1) if dropout is off."""
        if self.seeds.current is None or self.p == 0:
            return None, 1.0
        _, num_tokens, num_channels = x_BLC.shape
        key_BL = self.seeds.keys(num_tokens).to(x_BLC.device)  # of a layer on another device, if there are several
        return _windows(key_BL, self.module, num_channels, self.p), 1 / (1 - self.p)

    def forward(self, x_BLC: Tensor) -> Tensor:
        keep_BLC, gain = self.mask(x_BLC)
        return x_BLC if keep_BLC is None else x_BLC * keep_BLC * gain

    def extra_repr(self) -> str:
        return f"p={self.p}, by row seed"


def seed_tensor(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Python integers of any size as int64 [B]."""
    return torch.tensor([seed & ((1 << 63) - 1) for seed in seeds], dtype=torch.int64, device=device)
