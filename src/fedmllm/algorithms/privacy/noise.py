"""Random numbers from a secret key.

The streams of `core.rng` are public: their seed stands in every record and every request, so noise drawn from them can be
subtracted by whoever reads one. These are the output of SHAKE-256 over a key of 32 bytes.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

NOISE_KEY_BYTES = 32


def simulation_key(seed: int) -> bytes:
    """A key that is not secret, for simulated noise: whoever knows the seed can compute it.

    Args:
        seed: Of the experiment.

    Returns:
        32 bytes.
    """
    return hashlib.sha256(f"fedmllm simulated noise {seed}".encode()).digest()


def keyed_uniforms(key: bytes, count: int, *purpose: str | int | bytes) -> NDArray[np.float64]:
    """Uniform numbers in (0, 1), 53 bits each.

    Args:
        key: `NOISE_KEY_BYTES` bytes.
        count: How many.
        purpose: What the numbers are for: other words, other numbers.

    Returns:
        float64 [count].

    Raises:
        ValueError: The key has another length.
    """
    if len(key) != NOISE_KEY_BYTES:
        raise ValueError(f"key: got {len(key)} bytes; {NOISE_KEY_BYTES} are required")
    parts = [part if isinstance(part, bytes) else str(part).encode() for part in purpose]
    seed = key + b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    words = np.frombuffer(hashlib.shake_256(seed).digest(8 * count), dtype="<u8")
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def keyed_normals(key: bytes, count: int, *purpose: str | int | bytes) -> NDArray[np.float64]:
    """Standard normal numbers by the inverse of the distribution function.

    Args:
        key: `NOISE_KEY_BYTES` bytes.
        count: How many.
        purpose: What the numbers are for: other words, other numbers.

    Returns:
        float64 [count].
    """
    from scipy.special import ndtri

    normals: NDArray[np.float64] = ndtri(keyed_uniforms(key, count, *purpose))
    return normals
