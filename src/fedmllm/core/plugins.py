"""Plug-ins: modules and files outside the package that define members or metrics.

A plug-in is loaded because a command (`--import`), a file (`imports = [...]`) or an installed distribution (entry-point
group `fedmllm.plugins`) names it. Each member knows the digest of the file it comes from and of the modules that the file
imports from its own folder (`source_of`): it is part of the run id, so two versions of a plug-in never share a run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from fedmllm.core.code_digest import bytes_digest, file_digest, helper_files, object_digest
from fedmllm.core.errors import ConfigError, FedmllmError

GROUP = "fedmllm.plugins"
HINT = f'; for one of your own give --import FILE.py, imports = ["FILE.py"], or an entry point of the group {GROUP}'
PREFIX = "fedmllm_plugin_"  # of the module name of a plug-in that is loaded from a path


@dataclass(frozen=True)
class PluginSource:
    """Origin of a member that is not shipped with the package."""

    module: str
    """Module name; the stem of the file for one that was loaded from a path or run as a script."""
    digest: str
    """First 16 hex digits of a SHA-256: of the file and its helper modules, or of the compiled code if there is no file."""
    file: str
    """Absolute path; "" for a class or function of a notebook."""
    import_name: str
    """Value for `imports` that loads it in another process; "" if there is no file."""
    helpers: tuple[tuple[str, str], ...] = ()
    """(absolute path, digest) of each module that the file imports from its own folder."""

    def record(self) -> dict[str, Any]:
        """Return what a run's record states about the plug-in."""
        stated = {"module": self.module, "file": self.file, "digest": self.digest}
        return stated | ({"helpers": dict(self.helpers)} if self.helpers else {})


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
    """Import a file that is not imported yet, under whichever name; one that was loaded from its path is loaded again if
    it or one of its helper modules has changed.

    `import NAME` of another plug-in gives the same module, unless NAME is that of an installed module.

    Raises ConfigError with file, line and reason if that fails.
    """
    loaded = _module_at(path)
    if loaded and (not loaded.__name__.startswith(PREFIX) or vars(loaded)["__digest__"] == file_digest(path)):
        return loaded
    name = f"{PREFIX}{path.stem}_{bytes_digest(str(path).encode())[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{place}: {path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    vars(module)["__digest__"] = file_digest(path)
    files = [path, *helper_files(path)]
    _remove(files if loaded else [])
    _forget_bytecode(files)
    _search_in(path.parent)
    names = [name, path.stem] if _is_found_at(path) else [name]
    sys.modules.update(dict.fromkeys(names, module))
    source_of.cache_clear()
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        for each in names:
            sys.modules.pop(each, None)
        if isinstance(error, FedmllmError):
            raise type(error)(f"{place}: {path}: {error}") from error
        if isinstance(error, Exception):
            raise ConfigError(_failure(place, str(path), error)) from error
        raise
    return module


def _forget_bytecode(files: Iterable[Path]) -> None:
    """Remove compiled code: Python takes it for current if a file changed within a second and kept its size."""
    for file in files:
        with contextlib.suppress(OSError, NotImplementedError):  # a folder that cannot be written; no bytecode at all
            Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)


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
    name = str(file) if by_path or _is_next_to_a_plugin(module, file) else module
    helpers = tuple((str(helper), bytes_digest(helper.read_bytes())) for helper in helper_files(file))
    return PluginSource(file.stem if by_path else module, file_digest(file), str(file), name, helpers)


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
    return PluginSource(thing.__module__, object_digest(thing), "", "")


def defines_again(old: Any, old_source: PluginSource | None, new: Any, source: PluginSource | None) -> bool:
    """True if `new` is a later version of `old`: a cell of a notebook or a file that is executed again, under any name."""
    if old.__qualname__ != new.__qualname__:
        return False
    same_file = old_source is not None and source is not None and source.file != "" and old_source.file == source.file
    return old.__module__ == new.__module__ or same_file


def _file_of(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None)
    try:
        return Path(file).resolve() if isinstance(file, str) and Path(file).is_file() else None
    except OSError:
        return None


def _module_at(path: Path) -> ModuleType | None:
    alike = [m for m in list(sys.modules.values()) if str(getattr(m, "__file__", "")).endswith(path.name)]
    return next((module for module in alike if _file_of(module) == path), None)


def _remove(files: list[Path]) -> None:
    """Drop the modules of changed files, so that the next import executes them again; the main module stays."""
    for name, module in list(sys.modules.items()):
        if name not in ("__main__", "__mp_main__") and _file_of(module) in files:
            del sys.modules[name]


def _is_found_at(path: Path) -> bool:
    """True if `import STEM` would execute this file now."""
    found = None if path.stem in sys.modules else PathFinder.find_spec(path.stem)
    return found is not None and found.origin is not None and Path(found.origin).resolve() == path


def _is_next_to_a_plugin(module: str, file: Path) -> bool:
    """True for a module that is found only because a plug-in was loaded from a path in its folder."""
    by_path = [m for name, m in list(sys.modules.items()) if name.startswith(PREFIX)]
    return "." not in module and any(at is not None and at.parent == file.parent for at in map(_file_of, by_path))


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
