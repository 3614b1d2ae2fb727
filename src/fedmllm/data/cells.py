"""What the cells of a user's own rows mean."""

from __future__ import annotations

import re

from fedmllm.core.errors import DataError
from fedmllm.data.reading import Row, as_text, take_text

MAX_CHOICES = 26  # they are lettered


def choices_of(cell: object, name: str, separator: str, place: str) -> tuple[str, ...]:
    """The choices of a row, out of a list or of a text with `separator` between them; () where the cell is empty."""
    if cell is None or cell == [] or (isinstance(cell, str) and not cell.strip()):
        return ()
    listed = cell if isinstance(cell, list) else as_text(cell, name, place).split(separator)
    choices = tuple(as_text(choice, name, place).strip() for choice in listed)
    if not 2 <= len(set(choices)) == len(choices) <= MAX_CHOICES or "" in choices:
        raise DataError(f"{place}: choices {choices!r:.80}; allowed: 2 to {MAX_CHOICES}, each of them once, none empty")
    return choices


def group(row: Row, name: str, place: str) -> str:
    """A cell that rows are grouped by. An empty one would be a client without a name."""
    value = take_text(row, name, place).strip()
    if not value:
        raise DataError(f"{place}: {name!r} is empty")
    return value


def chosen(answer: str, choices: tuple[str, ...], place: str) -> str:
    """The choice that the answer is: by its words, or by its number from 0."""
    if not choices or answer in choices:
        return answer
    if number := re.fullmatch(r"([0-9]{1,3})(?:\.0+)?", answer):  # "1.0": a csv of a column of numbers with a gap
        if number[1] in choices:
            return number[1]
        if int(number[1]) < len(choices):
            return choices[int(number[1])]
    allowed = ", ".join(repr(choice) for choice in choices)
    raise DataError(f"{place}: the answer {answer!r} is none of the choices {allowed}, nor one of their numbers from 0")
