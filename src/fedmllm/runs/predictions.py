"""Predictions of a run's evaluations, row by row, in one file.

`predictions.jsonl.gz` is gzip over JSON lines; equal runs have equal bytes. The first line holds the test rows, each
further line one evaluation of them in the same order:

    {"format": 1, "choices": [["A", "B"]], "rows": [{"id": 7, "answer": "A", "choices": 0, "has": ["image"], "columns": {}}]}
    {"round": 4, "client": null, "visible": "image", "p": [[0.25, 0.75]], "text": {"1": "left lung"}, "raw": {"2": "a\\nb"}}

`has` lists the modalities that the row truly has; those visible in an evaluation are in `visible` as well. `p` has the
probability of each choice, with six significant digits, and [] for an open question. `text` has the parsed answers of the
open questions by position, `raw` the generations that could not be parsed, and `grade` the grades by an LLM judge. An
evaluation costs about 4 bytes per probability; the rows are stored once.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmllm.core.errors import FedmllmError
from fedmllm.core.metrics import probabilities
from fedmllm.core.types import Example, Prediction
from fedmllm.runs.append import AppendFile

_FORMAT = 1
SMALLEST = 5e-324  # a probability of 0 stands for anything below


class PredictionFile(AppendFile):
    """The predictions of a run; each piece is a gzip member of its own, so that the file can be cut to a checkpoint."""

    def write(
        self,
        predictions: Sequence[Prediction],
        visible: str,
        round_: int | None = None,
        client: int | None = None,
        one_hot: bool = False,
    ) -> None:
        """Append an evaluation.

        Args:
            predictions: One per test row, in the order of the rows; nothing is written if there are none.
            visible: The visible modalities, as in `evaluate.visible`.
            round_: The round after which the adapter was evaluated, if it is recorded.
            client: The client whose adapter it is, for method "local".
            one_hot: Store probability 1 for the chosen answer: the scores only mark it (method "majority").
        """
        if not predictions:
            return
        head = b"" if self.num_bytes() else compressed(rows_line([p.example for p in predictions]))
        line: dict[str, Any] = {"round": round_, "client": client, "visible": visible}
        line["p"] = [choice_probabilities(p, one_hot) for p in predictions]
        opened = [(str(i), p) for i, p in enumerate(predictions) if not p.scores]
        texts = {"text": {i: p.text for i, p in opened if p.text is not None}}
        raws = {"raw": {i: p.raw for i, p in opened if p.text is None}}
        grades = {"grade": {i: p.grade for i, p in opened if p.grade is not None}}
        self.append(head + compressed({**line, **{k: v for k, v in (texts | raws | grades).items() if v}}))


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run on the test rows.

    Attributes:
        visible: The visible modalities, as in `evaluate.visible`.
        round: After which the adapter was evaluated; None if it was the result of a method without rounds of its own.
        client: Whose adapter it is, for method "local".
        predictions: One per test row. Their examples hold id, answer, choices and columns, not the fields; scores are the
            logarithms of the stored probabilities.
        has: Per test row the modalities that it truly has.
    """

    visible: str
    round: int | None
    client: int | None
    predictions: tuple[Prediction, ...]
    has: tuple[frozenset[str], ...]


def choice_probabilities(prediction: Prediction, one_hot: bool = False) -> list[float]:
    """Return the probability of each choice with six significant digits; [] for an open question."""
    if not prediction.scores:
        return []
    if one_hot:
        best = prediction.scores.index(max(prediction.scores))
        return [float(i == best) for i in range(len(prediction.scores))]
    return [float(f"{p:.6g}") for p in probabilities(prediction)]


def rows_line(examples: Sequence[Example]) -> dict[str, Any]:
    """Return the first line of the file."""
    sets: dict[tuple[str, ...], int] = {}
    rows = [
        {
            "id": example.id,
            "answer": example.answer,
            "choices": sets.setdefault(example.choices, len(sets)),
            "has": list(example.fields),
            "columns": dict(example.columns),
        }
        for example in examples
    ]
    return {"format": _FORMAT, "choices": [list(choices) for choices in sets], "rows": rows}


