"""The widespread conversation form: a JSON list of {id, image, conversations: [{role, content}]}.

LLaVA's spelling ({"from": "human", "value": ...}) is read too. Rows that our own export wrote also hold the parts that the
conversation was made of (question, choices, answer, text), and are read back from those.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fedmllm.core.errors import DataError
from fedmllm.data.reading import Placed, Row

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
PARTS = ("question", "choices", "answer")
_IMAGE_MARK = re.compile(r"<image(?:_\d+)?>\n?")


def conversation_rows(rows: Placed) -> Placed:
    """One row for each question and answer: id, image, question, answer.

    A conversation of several turns gives several rows, "ID#2" for the second: each is asked without the turns before it.
    """
    for where, row in rows:
        if isinstance(row, DataError):
            yield where, row
            continue
        try:
            yield from _rows_of(where, row)
        except DataError as error:
            yield where, error


def _rows_of(where: str, row: Row) -> Iterator[tuple[str, Row]]:
    image = row.get("image")
    shared = {**row, "image": list(image.values()) if isinstance(image, Mapping) else image}
    shared.pop("conversations", None)
    if all(part in row for part in PARTS):
        yield where, shared
        return
    listed = row.get("conversations") or []
    if not isinstance(listed, list):
        raise DataError(f"{where}: 'conversations' is {listed!r:.80}, not a list of turns")
    turns = [_turn(where, turn) for turn in listed]
    asked = [(i, text) for i, (role, text) in enumerate(turns) if role == "user"]
    if not asked:
        raise DataError(f"{where}: no 'conversations' with a turn of the user; the row has: {', '.join(map(str, row))}")
    for count, (i, question) in enumerate(asked, start=1):
        if i + 1 == len(turns) or turns[i + 1][0] != "assistant":
            raise DataError(f"{where}: turn {i} of the user has no answer")
        name = {"id": f"{row['id']}#{count}"} if count > 1 and row.get("id") is not None else {}
        question = _IMAGE_MARK.sub("", question).strip()
        answer = turns[i + 1][1].strip()
        yield f"{where}#{count}" if count > 1 else where, {**shared, **name, "question": question, "answer": answer}


def _turn(where: str, turn: Any) -> tuple[str, str]:
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    text = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        allowed = ", ".join(ROLES)
        raise DataError(f"{where}: a turn is {{role, content}} with a role of {allowed}; got {turn!r:.80}")
    return ROLES[role], text
