"""Rows of CSV and TSV files.

Both begin with a line that names the columns. A broken row does not stop the reading of the others.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedmllm.core.errors import DataError
from fedmllm.data.reading import Placed, decoded, lines, quoted, raw_lines

MAX_JOINED = 50  # lines that one quoted TSV field may span
MAX_CELL = 10_000_000  # characters of a CSV cell; the csv module's own 131,072 are less than some reports have


def tsv_rows(path: Path) -> Placed:
    """Rows of a file with tabs and a header, whatever quotes the texts hold.

    A stray quote never swallows the lines after it. A field that is quoted as csv would write it ("a ""b"" c") is
    unquoted, also where it spans lines.
    """
    source = lines(path)
    _, first = next(source, (1, ""))
    if isinstance(first, DataError):
        raise first
    header = header_cells(path, [_unquoted(name) for name in first.split("\t")] if first.strip() else [])
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
            yield where, _other_width(where, cells, header)


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


def _is_open(cell: str) -> bool:
    """Return whether a quoted field begins here that does not end here."""
    return cell.startswith('"') and cell.count('"') % 2 == 1


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def csv_rows(path: Path, delimiter: str = "") -> Placed:
    """Rows of a csv file with a header (RFC 4180: fields may be quoted and span lines).

    After a row that is not csv, reading continues with the line after its first one: a quote that was left open does not
    swallow the rows below.

    Args:
        path: The file.
        delimiter: Between the cells; "" = comma or semicolon, whichever the header has more of.
    """
    csv.field_size_limit(MAX_CELL)
    source, again = raw_lines(path), deque[tuple[int, bytes]]()
    if first := next(source, None):
        declared = re.fullmatch(rb"sep=(.)", first[1])  # Excel writes this line in front of the header
        delimiter = delimiter or (declared[1].decode("latin-1") if declared else _delimiter(first[1]))
        if not declared:
            again.append(first)
    taken: list[tuple[int, bytes]] = []  # the lines of the row that is being read
    bad: list[DataError] = []  # those of them that are not UTF-8

    def texts() -> Iterator[str]:
        while entry := again.popleft() if again else next(source, None):
            taken.append(entry)
            text = decoded(path, *entry)
            if isinstance(text, DataError):
                bad.append(text)
                text = entry[1].decode("utf-8", "replace")  # its quotes still mark the end of the row
            yield text + "\n"

    reader = csv.reader(texts(), strict=True, delimiter=delimiter or ",")
    header: list[str] = []
    while True:
        taken.clear()
        bad.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            where = f"{path}:{taken[0][0]}"
            broken = DataError(f"{where}: not csv: {_reason(error)}")
            if not header:
                raise broken from None
            yield where, broken
            again.extendleft(reversed(taken[1:]))
            reader = csv.reader(
                texts(), strict=True, delimiter=delimiter or ","
            )  # the old one may have seen the end of the file
            continue
        if cells is None:
            break
        where = f"{path}:{taken[0][0]}"
        if not header:
            if bad:
                raise bad[0]
            header = header_cells(path, cells) if cells else []
        elif bad:
            yield where, bad[0]
        elif len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        elif cells:
            yield where, _other_width(where, cells, header)
    if not header:
        header_cells(path, [])


def csv_blocks(path: Path, delimiter: str, size: int) -> Iterator[tuple[list[str], list[int], list[list[str]]]]:
    """The rows of a csv file in blocks. It takes a fraction of the time of `csv_rows`, but reads no file with a broken line.

    Args:
        path: The file.
        delimiter: As for `csv_rows`.
        size: Rows of a block, at most.

    Yields:
        Names of the columns; the lines on which rows begin; cells of the rows, as many as there are.

    Raises:
        ValueError: The file is one for `csv_rows`, which says where it is broken.
        DataError: The header is bad.
    """
    csv.field_size_limit(MAX_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            first = next(file, "")
            if first.startswith("sep="):
                raise ValueError("a declared delimiter")
            reader = csv.reader(
                itertools.chain([first], file), strict=True, delimiter=delimiter or _delimiter(first.encode())
            )
            header = header_cells(path, next(reader, []))
            numbers: list[int] = []
            rows: list[list[str]] = []
            end = reader.line_num
            for cells in reader:
                start, end = end + 1, reader.line_num
                if end > start and any("\r" in cell for cell in cells):
                    raise ValueError("a text with two kinds of line ends")
                if cells:
                    numbers.append(start)
                    rows.append(cells)
                if len(rows) == size:
                    yield header, numbers, rows
                    numbers, rows = [], []
            if rows:
                yield header, numbers, rows
    except (OSError, csv.Error) as error:
        raise ValueError(str(error)) from None


def _delimiter(header: bytes) -> str:
    """Excel separates with semicolons where the comma is the decimal sign."""
    outside = b"".join(header.split(b'"')[::2])
    return ";" if outside.count(b";") > outside.count(b",") else ","


def _reason(error: csv.Error) -> str:
    """The csv module's words, or better ones where these speak of its own settings."""
    if "new-line character" in str(error):
        return "a carriage return outside of quotes; lines end with LF or CRLF"
    if "field limit" in str(error):
        return f"a cell of more than {MAX_CELL:,} characters; is a quote left open in this row?"
    return f"{error}; is a quote left open in this row?"


def header_cells(path: Path, cells: Sequence[str]) -> list[str]:
    """The names of the columns. Several may have none (Excel writes empty columns); no other name may come twice."""
    names = [cell.strip() for cell in cells]
    if not names:
        raise DataError(f"{path}:1: empty; a header line with the names of the columns is expected")
    if twice := [name for i, name in enumerate(names) if name and name in names[:i]]:
        raise DataError(f"{path}:1: the column {quoted(twice[0])} stands in the header twice")
    return names


def _other_width(where: str, cells: Sequence[str], header: Sequence[str]) -> DataError:
    return DataError(f"{where}: {len(cells)} columns; the header has {len(header)}")
