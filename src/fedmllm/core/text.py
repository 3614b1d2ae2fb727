"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def bytes_text(num_bytes: float) -> str:
    """1,234,567 -> "1.2 MB"; decimal units: 1 kB = 1000 B."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def flat_keys(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat_keys(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
