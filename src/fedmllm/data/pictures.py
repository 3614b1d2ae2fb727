"""Look at every picture that a run will show before it starts, cheaply: hours later is too late to find a broken one."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from fedmllm.core.errors import DataError
from fedmllm.core.images import MAX_PIXELS, open_image
from fedmllm.core.types import Example, Shard, Visible

OnBadRow = Literal["fail", "skip"]
_TAILS = {"PNG": (b"IEND\xaeB`\x82", 12), "JPEG": (b"\xff\xd9", 2), "MPO": (b"\xff\xd9", 2)}  # end mark, bytes to read


def check_shards(
    examples: Sequence[Example], shards: Sequence[Shard], on_bad_row: OnBadRow
) -> tuple[tuple[Shard, ...], tuple[str, ...]]:
    """The shards without rows that show a picture which cannot be read, and one message for each of those.

    The partition stays as it was drawn: skipping a row moves no other row to another client. A picture that is hidden is
    not looked at. Raises DataError naming the row's file:line and id, if `on_bad_row` is "fail".
    """
    shown = ((row, visible) for shard in shards for row, visible in zip(shard.rows, shard.visible, strict=True))
    bad = bad_rows(examples, shown, on_bad_row)
    return tuple(_without(shard, bad) for shard in shards), tuple(bad.values())


def check_rows(
    examples: Sequence[Example], visible: Visible, on_bad_row: OnBadRow
) -> tuple[tuple[Example, ...], tuple[str, ...]]:
    """As `check_shards`, for rows that belong to no client and all show `visible`: a test set."""
    bad = bad_rows(examples, ((row, visible) for row in range(len(examples))), on_bad_row)
    return tuple(example for row, example in enumerate(examples) if row not in bad), tuple(bad.values())


def bad_rows(examples: Sequence[Example], shown: Iterable[tuple[int, Visible]], on_bad_row: OnBadRow) -> dict[int, str]:
    """Row -> what is wrong with a picture that it shows. Each file is looked at once."""
    bad: dict[int, str] = {}
    fine: set[Path] = set()
    for row, visible in shown:
        example = examples[row]
        for content in example.visible_fields(visible).values():
            for path in content if isinstance(content, tuple) else ():
                try:
                    if path not in fine:
                        look_at(path, f"{example.where}: row {example.id!r}")
                        fine.add(path)
                except DataError as error:
                    if on_bad_row == "fail":
                        raise
                    bad.setdefault(row, str(error))
    return bad


def look_at(path: Path, where: str) -> None:
    """Raise DataError if the picture cannot be read. A file with a sound header and end is not decoded."""
    if not _ends_well(path):
        open_image(path, where)


def _ends_well(path: Path) -> bool:
    from PIL import Image

    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                width, height = image.size
                mark, length = _TAILS.get(image.format or "", (b"", 0))
            file.seek(-length, 2)
            return bool(mark) and mark in file.read() and width * height <= MAX_PIXELS
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _without(shard: Shard, bad: dict[int, str]) -> Shard:
    kept = [(row, mask) for row, mask in zip(shard.rows, shard.visible, strict=True) if row not in bad]
    return dataclasses.replace(shard, rows=tuple(r for r, _ in kept), visible=tuple(v for _, v in kept))
