"""Meaning of cells: missing values, choices, groups."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Sequence

from fedmllm.core.errors import DataError
from fedmllm.data.reading import RawRow, as_text, is_blank, listed, quoted, take_text

_WHOLE = re.compile(r"([0-9]+)\.0+")  # a whole number that was written as a float
MAX_CHOICES = 26  # they are lettered
NA_VALUES = ("NA", "N/A", "NaN", "nan", "null", "NULL", "None", "-", "")


def is_missing(cell: object, na_values: Collection[str]) -> bool:
    """True for null, NaN, a blank text, and a text that is one of `na_values`."""
    if isinstance(cell, str):
        text = cell.strip()
        return is_blank(text) or text in na_values
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def choices_of(cell: object, name: str, separator: str, na_values: Collection[str], place: str) -> tuple[str, ...]:
    """The choices of a row, from a list or from a text with `separator` between them; () if the cell is empty."""
    if cell == [] or is_missing(cell, na_values):
        return ()
    elements = cell if isinstance(cell, list) else as_text(cell, name, place).split(separator)
    choices = tuple(as_text(choice, name, place).strip() for choice in elements)
    if not 2 <= len(choices) <= MAX_CHOICES or "" in choices or alike(choices):
        raise DataError(
            f"{place}: choices {quoted(choices)}; allowed: 2 to {MAX_CHOICES}, each of them once, none empty"
        )
    return choices


def alike(choices: Sequence[str]) -> bool:
    """True if two choices look the same, in whatever Unicode form, with whatever blanks and characters without width."""
    return len({_look(choice) for choice in choices}) < len(choices)


def _look(text: str) -> str:
    if text.isascii():
        return text.strip()
    return " ".join("".join(c for c in same_form(text) if unicodedata.category(c) != "Cf").split())


def same_form(text: str) -> str:
    """The text in Unicode's composed form (NFC), without blanks at its ends: equal for texts that look equal."""
    return unicodedata.normalize("NFC", text.strip())


def group(row: RawRow, name: str, na_values: Collection[str], place: str) -> str:
    """A cell that rows are grouped by. An empty one would be a client without a name.

    "12.0" is "12", as a number 12.0 is: tables write a column of whole numbers with a gap so, and a patient must not be another
    one in the next file.
    """
    if name in row and is_missing(row[name], na_values):
        raise DataError(f"{place}: {name!r} is empty{hint_at(row[name])}")
    text = same_form(take_text(row, name, place))
    number = _WHOLE.fullmatch(text)
    return number[1] if number else text


def hint_at(cell: object) -> str:
    """An addition to a message about a missing value, if the cell holds a word that stands for one."""
    if isinstance(cell, str) and not is_blank(cell):
        return f" ({quoted(cell.strip())} is one of data.na_values)"
    return ""


def one_of(choices: Sequence[str]) -> str:
    """The choices as they stand in a message."""
    return listed(repr(choice) for choice in choices)
