"""Rows of a Parquet file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedmllm.core.errors import DataError
from fedmllm.data.reading import Placed


def parquet_rows(path: Path, columns: Iterable[str]) -> Placed:
    """Rows of a Parquet file, in batches, the named columns only. Pictures inside the file are refused."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'fedmllm[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
    except (OSError, ValueError, arrow.ArrowException) as error:  # ValueError: a name that is not UTF-8
        raise DataError(f"{path}: not a Parquet file: {error}") from None
    wanted = [name for name in names if name in set(columns)]
    for name in wanted:
        if names.count(name) > 1:
            raise DataError(f"{path}: the column {name!r} is there twice")
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
        except (OSError, ValueError, arrow.ArrowException) as error:
            raise DataError(f"{path}[{index}]: cannot be read from here on: {error}") from None
        if batch is None:
            return
        for row in _python_rows(batch):
            where = f"{path}[{index}]"
            yield where, DataError(f"{where}: cannot be read: {row}") if isinstance(row, Exception) else row
            index += 1


def _python_rows(batch: Any) -> list[dict[str, Any] | Exception]:
    """The rows as Python values; where one has none (bytes that are not UTF-8, the year 20000) what was raised instead."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            return [error]
        return [row for i in range(len(batch)) for row in _python_rows(batch.slice(i, 1))]
