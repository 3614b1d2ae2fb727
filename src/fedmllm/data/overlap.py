"""Rows, pictures and groups that training and test rows have in common."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

from fedmllm.core.types import Example
from fedmllm.data.reading import listed


def overlap(train: Sequence[Example], test: Sequence[Example], group: str = "") -> tuple[str, ...]:
    """Describe the overlap of two splits, which makes a test easier than new rows would be.

    Args:
        train: Rows that are trained on.
        test: Rows that are evaluated.
        group: Column of groups, such as the patient; "" = none.

    Returns:
        One sentence each for equal rows, shared pictures and shared groups; () if there is no overlap.
    """
    notes = []
    known = {_content(e) for e in train}
    if equal := [e for e in test if _content(e) in known]:
        notes.append(f"{_of(equal, test)} are also training rows: {listed(e.id for e in equal)}")
    pictures = _pictures(train)
    if shared := [e for e in test if not pictures.isdisjoint(_pictures([e]))]:
        notes.append(
            f"{_of(shared, test)} have a picture that is also in a training row: {listed(e.id for e in shared)}"
        )
    groups = {e.columns[group] for e in train if group in e.columns}
    if group and (shared := [e for e in test if e.columns.get(group) in groups]):
        common = dict.fromkeys(e.columns[group] for e in shared)
        notes.append(f"{_of(shared, test)} have a {group!r} that is also in training rows: {listed(common)}")
    return tuple(notes)


def _of(some: Sequence[Example], test: Sequence[Example]) -> str:
    return f"{len(some)} of {len(test)} test rows"


def _content(row: Example) -> Hashable:
    return (tuple(row.fields.items()), row.pieces or row.question, row.choices, row.answer)


def _pictures(rows: Iterable[Example]) -> set[Path]:
    fields = {id(row.fields): row.fields for row in rows}.values()  # rows of a keyframe share their fields
    paths = {path for field in fields for content in field.values() if isinstance(content, tuple) for path in content}
    return {Path(os.path.normpath(path)) if ".." in path.parts else path for path in paths}  # "a/../b" is "b"
