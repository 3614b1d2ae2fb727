"""Check of every picture that a run will use, before it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fedmllm.core.errors import DataError
from fedmllm.core.images import num_frames, open_image
from fedmllm.core.types import Example, Shard, Visible
from fedmllm.data.base import OnBadRow
from fedmllm.data.reading import listed, quoted

FRAMED = frozenset({".apng", ".avif", ".gif", ".mpo", ".png", ".tif", ".tiff", ".webp", ""})  # may hold several frames


class CheckedShards(NamedTuple):
    """Shards without the rows whose pictures cannot be read.

    Attributes:
        shards: One per client, as before.
        skipped: One message per row that was left out.
        notes: Findings about pictures that can be read.
    """

    shards: tuple[Shard, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]


class CheckedRows(NamedTuple):
    """As `CheckedShards`, for rows that belong to no client."""

    examples: tuple[Example, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]


def check_shards(examples: Sequence[Example], shards: Sequence[Shard], on_bad_row: OnBadRow) -> CheckedShards:
    """Read every picture that is visible to a client.

    The partition stays as it was drawn: leaving a row out moves no other row to another client. Hidden pictures are not read.

    Args:
        examples: The training rows.
        shards: The clients' rows and masks.
        on_bad_row: Stop at the first picture that cannot be read, or leave its row out.

    Raises:
        DataError: A picture cannot be read, if `on_bad_row` is "fail"; names the row's file:line and id.
    """
    visible = ((row, mask) for shard in shards for row, mask in zip(shard.rows, shard.visible, strict=True))
    bad, notes = _check(examples, visible, on_bad_row)
    return CheckedShards(tuple(_without(shard, bad) for shard in shards), tuple(bad.values()), notes)


def check_rows(examples: Sequence[Example], visible: Visible, on_bad_row: OnBadRow) -> CheckedRows:
    """As `check_shards`, for test rows, which are all visible alike."""
    bad, notes = _check(examples, ((row, visible) for row in range(len(examples))), on_bad_row)
    kept = tuple(example for row, example in enumerate(examples) if row not in bad)
    return CheckedRows(kept, tuple(bad.values()), notes)


def _check(
    examples: Sequence[Example], visible: Iterable[tuple[int, Visible]], on_bad_row: OnBadRow
) -> tuple[dict[int, str], tuple[str, ...]]:
    """Row -> what is wrong with one of its pictures; and notes. Each file is read once."""
    bad: dict[int, str] = {}
    faults: dict[Path, str] = {}  # "" = the file is sound
    framed: list[str] = []
    for row, mask in visible:
        example = examples[row]
        for content in example.visible_fields(mask).values():
            for path in content if isinstance(content, tuple) else ():
                place = f"{example.where}: row {quoted(example.id)}"
                if path not in faults:
                    try:
                        look_at(path, place)
                        faults[path] = ""
                        if path.suffix.lower() in FRAMED and (frames := num_frames(path)) > 1:
                            framed.append(f"{path.name} ({frames})")
                    except DataError as error:
                        if on_bad_row == "fail":
                            raise
                        faults[path] = str(error).removeprefix(place)
                if faults[path]:
                    bad.setdefault(row, f"{place}{faults[path]}")
    number = f"{len(framed)} picture{'s' if len(framed) > 1 else ''}"
    notes = (f"{number} with several frames or pages, of which the first is used: {listed(framed)}",) if framed else ()
    return bad, notes


def look_at(path: Path, where: str) -> None:
    """Decode a picture, as a model will later: damage in its middle does not show in its header or its end.

    Raises:
        DataError: It cannot be read.
    """
    open_image(path, where)


def _without(shard: Shard, bad: dict[int, str]) -> Shard:
    kept = [(row, mask) for row, mask in zip(shard.rows, shard.visible, strict=True) if row not in bad]
    return dataclasses.replace(shard, rows=tuple(r for r, _ in kept), visible=tuple(v for _, v in kept))
