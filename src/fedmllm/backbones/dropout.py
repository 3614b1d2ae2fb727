"""Dropout without a random stream: a row's mask is a function of its own seed, so it never depends on the batch.

A mask is a hash of (row seed, module, token position, channel), the same integers on CPU and GPU. So a row that is
trained alone, beside other rows, padded, or recomputed by gradient checkpointing drops the same values.

Shapes: B rows, L tokens, C channels.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_M31 = (1 << 31) - 1


def module_key(name: str) -> int:
    """The number under which `dropout_mask` knows a module: stable over runs, machines and target lists."""
    return zlib.crc32(name.encode())


def dropout_mask(seeds_B: Tensor, module: int, shape_BLC: tuple[int, int, int], p: float) -> Tensor:
    """Which values to keep, bool [B, L, C], each kept with probability 1 - p (in steps of 1/65536).

    Args:
        seeds_B: int64, one seed a row.
        module: `module_key` of the layer.
        shape_BLC: Shape of what is dropped; the token position is the index along L, so pad on the right.
        p: Probability to drop, 0 <= p < 1.
    """
    num_rows, num_tokens, num_channels = shape_BLC
    device = seeds_B.device
    position_L = torch.arange(num_tokens, device=device)
    key_BL = _mix64(_mix64(seeds_B + module)[:, None] + position_L).to(torch.int32)
    channel_C = _mix64(1 + torch.arange((num_channels + 1) // 2, device=device)).to(torch.int32)
    # one 32-bit hash serves two channels: the last rounds run over [B, L, C / 2] and are most of the cost
    bits = _mix32_(key_BL[:, :, None] ^ channel_C)
    half = bits.view(torch.int16).reshape(num_rows, num_tokens, -1)[:, :, :num_channels]
    return half >= round(p * 65536) - 32768


def _mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose products wrap; right shifts are made logical by masks."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47  # 0xbf58476d1ce4e5b9
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15  # 0x94d049bb133111eb
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _mix32_(x: Tensor) -> Tensor:
    """lowbias32 (Chris Wellons) on int32, in place."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= -0x7B935975  # 0x846ca68b
    x ^= (x >> 16) & 0xFFFF
    return x


class Seeds:
    """The seeds of the rows that are in the model now; None = dropout is off. One for all layers of a model."""

    def __init__(self) -> None:
        self.current: Tensor | None = None  # [B] int64, on the model's device

    @contextmanager
    def set(self, seeds_B: Tensor | None) -> Iterator[None]:
        before, self.current = self.current, seeds_B
        try:
            yield
        finally:
            self.current = before


class RowDropout(nn.Module):
    """Stands where PEFT puts nn.Dropout. Ignores train() and eval(): `Seeds` alone turn it on."""

    def __init__(self, p: float, module: int, seeds: Seeds) -> None:
        super().__init__()
        self.p, self.module, self.seeds = p, module, seeds

    def mask(self, x_BLC: Tensor) -> tuple[Tensor | None, float]:
        """(what to keep, what to multiply it with); (None, 1) where dropout is off."""
        seeds_B = self.seeds.current
        if seeds_B is None or self.p == 0:
            return None, 1.0
        rows, tokens, channels = x_BLC.shape
        return dropout_mask(seeds_B, self.module, (rows, tokens, channels), self.p), 1 / (1 - self.p)

    def forward(self, x_BLC: Tensor) -> Tensor:
        keep_BLC, gain = self.mask(x_BLC)
        return x_BLC if keep_BLC is None else x_BLC * keep_BLC * gain

    def extra_repr(self) -> str:
        return f"p={self.p}, by row seed"


def seed_tensor(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Python integers of any size as int64 [B]."""
    return torch.tensor([seed & ((1 << 63) - 1) for seed in seeds], dtype=torch.int64, device=device)
