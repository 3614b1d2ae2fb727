"""A cache of encoded rows, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedmllm.backbones.base import Row


class Rows:
    """Rows by key, up to a number of bytes. First pixels go that are not needed any more, then the rows used longest ago."""

    def __init__(self, limit: int) -> None:
        self._limit, self._num_bytes = limit, 0
        self._kept: OrderedDict[Any, Row] = OrderedDict()

    def get(self, key: Any) -> Row | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: Any, row: Row, needless: Callable[[Any, Row], bool]) -> None:
        """`needless(key, row)`: the pixels of that row are not needed any more."""
        self._put(key, row)
        while self._num_bytes > self._limit and len(self._kept) > 1:
            lean = next((k for k, r in self._kept.items() if r.images and needless(k, r)), None)
            if lean is not None:
                self._put(lean, replace(self._kept[lean], images={}))
            else:
                self._num_bytes -= self._kept.popitem(last=False)[1].num_bytes

    def _put(self, key: Any, row: Row) -> None:
        self._num_bytes += row.num_bytes - (self._kept[key].num_bytes if key in self._kept else 0)
        self._kept[key] = row

    def clear(self) -> None:
        self._kept.clear()
        self._num_bytes = 0
