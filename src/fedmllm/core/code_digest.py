"""Digests of plug-in files, and of classes and functions without a file."""

from __future__ import annotations

import ast
import dis
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

NUM_DIGITS = 16  # of a digest
_PACKAGE = __name__.partition(".")[0]
# Attributes that Python, abc or pydantic add to a class.
ADDED = {"plugin", "_abc_impl", "model_config", "__annotate__", "__annotate_func__"}


def bytes_digest(data: bytes) -> str:
    """Return the first 16 hex digits of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:NUM_DIGITS]


def file_digest(path: Path) -> str:
    """Return the digest of a file together with its helper modules.

    The digest of a file without helper modules is that of its bytes. The place of the folder does not change it.

    Args:
        path: A Python file.

    Returns:
        16 hex digits.
    """
    digest = bytes_digest(path.read_bytes())
    if helpers := helper_files(path):
        root = _root(path.resolve())
        lines = [f"{helper.relative_to(root).as_posix()} {bytes_digest(helper.read_bytes())}" for helper in helpers]
        digest = bytes_digest("\n".join([digest, *sorted(lines)]).encode())
    return digest


def helper_files(path: Path) -> tuple[Path, ...]:
    """Return the files that a plug-in imports from its own folder or package, at any depth.

    They are read from the import statements, those within functions included. Other modules of a folder of installed
    packages are not helpers.

    Args:
        path: A Python file.

    Returns:
        Absolute paths without repetition, sorted, without `path` itself.
    """
    path = path.resolve()
    root = _root(path)
    if not is_installed(root):
        folders = list(dict.fromkeys([path.parent, root]))
    else:
        folders = [root / path.relative_to(root).parts[0]] if path.parent != root else []
    found, waiting = {path}, [path]
    while waiting:
        file = waiting.pop()
        for module in _imported(file.read_bytes(), file.relative_to(root).parent.parts):
            new = {helper for folder in folders for helper in _files_of(module, folder, root)} - found
            found |= new
            waiting += new
    return tuple(sorted(found - {path}))


def is_installed(folder: Path) -> bool:
    """True for a folder of installed packages or of the standard library."""
    standard = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    return folder.name in ("site-packages", "dist-packages") or folder in standard


def _root(path: Path) -> Path:
    """The folder from which the absolute imports of a file count: that of its outermost package."""
    folder = path.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


@cache
def _imported(code: bytes, package: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The names in the import statements of a file of a package, as parts; an imported name may be a module too."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):  # importing it reports the place
        return ()
    names: list[tuple[str, ...]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) - node.level + 1] if node.level else ()
            module = (*outer, *(node.module.split(".") if node.module else ()))
            names += [(*module, alias.name) for alias in node.names]
    return tuple(name for name in names if name[0] != _PACKAGE)


def _files_of(module: tuple[str, ...], folder: Path, root: Path) -> Iterator[Path]:
    """The files that importing a module executes if it is found in `folder`, its packages first."""
    if folder.parent == root and is_installed(root):  # a package that is installed: its own modules alone
        if module[0] != folder.name:
            return
        folder = root
    for depth in range(1, len(module) + 1):
        place = folder.joinpath(*module[:depth])
        files = (place / "__init__.py", place.with_name(f"{place.name}.py"))
        if file := next((file for file in files if file.is_file()), None):
            yield file
        elif not place.is_dir():
            return


def object_digest(thing: Any) -> str:
    """Return a digest of a class or function that has no file: its code, defaults of arguments, and attributes.

    Functions, classes and values of the same module that the code refers to count too. The digest is equal in every
    process, whatever PYTHONHASHSEED is. An object that cannot be pickled counts by its type alone.

    Args:
        thing: A class or function.

    Returns:
        16 hex digits.
    """
    return bytes_digest(_Description(thing.__module__).text(thing).encode())


class _Description:
    """Text of a value that does not depend on addresses or on the order of sets."""

    def __init__(self, module: str) -> None:
        self._module = module  # whose functions and classes are described; those of other modules are named
        self._seen: dict[int, tuple[int, Any]] = {}  # by id; the objects are kept, so that no id is used again

    def text(self, value: Any) -> str:
        kind = type(value)
        if value is None or value is Ellipsis or kind in (bool, int, float, complex, str):
            return f"{kind.__name__} {value!r}"
        if kind is bytes:
            return f"bytes {bytes_digest(value)}"
        if id(value) in self._seen:
            return f"seen {self._seen[id(value)][0]}"
        self._seen[id(value)] = (len(self._seen), value)
        return self._definition(value) or self._container(value) or self._object(value)

    def _definition(self, value: Any) -> str:
        if isinstance(value, CodeType):
            names = (value.co_names, value.co_varnames, value.co_argcount, value.co_kwonlyargcount, value.co_flags)
            return self._joined("code", [value.co_code, *names, *value.co_consts])
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, ModuleType):
            return _name_of_module(value.__name__)
        if isinstance(value, (classmethod, staticmethod, MethodType)):
            return self._joined(str(type(value).__name__), [value.__func__])
        if isinstance(value, property):
            return self._joined("property", [value.fget, value.fset, value.fdel])
        if isinstance(value, partial):
            return self._joined("partial", [value.func, value.args, value.keywords])
        return ""

    def _container(self, value: Any) -> str:
        name = type(value).__qualname__
        if isinstance(value, (list, tuple)):
            return self._joined(name, value)
        if isinstance(value, (set, frozenset)):
            return f"{name}({', '.join(sorted(_Description(self._module).text(item) for item in value))})"
        if isinstance(value, Mapping):
            by_key = sorted((_Description(self._module).text(key), item) for key, item in value.items())
            return self._joined(name, [part for pair in by_key for part in pair])
        return ""

    def _object(self, value: Any) -> str:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        try:
            if hasattr(value, "__array__"):
                array = value.__array__()
                data = array.tolist() if array.dtype.hasobject else array.tobytes()
                return self._joined(name, [str(array.dtype), array.shape, data])
            parts = value.__reduce_ex__(4)  # as copy and pickle take it apart
        except Exception:  # such as that of a lock, or of a tensor on a GPU
            return name
        if isinstance(parts, str):
            return f"{name} {parts}"
        return self._joined(name, [list(part) if isinstance(part, Iterator) else part for part in parts])

    def _function(self, function: FunctionType) -> str:
        own = function.__globals__.get("__name__") == self._module
        if not own and function.__module__ != self._module:
            return f"{_name_of_module(function.__module__)}.{function.__qualname__}"
        used = _globals_of(function.__code__) & function.__globals__.keys() if own else ()
        cells = [_contents(cell) for cell in function.__closure__ or ()]
        values = {name: function.__globals__[name] for name in used}
        parts = [function.__code__, function.__defaults__, function.__kwdefaults__, cells, values]
        return self._joined("function", parts)

    def _class(self, cls: type) -> str:
        if cls.__module__ != self._module:
            return f"{_name_of_module(cls.__module__)}.{cls.__qualname__}"
        stated = {key: value for key, value in vars(cls).items() if _is_stated(key, value)}
        fields = {key: field.default for key, field in vars(cls).get("__pydantic_fields__", {}).items()}
        private = vars(cls).get("__private_attributes__", {})
        return self._joined("class", [cls.__qualname__, cls.__bases__, stated, fields, private])

    def _joined(self, kind: str, values: Iterable[Any]) -> str:
        return f"{kind}({', '.join([self.text(value) for value in values])})"


def _is_stated(key: str, value: Any) -> bool:
    special = key.startswith("__") and key.endswith("__")
    return key not in ADDED and (not special or isinstance(value, (FunctionType, classmethod)))


def _globals_of(code: CodeType) -> set[str]:
    """Names of the globals that the code reads, its inner functions included."""
    inner = [_globals_of(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}.union(*inner)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def _name_of_module(name: str) -> str:
    """The name, with the digest of a file that is not of an installed package."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if not isinstance(file, str) or name.partition(".")[0] == _PACKAGE or not file.endswith(".py"):
        return f"module {name}"
    path = Path(file).resolve()
    return f"module {name}" if not path.is_file() or is_installed(_root(path)) else f"module {name} {file_digest(path)}"
