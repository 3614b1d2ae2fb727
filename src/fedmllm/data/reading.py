"""Rows out of files, each with its place, one at a time. A row that cannot be read is named, not guessed at.

Every reader yields (where, row), or (where, DataError) for a row that is broken by itself, so that `collect` can fail or
skip as the user asked. Files are UTF-8, with or without BOM; lines end with LF or CRLF. Mojibake is kept as it is.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from fedmllm.data import Rows
from fedmllm.rng import stream_seed
from fedmllm.types import DataError, Example

Row = Mapping[str, Any]
Placed = Iterator[tuple[str, Row | DataError]]
MAX_JOINED = 50  # lines that one quoted TSV field may span


def find(root: Path, *names: str, hint: str) -> Path:
    """The first of the named files or folders under `root` that is there."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {hint}")
    for name in names:
        if (root / name).exists():
            return root / name
    raise DataError(f"{root}: has none of {', '.join(names)}; {hint}")


def lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """(number, line without its end), numbers from 1. Splits at LF only, since texts may hold other line separators."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                try:
                    yield number, raw.rstrip(b"\n").removesuffix(b"\r").decode("utf-8")
                except UnicodeDecodeError as error:
                    byte = f"byte 0x{raw[error.start]:02x} in column {error.start + 1}"
                    yield number, DataError(f"{path}:{number}: not UTF-8: {byte}; convert the file to UTF-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def jsonl_rows(path: Path) -> Placed:
    """One JSON object a line; blank lines are passed over."""
    for number, line in lines(path):
        where = f"{path}:{number}"
        if isinstance(line, DataError):
            yield where, line
        elif line.strip():
            try:
                yield where, _object(json.loads(line), where)
            except json.JSONDecodeError as error:
                yield where, DataError(f"{where}: not JSON: {error.msg} in column {error.colno}")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
                yield where, DataError(f"{where}: not JSON of a row: {error}")


def json_rows(path: Path) -> Placed:
    """The objects of a JSON list, placed as file:line[index] (index from 0)."""
    text = json_text(path)
    decoder, position, index, line, counted = json.JSONDecoder(), _skip(text, 0), 0, 1, 0
    if text[position : position + 1] != "[":
        raise DataError(f"{path}:1: a JSON list of rows is expected here, not {text[position : position + 20]!r}")
    position = _skip(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}[{index}]"
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}[{index}]: not JSON: {error.msg} in column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
            raise DataError(f"{where}: not JSON of a row: {error}") from None
        yield where, _object(value, where)
        index, position = index + 1, _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{where}: not JSON: ',' or ']' is missing after this row")


def json_text(path: Path) -> str:
    """A whole JSON file as text."""
    decoded = [(number, line) for number, line in lines(path)]
    for _, line in decoded:
        if isinstance(line, DataError):
            raise line
    return "\n".join(str(line) for _, line in decoded)


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _object(value: object, where: str) -> Row | DataError:
    return value if isinstance(value, dict) else DataError(f"{where}: a JSON object is expected, not {value!r:.60}")


def tsv_rows(path: Path) -> Placed:
    """Rows of a file with tabs and a header, whatever quotes the texts hold.

    A stray quote never swallows the lines after it. A field that is quoted as csv would write it ("a ""b"" c") is
    unquoted, also where it spans lines.
    """
    source = lines(path)
    header = _header(path, source)
    ahead: deque[tuple[int, str | DataError]] = deque()
    while entry := ahead.popleft() if ahead else next(source, None):
        number, line = entry
        where = f"{path}:{number}"
        if isinstance(line, DataError):
            yield where, line
            continue
        cells = line.split("\t")
        if len(cells) < len(header) and _is_open(cells[-1]):
            ahead.extend(itertools.islice(source, MAX_JOINED - len(ahead)))
            cells = _joined(cells, ahead, len(header))
        if len(cells) == len(header):
            yield where, dict(zip(header, map(_unquoted, cells), strict=True))
        elif line:
            yield where, DataError(f"{where}: {len(cells)} columns; the header has {len(header)}")


def _joined(cells: list[str], ahead: deque[tuple[int, str | DataError]], width: int) -> list[str]:
    """The cells with as many lines of `ahead` as the open field at their end spans; unchanged if it never closes."""
    longer = cells
    for taken, (_, line) in enumerate(ahead, start=1):
        if isinstance(line, DataError):
            break
        head, *tail = line.split("\t")
        longer = [*longer[:-1], f"{longer[-1]}\n{head}", *tail]
        if len(longer) > width or (tail and _is_open(longer[len(cells) - 1])):
            break
        if len(longer) == width and not _is_open(longer[-1]):
            for _ in range(taken):
                ahead.popleft()
            return longer
    return cells


def _header(path: Path, source: Iterator[tuple[int, str | DataError]]) -> list[str]:
    _, first = next(source, (1, ""))
    if isinstance(first, DataError):
        raise first
    if not first.strip():
        raise DataError(f"{path}:1: empty; a header line with the names of the columns is expected")
    return [_unquoted(name).strip() for name in first.split("\t")]


def _is_open(cell: str) -> bool:
    """Does a quoted field begin here that does not end here?"""
    return cell.startswith('"') and cell.count('"') % 2 == 1


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def csv_rows(path: Path, delimiter: str = ",") -> Placed:
    """Rows of a csv file with a header (RFC 4180: fields may be quoted and span lines)."""
    decoded: list[int] = []

    def texts() -> Iterator[str]:
        for number, line in lines(path):
            if isinstance(line, DataError):
                raise line
            decoded.append(number)
            yield line + "\n"

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    header: list[str] = []
    begins = 1
    try:
        for cells in reader:
            where, begins = f"{path}:{begins}", len(decoded) + 1
            if not header:
                header = [cell.strip() for cell in cells]
                if twice := [name for i, name in enumerate(header) if name in header[:i]]:
                    raise DataError(f"{path}:1: the column {twice[0]!r} stands in the header twice")
            elif len(cells) == len(header):
                yield where, dict(zip(header, cells, strict=True))
            elif cells:
                yield where, DataError(f"{where}: {len(cells)} columns; the header has {len(header)}")
    except csv.Error as error:
        raise DataError(f"{path}:{begins}: not csv: {error}; is a quote left open in this row?") from None
    if not header:
        raise DataError(f"{path}:1: empty; a header line with the names of the columns is expected")


def parquet_rows(path: Path, columns: Iterable[str]) -> Placed:
    """Rows of a Parquet file, in batches, the named columns only. Pictures inside the file are refused."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'fedmllm[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
    except (OSError, arrow.ArrowInvalid) as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from None
    wanted = [name for name in file.schema_arrow.names if name in set(columns)]
    for name in wanted:
        kind = file.schema_arrow.field(name).type
        if arrow.types.is_struct(kind) or arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind):
            raise DataError(
                f"{path}: column {name!r} holds {kind}; write the pictures to files and name their paths here"
            )
    index = 0
    batches = file.iter_batches(batch_size=4096, columns=wanted)
    while True:
        try:
            batch = next(batches, None)
        except (OSError, arrow.ArrowException) as error:
            raise DataError(f"{path}[{index}]: cannot be read from here on: {error}") from None
        if batch is None:
            return
        for row in batch.to_pylist():
            yield f"{path}[{index}]", row
            index += 1


