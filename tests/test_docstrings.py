"""Docstrings of the exported names: every argument and result is described."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import fedmllm


def functions(name: str) -> Iterator[tuple[str, Any, bool]]:
    """(name, function, whether it is a property) of an exported function, or of an exported class's own public methods."""
    exported = getattr(fedmllm, name)
    if inspect.isfunction(exported):
        yield name, exported, False
    for key, member in vars(exported).items() if inspect.isclass(exported) else ():
        found = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not key.startswith("_") and inspect.isfunction(found):
            yield f"{name}.{key}", found, isinstance(member, property)


def gaps(name: str, function: Any, is_property: bool) -> list[str]:
    """The parts of the signature that the docstring does not describe."""
    text, signature = function.__doc__ or "", inspect.signature(function)
    found = [] if text.strip() else ["docstring"]
    arguments = [p for p in signature.parameters if p not in ("self", "cls")]
    found += [f"argument {p}" for p in arguments if not re.search(rf"^\s+\*{{0,2}}{p}:", text, re.MULTILINE)]
    if (
        not is_property
        and signature.return_annotation not in ("None", None)
        and not re.search("Returns:|Yields:", text)
    ):
        found.append("result")
    return [f"{name}: {gap}" for gap in found]


@pytest.mark.parametrize("name", fedmllm.__all__)
def test_every_argument_and_result_is_described(name: str) -> None:
    assert [gap for described in functions(name) for gap in gaps(*described)] == []
    if inspect.isclass(getattr(fedmllm, name)):
        assert (getattr(fedmllm, name).__doc__ or "").strip()


def test_a_gap_is_found() -> None:
    def function(known: int, unknown: int) -> int:
        """Add.

        Args:
            known: A number.
        """
        return known + unknown

    assert gaps("f", function, False) == ["f: argument unknown", "f: result"]
