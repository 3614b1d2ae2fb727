"""Digests of rows and differences of settings, for the resume check."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedmllm.core.types import Example


def rows_digest(*splits: Iterable[Example]) -> str:
    """sha256 (16 hex digits) of everything that rows say and show, pictures by their bytes and not by their names.

    A picture that is not there counts as absent: whether a row needs it is for `data.pictures` to say.
    """
    sha = hashlib.sha256()
    for examples in splits:
        sha.update(b"split\x1d")
        for example in examples:
            question = "\x1d".join(example.pieces) or example.question
            sha.update("\x1f".join([str(example.id), question, *example.choices, example.answer]).encode())
            for modality, content in example.fields.items():
                parts = [content] if isinstance(content, str) else [_picture(path) for path in content]
                sha.update("\x1f".join(["", modality, *parts]).encode())
            sha.update(b"\x1e")
    return sha.hexdigest()[:16]


def _picture(path: Path) -> str:
    try:
        stat = path.stat()
        return _content(path, stat.st_size, stat.st_mtime_ns)
    except OSError:
        return "absent"


@lru_cache(maxsize=2**17)  # the experiments of a suite share their pictures
def _content(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One text for each key whose values differ, by its dotted path: "aggregator.lr was 0.1, is 0.01"."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    keys = [key for key in {**old, **new} if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    return [f"{key} was {old.get(key, _ABSENT)!r}, is {new.get(key, _ABSENT)!r}" for key in keys]


class _Absent:
    def __repr__(self) -> str:
        return "not there"


_ABSENT = _Absent()


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
