"""Named, independent random streams."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int, purpose: str, *keys: int | str) -> int:
    """63-bit seed that depends on every argument: (seed, "train", round, client)."""
    text = "\x1f".join([str(seed), purpose, *(str(key) for key in keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """The random stream of one purpose: same arguments, same numbers, whatever ran before."""
    return np.random.Generator(np.random.PCG64(stream_seed(seed, purpose, *keys)))


def torch_stream(seed: int, purpose: str, *keys: int | str, device: str = "cpu") -> torch.Generator:
    """As `stream`, for tensors on `device`."""
    import torch

    return torch.Generator(device).manual_seed(stream_seed(seed, purpose, *keys))
