"""Weighted numbers as integers modulo 2^64, whose sums are exact.

A word is `weight * round(value * 2^bits)`. The sum of K words divided by the sum of the weights is the weighted mean, within
2^-(bits + 1) of the exact one. Negative numbers are two's complement, so that a sum is read as a signed integer.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from fedmllm.core.errors import FedmllmError, Reason

Words: TypeAlias = "np.ndarray[Any, np.dtype[np.uint64]]"  # [W], little-endian where they travel
WORD_BYTES = 8


def to_words(values: np.ndarray[Any, Any], weight: int, bits: int, bound: float) -> Words:
    """Numbers as words.

    Args:
        values: Float array [P].
        weight: Of all of them, at least 1.
        bits: Digits after the binary point.
        bound: Largest absolute value.

    Returns:
        `weight * round(value * 2^bits)` modulo 2^64, [P].

    Raises:
        FedmllmError: A value is not finite or over the bound.
    """
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= bound:  # NaN, too
        raise FedmllmError(Reason(f"a number of its delta is over engine.secure.bound = {bound:g}", f"{largest:g}"))
    scaled = np.rint(values.astype(np.float64) * 2.0**bits).astype(np.int64)
    scaled *= weight
    return scaled.view(np.uint64)


def from_words(total: Words, bits: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The sum that words stand for: the representative nearest to 0, times 2^-bits, in float64 [P]."""
    return total.view(np.int64) / 2.0**bits


def word(value: int) -> Words:
    """One integer as a word [1]."""
    return np.array([value], dtype=np.int64).view(np.uint64)


def to_bytes(words: Words) -> bytes:
    """Words as they travel, little-endian."""
    return words.astype("<u8", copy=False).tobytes()


def from_bytes(data: bytes) -> Words:
    """Inverse of `to_bytes`.

    Raises:
        FedmllmError: The bytes are not a whole number of words.
    """
    if len(data) % WORD_BYTES:
        raise FedmllmError(f"{len(data)} bytes are not a whole number of words of {WORD_BYTES} bytes")
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)
