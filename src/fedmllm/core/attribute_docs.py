"""Docstrings below the attributes of classes."""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Iterator
from functools import cache
from types import FunctionType


def attribute_docs(cls: type) -> dict[str, str]:
    """Return the docstrings that stand below the annotated attributes of a class.

    Those of inherited attributes are included, unless the class annotates them again. They are read from the source when
    they are asked for, which takes as long as all else in the making of a class of settings.

    Args:
        cls: A class; one without source has no such docstrings.

    Returns:
        Name of an attribute -> its docstring, without indentation.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _own_docs(base)
    return {name: text for name, text in found.items() if text}


@cache
def _own_docs(cls: type) -> dict[str, str]:
    """Attributes that the class itself annotates; "" = without a docstring."""
    node = _classes_of(_file_of(cls)).get(cls.__qualname__)
    docs: dict[str, str] = {}
    for statement, below in zip(node.body, [*node.body[1:], None], strict=True) if node else ():
        match statement, below:
            case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str() as text)):
                docs[name] = inspect.cleandoc(text)
            case ast.AnnAssign(ast.Name(name)), _:
                docs[name] = ""
    return docs


def _file_of(cls: type) -> str:
    """The file that defines a class; of one from a notebook, which has no module with a file, that of a method."""
    methods = [value for value in vars(cls).values() if isinstance(value, FunctionType)]
    things: list[type | FunctionType] = [cls, *methods]
    for thing in things:
        try:
            return inspect.getsourcefile(thing) or ""
        except TypeError:
            continue
    return ""


@cache
def _classes_of(file: str) -> dict[str, ast.ClassDef]:
    """The classes of a file by their qualified names."""
    try:
        return dict(_inside(ast.parse("".join(linecache.getlines(file))), ""))
    except SyntaxError:
        return {}


def _inside(parent: ast.AST, before: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            yield before + node.name, node
            yield from _inside(node, f"{before}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _inside(node, f"{before}{node.name}.<locals>.")
        else:
            yield from _inside(node, before)
