"""Plug-ins: modules and files outside the package that define members or metrics.

A plug-in is loaded because a command (`--import`), a file (`imports = [...]`) or an installed distribution (entry-point
group `fedmllm.plugins`) names it. Each member knows the digest of the file it comes from (`source_of`): it is part of the
run id, so two versions of a plug-in never share a run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from fedmllm.core.errors import ConfigError, FedmllmError

GROUP = "fedmllm.plugins"
PREFIX = "fedmllm_plugin_"  # of the module name of a plug-in that is loaded from a path
NUM_DIGITS = 16  # of a digest


@dataclass(frozen=True)
class PluginSource:
    """Origin of a member that is not shipped with the package."""

    module: str
    """Module name; the stem of the file for one that was loaded from a path or run as a script."""
    digest: str
    """First 16 hex digits of the file's SHA-256, or of the compiled code of a class that is defined in a notebook."""
    file: str
    """Absolute path; "" if there is no file."""
    import_name: str
    """Value for `imports` that loads it in another process; "" if there is no file."""


def load_plugins(names: str | Iterable[str], place: str = "imports", folder: Path | None = None) -> tuple[str, ...]:
    """Import each module or file, and return the names with absolute paths.

    Args:
        names: Module names, or paths that end in `.py`; one alone may stand without a list.
        place: Beginning of an error message: the option, or the file and its key.
        folder: What relative paths count from; the current folder by default.

    Returns:
        Module names as given, and absolute paths.

    Raises:
        ConfigError: A file or module does not exist, or fails while it is imported.
    """
    several = [names] if isinstance(names, str) else names
    return tuple(dict.fromkeys(_load(name, place, folder or Path.cwd()) for name in several))


def _load(name: str, place: str, folder: Path) -> str:
    if not is_path(name):
        _search_in(Path.cwd())
        load_module(name, place)
        return name
    path = (folder / Path(name).expanduser()).resolve()
    if not path.is_file():
        raise ConfigError(f"{place}: {name!r}: no file {path}")
    load_file(path, place)
    return str(path)


def is_path(name: str) -> bool:
    """True if the name of a plug-in is a path and not a module name."""
    return name.endswith(".py") or "/" in name or os.sep in name


def load_module(name: str, place: str) -> ModuleType:
    """Import a module by its name. Raises ConfigError with the reason if that fails."""
    try:
        return importlib.import_module(name)
    except FedmllmError:
        raise
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise ConfigError(
                f"{place}: {name!r}: no module {error.name!r}; a file is named by its path, ending in .py"
            ) from None
        raise ConfigError(_failure(place, name, error)) from error
    except Exception as error:
        raise ConfigError(_failure(place, name, error)) from error


def load_file(path: Path, place: str) -> ModuleType:
    """Import a file; one that is imported already, under whichever name, is executed again only if it has changed.

    Raises ConfigError with file, line and reason if that fails.
    """
    loaded = _module_at(path)
    if loaded and (not loaded.__name__.startswith(PREFIX) or vars(loaded)["__digest__"] == file_digest(path)):
        return loaded
    name = f"{PREFIX}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{place}: {path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    vars(module)["__digest__"] = file_digest(path)
    sys.modules[name] = module
    source_of.cache_clear()
    _search_in(path.parent)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, FedmllmError):
            raise type(error)(f"{place}: {path}: {error}") from error
        if isinstance(error, Exception):
            raise ConfigError(_failure(place, str(path), error)) from error
        raise
    return module


def load_entry_points() -> None:
    """Import the plug-ins of installed distributions (group `fedmllm.plugins`). Raises ConfigError naming the distribution."""
    for point in entry_points(group=GROUP):
        owner = point.dist.name if point.dist else "unknown"
        load_module(point.module, f"plug-in {point.name!r} of the installed distribution {owner!r}")


def is_shipped(module: str) -> bool:
    """True for a module of this package."""
    return module == "fedmllm" or module.startswith("fedmllm.")


@cache
def source_of(module: str) -> PluginSource | None:
    """Origin of the members of a module; None if they are shipped, or if the module has no file."""
    file = None if is_shipped(module) else _file_of(sys.modules.get(module))
    if file is None:
        return None
    by_path = module.startswith(PREFIX) or module in ("__main__", "__mp_main__")
    name = str(file) if by_path else module
    return PluginSource(file.stem if by_path else module, file_digest(file), str(file), name)


def source_of_import(name: str) -> PluginSource | None:
    """Origin of what `load_plugins` returned as `name`."""
    if not is_path(name):
        return source_of(name)
    module = _module_at(Path(name))
    return source_of(module.__name__) if module else None


def source_of_object(thing: Any) -> PluginSource | None:
    """Origin of a class or function; None if it is shipped. One that has no file is identified by its compiled code."""
    if is_shipped(thing.__module__):
        return None
    if source := source_of(thing.__module__):
        return source
    digest = hashlib.sha256()
    for key, value in sorted({**vars(thing), "": thing}.items()):
        if isinstance(code := getattr(getattr(value, "__func__", value), "__code__", None), CodeType):
            digest.update(repr((key, *_code(code))).encode())
    return PluginSource(thing.__module__, digest.hexdigest()[:NUM_DIGITS], "", "")


def file_digest(path: Path) -> str:
    """First digits of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:NUM_DIGITS]


def _code(code: CodeType) -> tuple[Any, ...]:
    constants = tuple(_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts)
    return code.co_code.hex(), code.co_names, constants


def _file_of(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None)
    try:
        return Path(file).resolve() if isinstance(file, str) and Path(file).is_file() else None
    except OSError:
        return None


def _module_at(path: Path) -> ModuleType | None:
    alike = [m for m in list(sys.modules.values()) if str(getattr(m, "__file__", "")).endswith(path.name)]
    return next((module for module in alike if _file_of(module) == path), None)


def _search_in(folder: Path) -> None:
    """Let plug-ins import modules that lie next to them. The folder comes last: it hides no installed module."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _failure(place: str, name: str, error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return f"{place}: {error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    own = [f for f in frames if f.filename != __file__]
    line = f"{own[-1].filename}:{own[-1].lineno}" if own else name
    return f"{place}: {name}: cannot be imported: {line}: {type(error).__name__}: {error}"
