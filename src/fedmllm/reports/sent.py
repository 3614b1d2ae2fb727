"""Bytes that a run sent, from its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DOWN = ("down_bytes", "completion_down_bytes")
UP = ("up_bytes", "completion_up_bytes")
BEFORE_TRAINING = ("completion_up_bytes", "completion_down_bytes")  # of a completion that learns


def sent_bytes(row: Mapping[str, Any], keys: Sequence[str] = (*UP, *DOWN)) -> float:
    """Return the bytes of a run, those of a completion that is learned before training included.

    Args:
        row: Of the run's summary. Keys that it lacks count 0.
        keys: Kinds of bytes: `UP`, `DOWN`, or `BEFORE_TRAINING`.
    """
    return sum(float(row.get(key) or 0) for key in keys)
