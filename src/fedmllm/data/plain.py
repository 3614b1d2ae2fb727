"""Rows of CSV files, read column by column.

They are those that reading row by row gives, in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from fedmllm.core.errors import DataError
from fedmllm.core.types import Content, Example, Modality, quick_example
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


class KeptParts(dict[tuple[str | None, ...], _T | None], Generic[_T]):
    """Cells -> the part that they make; None if the row has to be read as a whole."""

    def __init__(self, part: RowPart[_T]) -> None:
        super().__init__()
        self.part = part

    def __missing__(self, cells: tuple[str | None, ...]) -> _T | None:
        try:
            made = self.part.make(dict(zip(self.part.columns, cells, strict=True)))
        except DataError:
            made = None
        if len(self) < MOST_KEPT:
            self[cells] = made
        return made


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
    examples: list[Example] = []
    skipped: list[str] = []
    known: set[str] = set()
    header: list[str] = []
    before = f"{plan.file}:"
    fields, question, answer, about = (
        KeptParts(plan.fields),
        KeptParts(plan.question),
        KeptParts(plan.answer),
        KeptParts(plan.columns),
    )
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
            columns = {"file": (plan.name,) * len(rows), **cells}
            parts = [_of_rows(part, columns, len(rows)) for part in (fields, question, answer, about)]
            for id_, number, row, has, asked, ending, groups in zip(ids, numbers, rows, *parts, strict=True):
                where = f"{before}{number}"
                if has is None or asked is None or ending is None or groups is None or not (asked or _has_text(has)):
                    try:
                        examples.append(plan.make(where, dict(zip(header, row, strict=True))))
                    except DataError as error:
                        if on_bad_row == "fail":
                            raise
                        skipped.append(str(error))
                else:
                    examples.append(quick_example(id_, has, asked, ending[0], ending[1], where, groups, plan.announced))
    except ValueError:
        return None
    return (Rows(tuple(examples), tuple(skipped)), header) if examples else None


def _has_text(fields: Mapping[Modality, Content]) -> bool:
    return any(isinstance(content, str) for content in fields.values())


def _of_rows(kept: KeptParts[Any], columns: Mapping[str, Sequence[str]], number: int) -> list[Any]:
    """The part of each row."""
    names = kept.part.columns
    if columns.keys().isdisjoint(names):
        return [kept[(None,) * len(names)]] * number
    none = [None] * number
    cells: list[Sequence[str | None]] = [columns.get(name, none) for name in names]
    return list(map(kept.__getitem__, zip(*cells, strict=True)))
