"""Libraries kept from fetching compiled kernels."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import hub_kernels

_BITSANDBYTES = logging.getLogger("bitsandbytes.backends.cpu.ops")


@contextmanager
def without_hub_kernels() -> Iterator[None]:
    """Neither transformers nor bitsandbytes fetches compiled code in this block.

    If the package `kernels` is installed, transformers fetches with it at a model's first pass and bitsandbytes when it is
    imported. Both work without, and bitsandbytes warns of it each time. The process is as before when the block ends.
    """
    absent = object()
    module, enabled = sys.modules.get("kernels", absent), hub_kernels._kernels_enabled

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    sys.modules["kernels"] = None  # type: ignore[assignment]  # None = not importable
    hub_kernels._kernels_enabled = False
    _BITSANDBYTES.addFilter(is_error)  # setLevel would clear the caches of all loggers, once a picture
    try:
        yield
    finally:
        if module is absent:
            sys.modules.pop("kernels", None)
        else:
            sys.modules["kernels"] = module  # type: ignore[assignment]
        hub_kernels._kernels_enabled = enabled
        _BITSANDBYTES.removeFilter(is_error)
