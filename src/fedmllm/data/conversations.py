"""Conversations: a JSON list of {id, image, conversations: [{role, content}]}.

LLaVA's spelling ({"from": "human", "value": ...}) is read too. Rows that `fedmllm data export` wrote also hold the parts that
the conversation was made of (question, choices, answer, text), and are read from those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedmllm.core.errors import DataError
from fedmllm.data.marks import MARK, marks_in, pictures_of, split_at_marks
from fedmllm.data.reading import Placed, RawRow, listed, quoted

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
PARTS = ("question", "choices", "answer")
NOT_READ = ("video", "videos", "audio", "audios")
PICTURES = ("image", "images")


def conversation_rows(rows: Placed, image_columns: Sequence[str]) -> Placed:
    """Yield one row per question and answer of each conversation.

    A conversation of several turns gives several rows, "ID#2" for the second. Each is asked without the turns before it, with
    the pictures of its own marks; a turn without marks gets the pictures of all turns up to it.

    Args:
        rows: The objects of the file.
        image_columns: Keys that hold pictures.
    """
    for where, row in rows:
        if isinstance(row, DataError):
            yield where, row
            continue
        try:
            yield from _rows_of(where, row, image_columns)
        except DataError as error:
            yield where, error


def _rows_of(line: str, row: RawRow, image_columns: Sequence[str]) -> Iterator[tuple[str, RawRow]]:
    where = line if row.get("id") is None else f"{line}: row {quoted(row['id'])}"
    shared = {key: value for key, value in row.items() if key != "conversations"}
    if all(part in row for part in PARTS):
        yield line, shared
        return
    if film := next((key for key in NOT_READ if row.get(key)), ""):
        raise DataError(f"{where}: {film!r} is not read; conversations hold texts and pictures")
    questions = _questions(where, row)
    texts = [question for question, _ in questions]
    if len(image_columns) == 1:
        column = image_columns[0]
        pictures = _pictures_of_turns(where, row, column, [marks_in(text, where) for text in texts])
        cells = [{column: paths} if column in row else {} for paths in pictures]
    else:  # several cameras: each turn sees them all
        texts, cells = [_without_leading_marks(text, where) for text in texts], [{} for _ in texts]
    other = next((key for key in PICTURES if row.get(key) and key not in image_columns), "")
    if other and set(PICTURES) & set(image_columns):
        raise DataError(
            f"{where}: {other!r} is not read; pictures are those of {listed(image_columns)} (data.columns.image)"
        )
    for count, (text, cell, (_, answer)) in enumerate(zip(texts, cells, questions, strict=True), start=1):
        name = {"id": f"{row['id']}#{count}"} if count > 1 and row.get("id") is not None else {}
        place = f"{line}#{count}" if count > 1 else line
        yield place, {**shared, **name, **cell, "question": text, "answer": answer}


def _questions(where: str, row: RawRow) -> list[tuple[str, str]]:
    """(question, answer) pairs."""
    turns_of = row.get("conversations") or []
    if not isinstance(turns_of, list):
        raise DataError(f"{where}: 'conversations' is {quoted(turns_of)}, not a list of turns")
    turns = [_turn(where, turn) for turn in turns_of]
    if not any(role == "user" for role, _ in turns):
        raise DataError(f"{where}: no 'conversations' with a turn of the user; the row has: {listed(row)}")
    pairs: list[tuple[str, str]] = []
    for i, (role, text) in enumerate(turns):
        before = turns[i - 1][0] if i else ""
        if role == "user":
            if i + 1 == len(turns) or turns[i + 1][0] != "assistant":
                raise DataError(f"{where}: turn {i} of the user has no answer")
            pairs.append((text, turns[i + 1][1].strip()))
        elif role == "assistant" and before != "user":
            raise DataError(f"{where}: turn {i} of the assistant answers no question of the user")
        elif role == "system" and marks_in(text, where):
            raise DataError(f"{where}: turn {i} of the system holds a picture; pictures are read in turns of the user")
    return pairs


def _turn(where: str, turn: Any) -> tuple[str, str]:
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    text = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        allowed = ", ".join(ROLES)
        raise DataError(f"{where}: a turn is {{role, content}} with a role of {allowed}; got {quoted(turn)}")
    if media := next((key for key in (*PICTURES, *NOT_READ) if turn.get(key)), ""):
        raise DataError(
            f"{where}: a turn has {media!r}, which is not read; pictures are those of the row's image column"
        )
    return ROLES[role], text


def _pictures_of_turns(where: str, row: RawRow, column: str, marks: list[list[str]]) -> list[list[object]]:
    try:
        every = pictures_of([mark for own in marks for mark in own], row.get(column), column, where)
    except DataError as error:
        raise DataError(f"{error}; keys there: {listed(row)}") from None
    if not any(marks):
        return [every for _ in marks]
    of_turns, end = list[list[object]](), 0
    for own in marks:
        of_turns.append(every[end : end + len(own)] or every[:end])
        end += len(own)
    return of_turns


def _without_leading_marks(text: str, where: str) -> str:
    marks_in(text, where)
    question, pieces = split_at_marks(text)
    if pieces:
        raise DataError(f"{where}: {MARK} in the middle of a text is read for rows with one image column only")
    return question
