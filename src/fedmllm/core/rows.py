"""Rows that are held as columns, and columns of any rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, overload

import numpy as np

from fedmllm.core.types import OPEN_LABEL, Content, Example, Modality, answer_label, quick_example

_T = TypeVar("_T")
_U = TypeVar("_U")


@dataclass(frozen=True, slots=True)
class Coded(Generic[_T]):
    """A column whose rows share values.

    Attributes:
        values: The values. One may stand twice, or in no row.
        codes: Of each row, the index of its value. Shape (rows,), integers.
    """

    values: Sequence[_T]
    codes: np.ndarray[Any, Any]

    @classmethod
    def of(cls, column: Iterable[_T], key: Callable[[_T], Hashable] = id) -> Coded[_T]:
        """Return the column with each value once.

        Args:
            column: Of each row, its value.
            key: Values with equal keys are the same.
        """
        cells = list(column)
        keys = list(map(key, cells))
        different = dict(zip(keys, cells, strict=True))
        number = dict(zip(different, range(len(different)), strict=True))
        return cls(list(different.values()), np.fromiter(map(number.__getitem__, keys), np.int32, len(keys)))

    def __getitem__(self, row: int) -> _T:
        value: _T = self.values[self.codes.item(row)]
        return value

    def __iter__(self) -> Iterator[_T]:
        return map(self.values.__getitem__, self.codes.tolist())

    def first_rows(self) -> list[int]:
        """Return the first row of each value that a row has, ascending."""
        rows: list[int] = np.sort(np.unique(self.codes, return_index=True)[1]).tolist()
        return rows

    def used(self) -> list[_T]:
        """Return the values that a row has, in the order of the rows."""
        return [self[row] for row in self.first_rows()]

    def of_values(self, function: Callable[[_T], _U]) -> Coded[_U]:
        """Return the column of what a function makes of each value."""
        return Coded(list(map(function, self.values)), self.codes)

    def groups(self) -> dict[_T, np.ndarray[Any, Any]]:
        """Value -> its rows, ascending; values must be hashable. Only values that a row has."""
        number: dict[_T, int] = {}
        table = np.array([number.setdefault(value, len(number)) for value in self.values], np.int64)
        codes = table[self.codes].astype(np.min_scalar_type(len(number)))  # numpy sorts short integers in linear time
        order, ends = np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes, minlength=len(number)))
        rows = np.split(order, ends[:-1]) if number else []
        return {value: own for value, own in zip(number, rows, strict=True) if len(own)}


class Texts:
    """Texts one after another in a single string: a text takes its characters and eight bytes."""

    __slots__ = ("_ends", "_text")

    def __init__(self, text: str, lengths: np.ndarray[Any, Any]) -> None:
        self._text, self._ends = text, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        """Return some texts in this form."""
        return cls("".join(texts), np.fromiter(map(len, texts), np.int64, len(texts)))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._text[self._ends.item(index) : self._ends.item(index + 1)]

    def at(self, places: Sequence[int]) -> list[str]:
        """Return the texts at some places."""
        rows, text = np.asarray(places, np.int64), self._text
        ends = zip(self._ends[rows].tolist(), self._ends[rows + 1].tolist(), strict=True)
        return [text[start:end] for start, end in ends]


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class LazyRows(Sequence[Example]):
    """Rows as columns of equal length. Each `Example` is made when it is asked for, and is not kept.

    Attributes:
        ids: As in the file.
        fields: What each row truly has.
        questions: Of each row.
        endings: Choices and answer of each row.
        columns: Of each row.
        place: Index of a row -> its `where`.
        announced: The same for all rows.
        odd: Rows that are more than their columns, such as those whose question has pieces.
    """

    ids: Texts | Sequence[str | int]
    fields: Coded[Mapping[Modality, Content]]
    questions: Sequence[str] | Coded[str]
    endings: Coded[tuple[tuple[str, ...], str]]
    columns: Coded[Mapping[str, str]]
    place: Callable[[int], str]
    announced: frozenset[Modality] = frozenset()
    odd: Mapping[int, Example] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(index, slice):
            return tuple(map(self._row, range(*index.indices(len(self)))))
        return self._row(range(len(self))[index])

    def __iter__(self) -> Iterator[Example]:
        return map(self._row, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as the rows, which hold mappings

    def __repr__(self) -> str:
        return repr(tuple(self))

    def _row(self, index: int) -> Example:
        if odd := self.odd.get(index):
            return odd
        choices, answer = self.endings[index]
        return quick_example(
            self.ids[index],
            self.fields[index],
            self.questions[index],
            choices,
            answer,
            self.place(index),
            self.columns[index],
            self.announced,
        )


def row_ids(rows: Sequence[Example], places: Sequence[int]) -> Sequence[str | int]:
    """The ids of some rows."""
    if not isinstance(rows, LazyRows):
        return [rows[place].id for place in places]
    return rows.ids.at(places) if isinstance(rows.ids, Texts) else [rows.ids[place] for place in places]


def row_fields(rows: Sequence[Example]) -> Coded[Mapping[Modality, Content]]:
    """The fields of each row."""
    return rows.fields if isinstance(rows, LazyRows) else Coded.of(row.fields for row in rows)


def columns_of_rows(rows: Sequence[Example]) -> Coded[Mapping[str, str]]:
    """The columns of each row."""
    return rows.columns if isinstance(rows, LazyRows) else Coded.of(row.columns for row in rows)


def different_endings(rows: Sequence[Example]) -> list[Example]:
    """Return one row for each answer with its choices, in the order of the rows."""
    if isinstance(rows, LazyRows):
        return [rows[row] for row in rows.endings.first_rows()]
    first: dict[tuple[str, tuple[str, ...]], Example] = {}
    for row in rows:
        first.setdefault((row.answer, row.choices), row)
    return list(first.values())


def row_labels(rows: Sequence[Example]) -> Coded[str]:
    """The label of each row, as `answer_label` gives it."""
    if not isinstance(rows, LazyRows):
        return Coded.of(map(answer_label, rows), str)
    return rows.endings.of_values(lambda ending: ending[1] if ending[0] else OPEN_LABEL)
