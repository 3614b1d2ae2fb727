"""Numbers as integers whose sums are exact, modulo a power of 2.

A word is `round(weight * value * 2^bits)`. The sum of K words divided by the sum of the weights is the weighted mean, within
2^-(bits + 1) K / (sum of the weights) of the exact one. Negative numbers are two's complement, so that a sum is read as a
signed integer. Words are computed with modulo 2^64; where they travel they have the bits that their sums need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fedmllm.config.engine import WordBits
from fedmllm.core.errors import FedmllmError, Reason

Words: TypeAlias = "np.ndarray[Any, np.dtype[np.uint64]]"  # [W]
WORD_BYTES = 8


@dataclass(frozen=True)
class WordForm:
    """Form in which words travel, little-endian: numbers of few bits, then counts of 64.

    Words of 48 bits are their lower 32 bits, one after another, and then their upper 16.

    Attributes:
        num_numbers: P.
        num_counts: C.
        word_bits: Of a number.
    """

    num_numbers: int
    num_counts: int
    word_bits: WordBits

    @property
    def num_bytes(self) -> int:
        """Bytes of all words."""
        return self.num_numbers * self.word_bits // 8 + self.num_counts * WORD_BYTES

    def to_bytes(self, words: Words) -> bytes:
        """Words [P + C] as they travel; of a number the upper bits are dropped."""
        whole = words.astype("<u8", copy=False)
        numbers, counts = whole[: self.num_numbers], whole[self.num_numbers :]
        return b"".join([*(part.tobytes() for part in self._parts(numbers)), counts.tobytes()])

    def from_bytes(self, data: bytes) -> Words:
        """Inverse of `to_bytes`: words [P + C], the dropped bits 0.

        Raises:
            FedmllmError: There are more or fewer bytes.
        """
        if len(data) != self.num_bytes:
            raise FedmllmError(f"{len(data)} bytes are not the {self.num_bytes} of {self.num_numbers} masked numbers")
        whole, at = np.zeros(self.num_numbers + self.num_counts, "<u8"), 0
        for part in (*self._parts(whole[: self.num_numbers]), whole[self.num_numbers :]):
            part[:] = np.frombuffer(data, part.dtype, len(part), at)
            at += len(part) * part.itemsize
        return whole.astype(np.uint64, copy=False)

    def _parts(self, numbers: Words) -> list[np.ndarray[Any, Any]]:
        """Views of the bits that travel."""
        if self.word_bits == 8 * WORD_BYTES:
            return [numbers]
        lower = numbers.view("<u4")[::2]
        return [lower] if self.word_bits == 32 else [lower, numbers.view("<u2")[2::4]]


def to_words(values: np.ndarray[Any, Any], weight: int, bits: int, bound: float) -> Words:
    """Numbers as words.

    Args:
        values: Float array [P].
        weight: Of all of them, at least 1.
        bits: Digits after the binary point.
        bound: Largest absolute value.

    Returns:
        `round(weight * value * 2^bits)` modulo 2^64, [P].

    Raises:
        FedmllmError: A value is not finite or over the bound.
    """
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= bound:  # NaN, too
        raise FedmllmError(Reason(f"a number of its delta is over engine.secure.bound = {bound:g}", f"{largest:g}"))
    scaled = values.astype(np.float64)
    scaled *= weight * 2.0**bits  # exact: a float32 has 24 digits, a weight 20
    np.rint(scaled, out=scaled)
    return scaled.astype(np.int64).view(np.uint64)


def from_words(total: Words, bits: int, word_bits: WordBits = 64) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The sum that words stand for: the representative modulo 2^word_bits nearest to 0, times 2^-bits, in float64 [P]."""
    above = 8 * WORD_BYTES - word_bits
    lifted = (total << np.uint64(above)).view(np.int64) >> above if above else total.view(np.int64)
    return lifted / 2.0**bits


def word(value: int) -> Words:
    """One integer as a word [1]."""
    return np.array([value], dtype=np.int64).view(np.uint64)
