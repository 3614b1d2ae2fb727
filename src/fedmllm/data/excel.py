"""Rows of an Excel workbook (.xlsx)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedmllm.core.errors import DataError
from fedmllm.data.delimited import header_cells
from fedmllm.data.reading import Placed, listed

NOT_AVAILABLE = "#N/A"


def excel_rows(path: Path, sheet: str = "") -> Placed:
    """Yield the rows of one sheet, below a header. Formulas count with the value that Excel has stored.

    Args:
        path: The workbook.
        sheet: Name of the sheet; "" = the only one that has cells.

    Raises:
        DataError: openpyxl is not installed, the file is not a workbook, or the sheet is not there or not the only one.
    """
    try:
        import openpyxl
    except ModuleNotFoundError:
        raise DataError(f"{path}: reading Excel needs openpyxl: pip install 'fedmllm[excel]'") from None
    try:
        workbook = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # a broken zip file, or XML that is broken in any way
        raise DataError(f"{path}: not an Excel workbook: {error}") from None
    try:
        yield from _rows(path, _lines(path, _chosen(path, workbook, sheet)))
    finally:
        workbook.close()


def _chosen(path: Path, workbook: Any, name: str) -> Any:
    if name and name not in workbook.sheetnames:
        raise DataError(f"{path}: no sheet {name!r}; sheets: {listed(workbook.sheetnames)}")
    if name:
        return workbook[name]
    filled = [sheet for sheet in workbook.worksheets if any(cells for _, cells in _lines(path, sheet))]
    if len(filled) > 1:
        raise DataError(f"{path}: several sheets have rows: {listed(s.title for s in filled)}; name one: data.sheet")
    return filled[0] if filled else None


def _lines(path: Path, sheet: Any) -> Iterator[tuple[int, list[Any]]]:
    """(row number, cells without the empty ones at the end), for rows that are not empty."""
    rows = sheet.iter_rows(values_only=True) if sheet is not None else ()
    number = 0
    try:
        for number, cells in enumerate(rows, start=1):
            line = list(cells)
            while line and line[-1] in (None, ""):
                line.pop()
            if line:
                yield number, line
    except Exception as error:  # as above: the sheet's XML is read while its rows are
        raise DataError(f"{path}:{number + 1}: cannot be read from here on: {error}") from None


def _rows(path: Path, lines: Iterator[tuple[int, list[Any]]]) -> Placed:
    _, first = next(lines, (1, []))
    header = header_cells(path, ["" if cell is None else str(cell) for cell in first])
    for number, cells in lines:
        where = f"{path}:{number}"
        if len(cells) > len(header):
            yield where, DataError(f"{where}: {len(cells)} columns; the header has {len(header)}")
            continue
        cells += [None] * (len(header) - len(cells))
        row = {name: None if cell == NOT_AVAILABLE else cell for name, cell in zip(header, cells, strict=True)}
        if fault := next((name for name, cell in row.items() if isinstance(cell, str) and cell in _FAULTS), ""):
            yield where, DataError(f"{where}: the cell in column {fault!r} holds Excel's error {row[fault]}")
        else:
            yield where, row


_FAULTS = frozenset({"#REF!", "#DIV/0!", "#VALUE!", "#NAME?", "#NULL!", "#NUM!"})
