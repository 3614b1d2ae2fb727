"""Rows, pictures and groups that training and test rows have in common."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedmllm.core.rows import columns_of_rows, row_fields
from fedmllm.core.types import Content, Example, Modality
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
    asked, outlines = {_asked(e) for e in test}, {_shown(e.fields) for e in test}
    alike = {key for key, fields in _different(train).items() if _shown(fields) in outlines}
    has = row_fields(train)
    visible = np.array([id(fields) in alike for fields in has.values], bool)[has.codes]
    known = {_content(e) for row in np.flatnonzero(visible).tolist() if _asked(e := train[row]) in asked}
    if equal := [e for e in test if _content(e) in known]:
        notes.append(f"{_of(equal, test)} are also training rows: {listed(e.id for e in equal)}")
    pictures = _pictures(train)
    if shared := [e for e in test if not pictures.isdisjoint(_pictures([e]))]:
        notes.append(
            f"{_of(shared, test)} have a picture that is also in a training row: {listed(e.id for e in shared)}"
        )
    groups = {columns[group] for columns in columns_of_rows(train).used() if group in columns}
    if group and (shared := [e for e in test if e.columns.get(group) in groups]):
        common = dict.fromkeys(e.columns[group] for e in shared)
        notes.append(f"{_of(shared, test)} have a {group!r} that is also in training rows: {listed(common)}")
    return tuple(notes)


def twins(rows: Sequence[Example], train: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Find rows that are also training rows.

    Two rows are equal if they have the same content, and the same question and answer or the same place in a file. Pictures
    are compared by their paths.

    Args:
        rows: A few rows.
        train: Rows that are trained on.

    Returns:
        Pairs of a row and a training row that equals it.
    """
    if not rows:
        return []  # nearly every run: the training rows are not looked at
    outlines = {_located(e.fields) for e in rows}
    has = row_fields(train)
    alike = {key for key, fields in _different(train).items() if _located(fields) in outlines}
    near = np.array([id(fields) in alike for fields in has.values], bool)[has.codes]
    known: dict[Hashable, Example] = {}
    for row in np.flatnonzero(near).tolist():
        for key in _names(train[row]):
            known.setdefault(key, train[row])
    found = [(e, [known[key] for key in _names(e) if key in known]) for e in rows]
    return [(e, equal[0]) for e, equal in found if equal]


def _names(row: Example) -> tuple[Hashable, Hashable]:
    content = _located(row.fields)
    return (content, _asked(row)), (content, (row.id, _whole(row.where)))


def _located(fields: Mapping[Modality, Content]) -> Hashable:
    """Content with whole paths, whatever folder the settings name."""
    return tuple((m, c if isinstance(c, str) else tuple(map(_whole, c))) for m, c in sorted(fields.items()))


def _whole(path: str | Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100  # `resolve` would look up each file


def _of(some: Sequence[Example], test: Sequence[Example]) -> str:
    return f"{len(some)} of {len(test)} test rows"


def _content(row: Example) -> Hashable:
    return (_shown(row.fields), _asked(row))


def _asked(row: Example) -> Hashable:
    return (row.pieces or row.question, row.choices, row.answer)


def _shown(fields: Mapping[Modality, Content]) -> Hashable:
    return tuple(fields.items())


def _different(rows: Sequence[Example]) -> dict[int, Mapping[Modality, Content]]:
    """The fields of the rows, each once where rows share them, as those of a keyframe do."""
    return {id(fields): fields for fields in row_fields(rows).used()}


def _pictures(rows: Sequence[Example]) -> set[Path]:
    fields = _different(rows).values()
    paths = {path for field in fields for content in field.values() if isinstance(content, tuple) for path in content}
    return {Path(os.path.normpath(path)) if ".." in path.parts else path for path in paths}  # "a/../b" is "b"
