"""Tables for a console, divided if their columns do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

FRAME = 3  # characters that a column adds to its text: a blank on either side and a border


@dataclass(frozen=True)
class Column:
    """A heading and its cells."""

    heading: str
    cells: tuple[str, ...]

    @property
    def least(self) -> int:
        """Width of the longest word, which is not broken."""
        return self._width([word for text in (self.heading, *self.cells) for word in text.split()])

    @property
    def full(self) -> int:
        """Width without any line break."""
        return self._width([self.heading, *self.cells])

    @staticmethod
    def _width(texts: Sequence[str]) -> int:
        from rich.cells import cell_len

        return max(map(cell_len, texts), default=1) or 1


def fitting_tables(first: Column, groups: Sequence[Sequence[Column]], width: int) -> list[Table]:
    """Return one table with all columns if it fits; otherwise one or more for each group. Each begins with `first`.

    A word is broken only if it does not fit next to the first column. No column is left out.

    Args:
        first: Names of the lines.
        groups: Columns that belong together.
        width: Of the console, in characters.
    """
    whole = [column for group in groups for column in group]
    if _used([first, *whole]) <= width:
        return [_table([first, *whole], width)]
    tables = []
    for group in groups:
        block: list[Column] = []
        for column in group:
            if block and _used([first, *block, column]) > width:
                tables.append(_table([first, *block], width))
                block = []
            block.append(column)
        tables += [_table([first, *block], width)] if block else []
    return tables


def _used(columns: Sequence[Column]) -> int:
    return sum(column.least + FRAME for column in columns) + 1


def _table(columns: Sequence[Column], width: int) -> Table:
    """Columns have their longest word at least, in a table that fits, and the rest of the width in turn."""
    from rich.table import Table
    from rich.text import Text

    least = [min(column.least, max(1, (width - 1) // len(columns) - FRAME)) for column in columns]
    if _used(columns) <= width:
        least = [column.least for column in columns]
    rest = width - sum(least) - FRAME * len(columns) - 1
    table = Table()
    for column, at_least in zip(columns, least, strict=True):
        added = max(0, min(column.full - at_least, rest))
        rest -= added
        table.add_column(Text(column.heading), justify="right", overflow="fold", width=at_least + added)
    for line in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, line))  # as text: "[a]" is not markup
    return table
