"""The table of promises and tests names every promise, and tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "results/privacy.md"
IDS = [f"{kind}{i}" for kind, last in (("T", 10), ("R", 7), ("S", 8)) for i in range(1, last + 1)]


def test_each_promise_has_a_test_that_exists() -> None:
    text = TABLE.read_text()
    rows = dict(re.findall(r"^\| ([TRS]\d+) \| .* \| (.+) \|$", text, flags=re.MULTILINE))
    assert list(rows) == IDS
    assert all("::" in tests for tests in rows.values())
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        defined = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert name in defined, f"{file}::{name}"
