"""The key-value cache under the name that transformers gives it.

It was `past_key_values` up to 5.23 and is `cache` since 5.24, which warns about the old name at every pass; 5.40 drops it.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def cache_argument(model: nn.Module) -> str:
    """The argument of the forward pass that takes a cache: "cache" or "past_key_values"."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache in the output of a forward pass."""
    return output["cache"] if "cache" in output else output["past_key_values"]
