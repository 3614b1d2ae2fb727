"""A cache of encoded rows, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from threading import RLock
from typing import Any

from fedmllm.backbones.base import Row


class RowCache:
    """Rows by key, up to a number of bytes. Evictable pixels go first, then the least recently used rows.

    Threads may share it.

    Args:
        limit: Bytes of all rows together; the last row stays, however large.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._num_bytes, self._lock = limit, 0, RLock()
        self._cache: OrderedDict[Any, Row] = OrderedDict()
        self._with_images: dict[
            Any, None
        ] = {}  # in order of insertion: a full cache does not look through all its rows

    def get(self, key: Any) -> Row | None:
        """The row of `key`, which counts as used; None = absent."""
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)

    def put(self, key: Any, row: Row, evictable: Callable[[Any, Row], bool]) -> None:
        """Add a row.

        Args:
            key: Its key.
            row: The row.
            evictable: True if the pixels of the row with this key are not needed any more.
        """
        with self._lock:
            self._insert(key, row)
            while self._num_bytes > self._limit and len(self._cache) > 1:
                lean = next((k for k in self._with_images if evictable(k, self._cache[k])), None)
                if lean is not None:
                    self._insert(lean, replace(self._cache[lean], images={}))
                else:
                    oldest, gone = self._cache.popitem(last=False)
                    self._num_bytes -= gone.num_bytes
                    self._with_images.pop(oldest, None)

    def _insert(self, key: Any, row: Row) -> None:
        self._num_bytes += row.num_bytes - (self._cache[key].num_bytes if key in self._cache else 0)
        self._cache[key] = row
        if row.images:
            self._with_images[key] = None
        else:
            self._with_images.pop(key, None)

    def clear(self) -> None:
        """Remove all rows."""
        self._cache.clear()
        self._with_images.clear()
        self._num_bytes = 0