def compressed(line: Mapping[str, Any], level: int = 9) -> bytes:
    """Return a JSON line as a gzip member without a time, so that equal lines have equal bytes."""
    text = json.dumps(line, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"
    return gzip.compress(text.encode(), compresslevel=level, mtime=0)


def last_evaluations(path: Path) -> bytes:
    """Return a file of predictions with the last evaluation of each adapter alone, for an archive.

    Its lines are stored, not compressed: the archive compresses them better, and rows that runs share once.

    Args:
        path: `predictions.jsonl.gz`.

    Returns:
        The content of a file that `read_predictions` reads.

    Raises:
        FedmllmError: The file cannot be read, or is not such a file.
    """
    head, *lines = [*_lines(path)] or [{}]
    try:
        last = {(line["visible"], line["client"]): line for line in lines}
    except (KeyError, TypeError) as error:
        raise FedmllmError(f"{path}: not the predictions of a run: {type(error).__name__}: {error}") from None
    return b"".join(compressed(line, level=0) for line in (head, *last.values()) if line)


def read_predictions(path: Path, content: bytes | None = None) -> Iterator[Evaluation]:
    """Yield the evaluations of a run's `predictions.jsonl.gz`. A half-written end, left by a kill, is skipped.

    Args:
        path: The file.
        content: Of the file, if it has been read.

    Yields:
        The evaluations in the order of the file.

    Raises:
        FedmllmError: The file cannot be read, or is not such a file.
    """
    lines = _lines(path, content)
    try:
        head = next(lines, None)
        if head is None:
            return
        if head["format"] != _FORMAT:
            raise FedmllmError(f"{path}: format: got {head['format']!r}; this version of fedmllm reads {_FORMAT}")
        choices = [tuple(map(str, one)) for one in head["choices"]]
        examples = [
            Example(r["id"], {}, "", choices[r["choices"]], r["answer"], f"{path}:{number}", r["columns"])
            for number, r in enumerate(head["rows"], start=1)
        ]
        has = tuple(frozenset(r["has"]) for r in head["rows"])
        for line in lines:
            texts, raws, grades = line.get("text", {}), line.get("raw", {}), line.get("grade", {})
            predictions = tuple(
                Prediction(
                    example,
                    tuple(math.log(max(value, SMALLEST)) for value in p),
                    texts.get(str(i)),
                    raws.get(str(i), texts.get(str(i), "")),
                    grades.get(str(i)),
                )
                for i, (example, p) in enumerate(zip(examples, line["p"], strict=True))
            )
            yield Evaluation(line["visible"], line["round"], line["client"], predictions, has)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise FedmllmError(f"{path}: not the predictions of a run: {type(error).__name__}: {error}") from None


def final_evaluations(path: Path, visible: str = "", content: bytes | None = None) -> list[Evaluation]:
    """The evaluations of a run's result: that of the last adapter, or of each client's last one.

    Args:
        path: `predictions.jsonl.gz`.
        visible: The visible modalities, as in `evaluate.visible`; "" = those evaluated first.
        content: Of the file, if it has been read.

    Returns:
        One evaluation, or one per client; [] if there is none with these modalities.
    """
    last: dict[int | None, Evaluation] = {}
    for found in read_predictions(path, content):
        visible = visible or found.visible
        if found.visible == visible:
            last[found.client] = found
    clients = {client: one for client, one in last.items() if client is not None}
    return list(
        (clients or last).values()
    )  # method "personal" evaluates the global adapter too, which is not the result


def groups_of(predictions: Sequence[Prediction], column: str) -> list[str]:
    """Per row the group that it belongs to; [] if the rows have none."""
    if not column or any(column not in p.example.columns for p in predictions):
        return []
    return [p.example.columns[column] for p in predictions]


def _lines(path: Path, content: bytes | None = None) -> Iterator[dict[str, Any]]:
    try:
        content = path.read_bytes() if content is None else content
    except OSError as error:
        raise FedmllmError(f"{path}: cannot be read: {error.strerror}") from None
    while content:
        member = zlib.decompressobj(wbits=31)  # 31: one gzip member
        try:
            text = member.decompress(content)
        except zlib.error as error:
            raise FedmllmError(f"{path}: damaged: {error}") from None
        if not member.eof:
            return
        content = member.unused_data
        yield from map(json.loads, text.splitlines())
