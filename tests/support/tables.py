"""Tables of a user's own rows, written and loaded in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedmllm.core.errors import DataError
from fedmllm.data.base import Rows
from support import rawsets

COLUMNS = {"image": "scan"}


def load(root: Path, train: str, split: str = "train", **settings: Any) -> Rows:
    settings = {"question": "?", "columns": COLUMNS, **settings}
    return rawsets.dataset("table", root, train=train, **settings).load(split)


def refused(root: Path, content: bytes | str, ending: str, message: str, **settings: Any) -> None:
    """The second of three rows is bad: it fails with `message`, and skipping leaves the other two."""
    (root / f"a.{ending}").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load(root, f"a.{ending}", **settings)
    rows = load(root, f"a.{ending}", on_bad_row="skip", **settings)
    assert [str(e.fields["image"][0].name) for e in rows.examples] == ["1.png", "3.png"]
    assert len(rows.skipped) == 1


def as_parquet(path: Path, columns: dict[str, Any]) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)
    return path