def collect(
    rows: Placed,
    make: Callable[[str, Row], Example | None],
    on_bad_row: Literal["fail", "skip"],
    known: dict[str | int, str] | None = None,
) -> Rows:
    """Examples of the rows, in file order; None = the row is not of this split.

    A second row with an id is bad too; `known` remembers id -> place over several files.
    """
    examples: list[Example] = []
    skipped: list[str] = []
    known = {} if known is None else known
    for where, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            example = make(where, row)
            if example is None:
                continue
            if example.id in known:
                raise DataError(f"{where}: id {example.id!r} is already that of {known[example.id]}")
        except DataError as error:
            if on_bad_row == "fail":
                raise
            skipped.append(str(error))
            continue
        known[example.id] = where
        examples.append(example)
    if skipped and not examples:
        raise DataError(f"{skipped[0]} (and so for every row: none of {len(skipped)} can be used)")
    return Rows(tuple(examples), tuple(skipped))


def take(row: Row, name: str, where: str) -> Any:
    """A cell that must be there."""
    value = row.get(name)
    if value is None:
        raise DataError(f"{where}: no {name!r}; the row has: {', '.join(map(str, row))}")
    return value


def take_text(row: Row, name: str, where: str) -> str:
    """A cell as text: numbers are written out, since answers such as 4 come as integers."""
    value = take(row, name, where)
    if isinstance(value, (dict, list)):
        raise DataError(f"{where}: {name!r} is {value!r:.60}, not a text")
    return str(value)


def picture(folder: Path, name: object, where: str) -> Path:
    """`folder / name`, which may not leave `folder`. The file itself is not looked at."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DataError(f"{where}: {name!r} is no image path")
    path = folder / name.strip()
    inside(path, folder, f"{where}: image {name!r}")
    return path


def inside(path: Path, folder: Path, place: str) -> None:
    """Refuse a path that leaves `folder`.

    The check is on the path's text: a link inside the folder may lead anywhere, since it is the user's own.
    """
    top = os.path.abspath(folder)  # noqa: PTH100  (Path.resolve would ask the disk for every row)
    outside = os.path.commonpath([top, os.path.abspath(path)]) != top  # noqa: PTH100
    if outside or ("\\" in path.name and ".." in path.name):
        raise DataError(f"{place} lies outside of {folder}; refused")


def held_out(rate: float, key: str) -> bool:
    """Is the group `key` (an image, a scene, a row) kept out of training? The same answer in every run and file order."""
    return stream_seed(0, "held-out", key) / 2**63 < rate
