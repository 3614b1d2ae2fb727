"""Answers of multiple-choice rows, in one reading per column."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from fedmllm.core.errors import DataError
from fedmllm.core.types import Example
from fedmllm.data.cells import one_of, same_form
from fedmllm.data.reading import quoted

Reading = Literal["words", "numbers"]


def as_word(answer: str, choices: Sequence[str]) -> str | None:
    """The choice with these words. "1.0" is "1": tables write a column of numbers with a gap so."""
    forms, number = _forms(tuple(choices)), _number(answer)
    return forms.get(same_form(answer), forms.get(number) if number else None)


@lru_cache(maxsize=1024)
def _forms(choices: tuple[str, ...]) -> dict[str, str]:
    return {same_form(choice): choice for choice in choices}


def as_number(answer: str, choices: Sequence[str]) -> str | None:
    """The choice with this number, counted from 0."""
    number = _number(answer)
    return choices[int(number)] if number and int(number) < len(choices) else None


def _number(answer: str) -> str:
    found = re.fullmatch(r"([0-9]{1,3})(?:\.0+)?", answer)
    return found[1] if found else ""


def is_ambiguous(rows: Iterable[Example]) -> bool:
    """True if an answer is one choice by its words and another one by its number."""
    return any(
        (word := as_word(e.answer, e.choices)) is not None
        and (number := as_number(e.answer, e.choices)) is not None
        and word != number
        for e in _different(rows)
    )


def _different(rows: Iterable[Example]) -> Iterable[Example]:
    """The first row of each pair of an answer and choices: the others read alike."""
    first: dict[tuple[str, tuple[str, ...]], Example] = {}
    for row in rows:
        if row.choices:
            first.setdefault((row.answer, row.choices), row)
    return first.values()


def reading_of(rows: Iterable[Example]) -> Reading:
    """Return the reading of a column of answers: as words if all of them are choices, else as numbers.

    Rows whose answer fits neither way do not count.

    Raises:
        DataError: Some answers are choices only by their words, others only by their number.
    """
    only_word = only_number = None
    for e in _different(rows):
        word, number = as_word(e.answer, e.choices), as_number(e.answer, e.choices)
        if number is None and word is not None:
            only_word = only_word or e
        elif word is None and number is not None:
            only_number = only_number or e
    if only_word and only_number:
        raise DataError(
            f"{only_number.where}: row {quoted(only_number.id)}: the answer {quoted(only_number.answer)} is a choice by its "
            f"number only, but {quoted(only_word.answer)} ({only_word.where}) by its words only; write all answers of the "
            'column in one way, or set data.answers = "words" or "numbers"'
        )
    return "numbers" if only_number else "words"


def as_choice(answer: str, choices: Sequence[str], reading: Reading) -> str | None:
    """The choice that an answer names, None if it names none; the answer of an open question."""
    if not choices:
        return answer
    return (as_word if reading == "words" else as_number)(answer, choices)


def read_answer(row: Example, reading: Reading) -> Example:
    """The row with its answer as one of its choices.

    Raises:
        DataError: The answer is not one of the choices.
    """
    chosen = as_choice(row.answer, row.choices, reading)
    if chosen is None:
        way = ", nor one of their numbers from 0" if reading == "words" else " by its number from 0"
        raise DataError(
            f"{row.where}: row {quoted(row.id)}: the answer {quoted(row.answer)} is none of the choices "
            f"{one_of(row.choices)}{way}"
        )
    return replace(row, answer=chosen) if chosen != row.answer else row
