"""Cache of vision-tower outputs in a folder that processes share.

An output is read back to the bit or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.utils import ModelOutput

from fedmllm.core.errors import ConfigError

SUFFIX = ".safetensors"
ABANDONED_S = 3600.0  # a file half written by a process that was killed


class FeatureFolder:
    """One file a row of pictures, written under another name first. At the limit the least recently used are removed.

    A file that is damaged, of another form, or was removed by another process counts as absent. If the disk is full,
    nothing is written and runs continue.

    Args:
        folder: Made if it does not exist.
        limit_mb: MiB of all files together, of all processes; each process overruns it by a hundredth at most.

    Raises:
        ConfigError: The folder cannot be made or written.
    """

    def __init__(self, folder: Path, limit_mb: int) -> None:
        self._folder, self._limit = folder, limit_mb * 2**20
        self._room = 0  # bytes that may be written before the folder is measured again
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"backbone.image_features_folder: {folder}: cannot be made: {error.strerror}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"backbone.image_features_folder: {folder}: cannot be written")

    def get(self, key: str) -> Any:
        """The output that was put under `key`, on the CPU; None = absent."""
        path = self._folder / (key + SUFFIX)
        try:
            with safe_open(path, framework="pt") as file:
                about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.get("digest") != _digest(about.get("form", ""), tensors):
                return None
            os.utime(path)
            return _unpack(json.loads(about["form"]), tensors)
        except (OSError, RuntimeError, SafetensorError, LookupError, ValueError):
            return None  # RuntimeError: torch opens the file once more, and another process can have made room between

    def put(self, key: str, output: Any) -> None:
        """Write `output`: a tensor, or lists, tuples, dicts and ModelOutputs of tensors."""
        tensors: dict[str, Tensor] = {}
        form = json.dumps(_pack(output, tensors))
        data = save(tensors, {"form": form, "digest": _digest(form, tensors)})
        partial = self._folder / f"{key}.{os.getpid()}-{threading.get_ident()}.partial"
        try:
            if len(data) > self._room:
                self._make_room()
            if len(data) <= self._limit:
                partial.write_bytes(data)
                partial.replace(self._folder / (key + SUFFIX))
                self._room -= len(data)
        except OSError:
            partial.unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Measure the folder; over the limit, remove the least recently used files until nine tenths of it are left."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        least = int(0.9 * self._limit) if total > self._limit else total
        for used, size, path in files:
            if total > least or (path.endswith(".partial") and time.time() - used > ABANDONED_S):
                Path(path).unlink(missing_ok=True)
                total -= size
        self._room = max(self._limit // 100, (self._limit - total) // 8)  # others may be writing too

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """(when last used, bytes, path) of every file."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue  # another process was faster
                if entry.name.endswith((SUFFIX, ".partial")):
                    yield stat.st_mtime, stat.st_size, entry.path


def _digest(form: str, tensors: dict[str, Tensor]) -> str:
    h = hashlib.blake2b(form.encode())
    for name in sorted(tensors):
        t = tensors[name]
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The form of `value` as JSON; its tensors go into `tensors`, by number."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return name
    if isinstance(value, dict):
        return {"type": _name(type(value)), "fields": {k: _pack(v, tensors) for k, v in value.items()}}
    return {"type": type(value).__name__, "items": [_pack(v, tensors) for v in value]}


def _unpack(form: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of `_pack`. Raises LookupError for a form that `_pack` does not give in this process."""
    if isinstance(form, str):
        return tensors[form]
    if "items" in form:
        return {"list": list, "tuple": tuple}[form["type"]](_unpack(v, tensors) for v in form["items"])
    fields = {k: _unpack(v, tensors) for k, v in form["fields"].items()}
    kinds = {_name(kind): kind for kind in (dict, *_kinds(ModelOutput))}  # never a class that a file could name freely
    return kinds[form["type"]](**fields)


def _kinds(kind: type) -> Iterator[type]:
    children: list[type] = kind.__subclasses__()
    for child in children:
        yield child
        yield from _kinds(child)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
