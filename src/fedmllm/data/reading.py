"""Rows of files with their places, and checked cells.

Every reader (here those of JSON; delimited.py, excel.py and parquet_files.py have the others) yields (where, row), or
(where, DataError) for a row that is broken by itself, so that `collect` can fail or skip as the user asked. Files are
UTF-8, with or without BOM; lines end with LF or CRLF. Mojibake is kept as it is.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from fedmllm.core.errors import DataError
from fedmllm.core.rng import stream_seed
from fedmllm.core.types import Example
from fedmllm.data.base import Rows

RawRow = Mapping[str, Any]
_T = TypeVar("_T")
Placed = Iterator[tuple[str, RawRow | DataError]]
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of a surrogate; two of them make one character
MAX_QUOTED = 60  # characters of a cell in a message


class _Short(reprlib.Repr):
    """`repr` that stays short for any cell and never prints binary data."""

    def __init__(self) -> None:
        super().__init__()
        self.maxother = MAX_QUOTED

    def repr_str(self, x: str, level: int) -> str:
        return repr(x) if len(x) <= MAX_QUOTED else f"{x[: MAX_QUOTED - 3]!r}..."

    def repr_bytes(self, x: bytes, level: int) -> str:
        return f"<{len(x):,} bytes>"

    repr_bytearray = repr_memoryview = repr_bytes


_SHORT = _Short()


def quoted(value: object) -> str:
    """A cell as it stands in a message: `repr`, cut to about 60 characters, with the size in place of binary data."""
    text = _SHORT.repr(value)
    return text if len(text) <= MAX_QUOTED + 5 else f"{text[:MAX_QUOTED]}..."


def listed(names: Iterable[object]) -> str:
    """Names as they stand in a message: at most twenty, each cut to about 60 characters."""
    words = [text if len(text := str(name)) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..." for name in names]
    return ", ".join([*words[:20], *([f"and {len(words) - 20} more"] if len(words) > 20 else [])])


def find(root: Path, *names: str, hint: str) -> Path:
    """The first of the named files or folders under `root` that is there."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {hint}")
    for name in names:
        if is_there(root / name):
            return root / name
    raise DataError(f"{root}: has none of {', '.join(names)}; {hint}")


def is_there(path: Path) -> bool:
    """As `Path.exists`, which raises OSError for a name that is too long for the disk to have."""
    try:
        return path.exists()
    except OSError:
        return False


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line without its end), numbers from 1. Splits at LF only, since texts may hold other line separators."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                yield number, raw.rstrip(b"\n").removesuffix(b"\r")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def decoded(path: Path, number: int, raw: bytes) -> str | DataError:
    """The line as text, or a DataError that names its first bad byte."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{raw[error.start]:02x} in column {error.start + 1}"
        return DataError(f"{path}:{number}: not UTF-8: {byte}; convert the file to UTF-8")


def lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """As `raw_lines`, as text."""
    for number, raw in raw_lines(path):
        yield number, decoded(path, number, raw)


def jsonl_rows(path: Path) -> Placed:
    """One JSON object a line; blank lines are passed over."""
    for number, line in lines(path):
        where = f"{path}:{number}"
        if isinstance(line, DataError):
            yield where, line
        elif line.strip():
            try:
                yield where, _object(json.loads(line), where, line)
            except json.JSONDecodeError as error:
                yield where, DataError(f"{where}: not JSON: {error.msg} in column {error.colno}")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
                yield where, DataError(f"{where}: not JSON of a row: {error}")


def json_rows(path: Path) -> Placed:
    """The objects of a JSON list, placed as file:line[index] (index from 0)."""
    text = json_text(path)
    decoder, position, index, line, counted = json.JSONDecoder(), _skip(text, 0), 0, 1, 0
    if text[position : position + 1] != "[":
        raise DataError(f"{path}:1: a JSON list of rows is expected here, not {quoted(text[position : position + 20])}")
    position = _skip(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}[{index}]"
        try:
            value, position = decoder.raw_decode(text, position)
            row = _object(value, where, text[counted:position])
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}[{index}]: not JSON: {error.msg} in column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
            raise DataError(f"{where}: not JSON of a row: {error}") from None
        yield where, row
        index, position = index + 1, _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{where}: not JSON: ',' or ']' is missing after this row")
    if rest := text[_skip(text, position + 1) :]:
        line += text.count("\n", counted, len(text) - len(rest))
        raise DataError(f"{path}:{line}: nothing is expected after the end of the list, not {rest[:20]!r}")


def json_text(path: Path) -> str:
    """A whole JSON file as text."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise next(line for _, line in lines(path) if isinstance(line, DataError)) from None


def half_character(value: object, source: str) -> str:
    """Half of a character in a JSON value ("\\ud83d" without its other half), if there is one, else "".

    JSON can write it, but it is not text: neither a file nor a digest can hold it. `source` is what `value` was read from.
    """
    if not _HALF.search(source):
        return ""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return ascii(error.object[error.start])
    return ""


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _object(value: object, where: str, source: str) -> RawRow | DataError:
    if not isinstance(value, dict):
        return DataError(f"{where}: a JSON object is expected, not {quoted(value)}")
    if half := half_character(value, source):
        return DataError(f"{where}: {half} is half of a character; write the other half too, or leave it out")
    return value


