"""Layout of a site's words: delta, weight, metrics.

A metric is two words, value and count. A site that keeps one to itself sends two random words, so that it cannot be read: a sum
over the other sites alone could be one site's value. `loss` is weighted as the delta is.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmllm.config.engine import MOST_ROWS
from fedmllm.core.errors import FedmllmError, Reason
from fedmllm.flower.secure.fixed_point import WORD_BYTES, WordForm, Words, from_words, to_words, word
from fedmllm.flower.secure.terms import Terms

SUMMED_METRICS = ("loss", "num_steps", "num_tokens", "time_s")
WEIGHTED = ("loss",)
METRIC_BITS = 16
NUM_COUNTS = 1 + 2 * len(SUMMED_METRICS)  # words after the delta's
LARGEST_METRIC = 2.0**20  # of a weighted one; 50 sites of 2^20 rows then stay below 2^62
LARGEST_TOTAL = 2.0**40  # of one that counts once


@dataclass(frozen=True)
class Summed:
    """A secure sum, opened."""

    mean: np.ndarray[Any, np.dtype[np.float32]]  # of the deltas, weighted, [P]
    weight: int  # sum of the weights: rows, or sites
    metrics: dict[str, float]  # those that all sites gave


def word_form(num_params: int, terms: Terms) -> WordForm:
    """The form of a site's words.

    Args:
        num_params: P.
        terms: Of the sum.
    """
    return WordForm(num_params, NUM_COUNTS, terms.word_bits)


def pack_words(delta: np.ndarray[Any, Any], num_examples: int, metrics: Mapping[str, float], terms: Terms) -> Words:
    """One site's words, before its masks.

    Args:
        delta: [P].
        num_examples: Rows of the site.
        metrics: Those that may leave it.
        terms: Of the sum.

    Raises:
        FedmllmError: A number is over its bound, or the site has no row or too many.
    """
    most = _most_rows(terms)
    if not 1 <= num_examples <= most:
        said = f"its number of rows is not of 1 to {most}, of which secure aggregation makes sums"
        raise FedmllmError(Reason(said, f"{num_examples} rows"))
    size = float(np.sqrt(np.square(delta, dtype=np.float64).sum()))
    if terms.max_norm and not size <= terms.max_norm:
        said = f"the norm of its delta is over update_filter.max_norm = {terms.max_norm:g}"
        raise FedmllmError(Reason(said, f"{size:g}"))
    weight = num_examples if terms.weights == "rows" else 1
    parts = [to_words(delta, weight, terms.bits, terms.bound), word(weight)]
    for name in SUMMED_METRICS:
        value, own = metrics.get(name, math.nan), weight if name in WEIGHTED else 1
        largest = LARGEST_METRIC if name in WEIGHTED else LARGEST_TOTAL
        if abs(value) <= largest:  # NaN is not
            parts += [word(own * round(value * 2**METRIC_BITS)), word(1)]
        else:
            parts.append(np.frombuffer(secrets.token_bytes(2 * WORD_BYTES), np.uint64))
    return np.concatenate(parts)


def unpack_sum(total: Words, num_params: int, num_sites: int, terms: Terms) -> Summed:
    """Read a sum.

    Args:
        total: [W], the sum modulo 2^64 of all sites' words.
        num_params: P.
        num_sites: Sites of the sum.
        terms: Of the sum.

    Raises:
        FedmllmError: The numbers cannot be a sum of as many sites: masks did not cancel, for example because a site was
            restarted during the round.
    """
    if len(total) != num_params + NUM_COUNTS:
        raise FedmllmError(f"the sum has {len(total)} words, not {num_params + NUM_COUNTS}")
    weight = int(total[num_params : num_params + 1].view(np.int64)[0])
    most = num_sites * (_most_rows(terms) if terms.weights == "rows" else 1)
    values = from_words(total[:num_params], terms.bits, terms.word_bits)
    largest = terms.bound * weight + num_sites * 2.0 ** -(terms.bits + 1)
    if not num_sites <= weight <= most or float(np.abs(values).max(initial=0.0)) > largest:
        raise FedmllmError("the masks do not cancel: the sites did not use the same keys")
    metrics: dict[str, float] = {}
    for i, name in enumerate(SUMMED_METRICS):
        at = num_params + 1 + 2 * i
        count = int(total[at + 1 : at + 2].view(np.int64)[0])
        value = float(from_words(total[at : at + 1], METRIC_BITS)[0])
        if count == num_sites:  # otherwise a site kept it to itself, and the value is a random number
            metrics[name] = value / weight if name in WEIGHTED else value
    return Summed((values / weight).astype(np.float32), weight, metrics)


def _most_rows(terms: Terms) -> int:
    return terms.rows if terms.weights == "rows" else MOST_ROWS
