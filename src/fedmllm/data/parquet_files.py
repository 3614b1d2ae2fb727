"""Rows of a Parquet file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedmllm.core.errors import DataError
from fedmllm.data.reading import Placed


def parquet_rows(path: Path, columns: Iterable[str]) -> Placed:
    """Yield the rows in batches, the named columns only.

    Raises:
        DataError: pyarrow is not installed, the file is not Parquet, or a column holds pictures instead of their paths.
    """
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
        if _holds_objects(kind):
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


def _holds_objects(kind: Any) -> bool:
    """True for binary data, structs and maps, at any depth: datasets writes pictures as (lists of) struct<bytes, path>."""
    from pyarrow import BaseExtensionType, types

    if isinstance(kind, BaseExtensionType):
        return _holds_objects(kind.storage_type)
    if types.is_dictionary(kind):
        return _holds_objects(kind.value_type)
    if types.is_nested(kind) and not (types.is_struct(kind) or types.is_map(kind) or types.is_union(kind)):
        return _holds_objects(kind.value_type)
    return bool(types.is_nested(kind)) or "binary" in str(kind)


def _python_rows(batch: Any) -> list[dict[str, Any] | Exception]:
    """The rows as Python values; in place of a row that has none (not UTF-8, the year 20000), what was raised."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            return [error]
        return [row for i in range(len(batch)) for row in _python_rows(batch.slice(i, 1))]