def collect(
    rows: Iterator[tuple[str, _T | DataError]],
    make: Callable[[str, _T], Example | None],
    on_bad_row: Literal["fail", "skip"],
    known: dict[str, str] | None = None,
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
            key = id_key(example.id)
            if key in known:
                raise DataError(f"{where}: id {quoted(example.id)} is already that of {known[key]}")
        except DataError as error:
            if on_bad_row == "fail":
                raise
            skipped.append(str(error))
            continue
        known[key] = where
        examples.append(example)
    if skipped and not examples:
        raise DataError(f"{skipped[0]} (and so for every row: none of {len(skipped)} can be used)")
    return Rows(tuple(examples), tuple(skipped))


def filled(rows: Rows, place: Path, split: str) -> Rows:
    """The rows; a split to train or test on that has none is an error. Only a validation split may be empty."""
    if not rows.examples and split != "validation":
        raise DataError(f"{place}: no rows for the {split} split")
    return rows


def take(row: RawRow, name: str, where: str) -> Any:
    """A required cell. Raises DataError if it is not there or null."""
    value = row.get(name)
    if value is None:
        raise DataError(f"{where}: no {name!r}; the row has: {listed(row)}")
    return value


def take_text(row: RawRow, name: str, where: str) -> str:
    """A cell as text: numbers are written out, since answers such as 4 come as integers."""
    value = row.get(name)
    return value if isinstance(value, str) else as_text(take(row, name, where), name, where)


def take_filled(row: RawRow, name: str, where: str) -> str:
    """A question or an answer, which may not be blank: nothing could be asked or learned, and no response would be right."""
    text = take_text(row, name, where).strip()
    if is_blank(text):
        raise DataError(f"{where}: {name!r} is empty")
    return text


def is_blank(text: str) -> bool:
    """True if nothing of a text is visible: blanks, and characters without width such as U+200B."""
    rest = text.strip()
    return not rest or (not rest.isascii() and not any(unicodedata.category(c)[0] in "LMNPS" for c in rest))


def as_text(value: object, name: str, where: str) -> str:
    """A value of column `name` as text. 1.0 is "1": a column of whole numbers with a gap is one of floats in a table."""
    if isinstance(value, float) and math.isfinite(value):
        return str(whole(value))
    if value is None or isinstance(value, (dict, list, bytes, float)):
        raise DataError(f"{where}: {name!r} is {quoted(value)}, not a text")
    return str(value)


def whole(value: object) -> object:
    """1 for 1.0, anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def take_id(row: RawRow, name: str, where: str) -> int | str:
    """A cell that names its row."""
    return as_id(take(row, name, where), name, where)


def as_id(value: object, name: str, where: str) -> int | str:
    """A value of column `name` as a row's id: a whole number or a text that is not blank."""
    number = whole(value)
    if isinstance(number, bool) or not isinstance(number, (int, str)) or not str(number).strip():
        raise DataError(f"{where}: {name!r} is {quoted(value)}, neither a number nor a text")
    return number


def id_key(number: int | str) -> str:
    """An id as it counts: 1 and "1", and texts that look equal, name the same row."""
    return unicodedata.normalize("NFC", str(number).strip())


def id_keys(ids: Sequence[int | str]) -> set[str]:
    """The keys of many ids."""
    texts = list(map(str, ids))
    return set(map(str.strip, texts)) if "".join(texts).isascii() else set(map(id_key, ids))


def picture(folder: Path, name: object, where: str) -> Path:
    """Resolve an image path of a row. The file itself is not opened.

    Raises:
        DataError: The cell is not a path, or the path leaves `folder`.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DataError(f"{where}: {quoted(name)} is not an image path")
    name = name.strip()
    if name.startswith("data:") or len(name) > 4096 or max(map(len, name.split("/"))) > 255:
        raise DataError(
            f"{where}: {quoted(name)} has {len(name):,} characters and is not an image path; "
            "write pictures that are inside of rows to files, and name their paths"
        )
    if re.match(r"https?://", name):
        raise DataError(f"{where}: {quoted(name)} is an address; pictures are read from disk: download them first")
    path = _joined(folder, name)
    if ".." in name or ":" in name or name[0] in "/\\":  # no other name can leave the folder
        inside(path, folder, f"{where}: image {quoted(name)}")
    return path


@lru_cache(maxsize=4096)
def _joined(folder: Path, name: str) -> Path:
    """`folder / name`; one object for the rows of a picture, which often follow each other."""
    return folder / name


def inside(path: Path, folder: Path, place: str) -> None:
    """Refuse a path that leaves `folder`.

    The check is on the path's text: a link inside the folder may lead anywhere, since it is the user's own.
    """
    top = os.path.abspath(folder)  # noqa: PTH100  (Path.resolve would ask the disk for every row)
    outside = os.path.commonpath([top, os.path.abspath(path)]) != top  # noqa: PTH100
    if outside or ("\\" in path.name and ".." in path.name):
        raise DataError(f"{place} lies outside of {folder}; refused")


def readable(name: str, folder: str) -> str:
    """The name of a file, which becomes an id or a client: bytes that are not UTF-8 are refused."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{folder}: the name of the file {name!a} is not UTF-8; rename it") from None
    return name


def held_out(rate: float, key: str) -> bool:
    """Return whether the group `key` (an image, a scene, a row) is kept out of training, in every run and file order alike."""
    return stream_seed(0, "held-out", key) / 2**63 < rate
