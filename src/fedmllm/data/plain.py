"""Rows of CSV files, read column by column.

They are those that reading row by row gives, in a fraction of the time.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from fedmllm.core.errors import DataError
from fedmllm.core.rows import Coded, LazyRows, Texts
from fedmllm.core.types import Content, Example, Modality
from fedmllm.data.base import Rows
from fedmllm.data.delimited import csv_blocks
from fedmllm.data.reading import RawRow, id_keys

BLOCK = 4096  # rows that are held as cells
MOST_KEPT = 16_384  # different cells whose part is kept: there are as many clients, but not as few reports
_T = TypeVar("_T")


@dataclass(frozen=True)
class RowPart(Generic[_T]):
    """A part of a row that some of its cells decide.

    Attributes:
        columns: Names of the cells.
        make: Cells by name -> the part, or None if the row has to be read as a whole; may raise DataError.
    """

    columns: tuple[str, ...]
    make: Callable[[RawRow], _T | None]


@dataclass(frozen=True)
class RowPlan:
    """Parts that the rows of a file are made of.

    Attributes:
        file: The file.
        delimiter: Between its cells; "" = as its header has it.
        name: Cell of the column "file", unless the file has such a column.
        id: Column of the ids; "" = the column "id" if there is one, else the line.
        prefix: In front of the line of a row without id.
        fields: What a row has, by modality.
        question: Its question.
        answer: Its choices and its answer.
        columns: Its columns.
        announced: The same for all rows, as in `Example`.
        make: (place, cells by name) -> a row; raises DataError.
    """

    file: Path
    delimiter: str
    name: str
    id: str
    prefix: str
    fields: RowPart[Mapping[Modality, Content]]
    question: RowPart[str]
    answer: RowPart[tuple[tuple[str, ...], str]]
    columns: RowPart[Mapping[str, str]]
    announced: frozenset[Modality]
    make: Callable[[str, RawRow], Example]


def plain_rows(plan: RowPlan, on_bad_row: Literal["fail", "skip"]) -> tuple[Rows, list[str]] | None:
    """Read a CSV file.

    Args:
        plan: How its rows are made.
        on_bad_row: As in the settings of a data set.

    Returns:
        The rows, and the names of the columns; None if the file has to be read row by row: a line is broken, an id comes
        twice, or there is no row.

    Raises:
        DataError: As by `plan.make`, for the first bad row.
    """
    columns, skipped, known, header = _Columns(plan), list[str](), set[str](), list[str]()
    try:
        for header, numbers, rows in csv_blocks(plan.file, plan.delimiter, BLOCK):
            if set(map(len, rows)) != {len(header)}:
                return None
            cells = dict(zip(header, zip(*rows, strict=True), strict=True))
            if plan.id and plan.id not in cells:
                return None
            ids: Sequence[str | int] = cells.get(plan.id or "id", ())
            ids = ids or ([f"{plan.prefix}{number}" for number in numbers] if plan.prefix else numbers)
            keys = id_keys(ids)
            if len(keys) < len(ids) or "" in keys or not known.isdisjoint(keys):
                return None
            known |= keys
            for index in columns.add(ids, numbers, {"file": (plan.name,) * len(rows), **cells}):
                try:
                    row = plan.make(f"{plan.file}:{numbers[index]}", dict(zip(header, rows[index], strict=True)))
                    columns.replace(index - len(rows), row)
                except DataError as error:
                    if on_bad_row == "fail":
                        raise
                    columns.leave_out(index - len(rows))
                    skipped.append(str(error))
    except ValueError:
        return None
    found = columns.rows()
    return (Rows(found, tuple(skipped)), header) if found else None


class _Columns:
    """Columns of the rows that are read."""

    def __init__(self, plan: RowPlan) -> None:
        self.plan = plan
        self.ids: list[str | int] = []
        self.numbers = array("i")  # of the lines
        self.fields, self.questions = _Part(plan.fields), _Part(plan.question)
        self.endings, self.columns = _Part(plan.answer), _Part(plan.columns)
        self.odd: dict[int, Example] = {}
        self.left_out: set[int] = set()
        self._silent: list[bool] = []  # of each part of `fields`: it has no text
        self._asked: list[bool] = []  # of each part of `questions`

    def add(self, ids: Sequence[str | int], numbers: Sequence[int], cells: Mapping[str, Sequence[str]]) -> list[int]:
        """Add rows; return the indices of those that have to be read as a whole."""
        self.ids += ids
        self.numbers.extend(numbers)
        parts = [part.add(cells, len(ids)) for part in (self.fields, self.questions, self.endings, self.columns)]
        whole = {index for codes in parts if -1 in codes for index, code in enumerate(codes) if code < 0}
        for has in self.fields.parts[len(self._silent) :]:
            self._silent.append(not any(isinstance(content, str) for content in has.values()))
        self._asked += [question != "" for question in self.questions.parts[len(self._asked) :]]
        if not all(self._asked):  # a row asks something, or has a text
            codes = enumerate(zip(parts[0], parts[1], strict=True))
            whole |= {
                i
                for i, (has, question) in codes
                if has >= 0 <= question and self._silent[has] and not self._asked[question]
            }
        return sorted(whole)

    def replace(self, index: int, row: Example) -> None:
        """Set a row that was read as a whole; `index` counts from the end."""
        self.odd[len(self.ids) + index] = row
        self.fields.replace(index, row.fields)
        self.questions.replace(index, row.question)
        self.endings.replace(index, (row.choices, row.answer))
        self.columns.replace(index, row.columns)

    def leave_out(self, index: int) -> None:
        """Leave a row out; `index` counts from the end."""
        self.left_out.add(len(self.ids) + index)

    def rows(self) -> LazyRows:
        """The rows."""
        kept = np.array([index for index in range(len(self.ids)) if index not in self.left_out], np.int64)
        ids = [self.ids[index] for index in kept.tolist()] if self.left_out else self.ids
        numbers = np.array(self.numbers, np.int32)[kept]
        texts = [id_ for id_ in ids if isinstance(id_, str)]
        return LazyRows(
            Texts.of(texts) if len(texts) == len(ids) else ids,
            self.fields.column(kept),
            self.questions.column(kept),
            self.endings.column(kept),
            self.columns.column(kept),
            partial(_place, f"{self.plan.file}:", numbers),
            self.plan.announced,
            {place: self.odd[row] for place, row in enumerate(kept.tolist()) if row in self.odd} if self.odd else {},
        )


def _place(before: str, numbers: np.ndarray[Any, Any], row: int) -> str:
    return f"{before}{numbers.item(row)}"


class _Part(dict[tuple[str | None, ...], int], Generic[_T]):
    """A part of all rows, as a column; as a dictionary: cells -> the code of the part that they make."""

    def __init__(self, part: RowPart[_T]) -> None:
        super().__init__()
        self.part = part
        self.parts: list[_T] = []
        self.codes = array("i")  # -1: the row has to be read as a whole

    def __missing__(self, cells: tuple[str | None, ...]) -> int:
        try:
            code = self._code(self.part.make(dict(zip(self.part.columns, cells, strict=True))))
        except DataError:
            code = -1
        if len(self) < MOST_KEPT:
            self[cells] = code
        return code

    def add(self, cells: Mapping[str, Sequence[str]], number: int) -> array[int]:
        """Add rows; return their codes."""
        names = self.part.columns
        if cells.keys().isdisjoint(names):
            codes = array("i", [self[(None,) * len(names)]]) * number
        else:
            none = [None] * number
            columns: list[Sequence[str | None]] = [cells.get(name, none) for name in names]
            codes = array("i", map(self.__getitem__, zip(*columns, strict=True)))
        self.codes.extend(codes)
        return codes

    def replace(self, index: int, value: _T) -> None:
        """Set the value of a row."""
        self.codes[index] = self._code(value)

    def column(self, kept: np.ndarray[Any, Any]) -> Coded[_T]:
        """The column of the rows that are kept."""
        return Coded(self.parts, np.array(self.codes, np.int32)[kept])

    def _code(self, value: _T | None) -> int:
        if value is None:
            return -1
        self.parts.append(value)
        return len(self.parts) - 1
