"""Files that are written whole, flushed to disk and checked when read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from fedmllm.core.errors import FedmllmError
from fedmllm.core.tensors import is_finite
from fedmllm.core.types import Params

if TYPE_CHECKING:
    from torch import Tensor


def make_folder(folder: Path) -> None:
    """A folder whose entry, and those of the parents made for it, are on the disk: a power cut does not take it away."""
    if folder.is_dir():
        return
    if not folder.parent.exists():
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Until a file's content, or a folder's entries, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot, and writes entries through
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """All of `text` or none of it: a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder may be read-only, or no folder
            partial.unlink(missing_ok=True)
        raise FedmllmError(f"{path}: cannot be written: {error.strerror}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of the user's umask.

    safetensors' own `save_file` gives 0600 since 0.8, so that a service under another account cannot read a model.

    Args:
        path: The file; its folder exists.
        tensors: Contiguous tensors that share no memory.
        metadata: Texts in the header; {"format": "pt"} by default.

    Raises:
        FedmllmError: The file cannot be written.
    """
    from safetensors.torch import save

    content = save(dict(tensors), dict(metadata or {"format": "pt"}))
    try:
        path.write_bytes(content)
    except OSError as error:
        raise FedmllmError(f"{path}: cannot be written: {error.strerror}") from error


def apply_umask(folder: Path) -> None:
    """Give the files of `folder` the permissions that a new file there gets."""
    probe = folder / f".umask-{os.getpid()}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(mode)


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raise whatever the file system refuses within the block as a FedmllmError that names `place`."""
    try:
        yield
    except OSError as error:
        raise FedmllmError(f"{place}: cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise FedmllmError(f"{place}: cannot be written: {error}") from error


def check_writable(path: Path) -> None:
    """Raise before long work what writing the file `path` would raise after it; an existing file is left as it is.

    Raises:
        FedmllmError: It is a folder, or a file cannot be made there.
    """
    if path.is_dir():
        raise FedmllmError(f"{path}: cannot be written: Is a directory")
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        probe.touch()
        probe.unlink()


_DTYPES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


def tensor_names(path: Path) -> frozenset[str]:
    """Return the names of the tensors of a safetensors file.

    Args:
        path: The file.

    Raises:
        FedmllmError: It is not a safetensors file, or is cut short.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.keys())
    except (SafetensorError, OSError) as error:
        raise FedmllmError(f"{path}: not a whole safetensors file: {error}") from None


def read_tensors(path: Path, like: Mapping[str, Tensor], advice: str = "") -> Params:
    """A safetensors file from anywhere, in the order of `like`.

    The header is compared before a byte of data is read. A size of 0 in `like` stands for any size. Raises FedmllmError for
    a file that is not safetensors, is cut short, whose names, shapes or types are not those of `like`, or that holds NaN or
    Inf.
    """
    try:
        with safe_open(path, framework="pt") as file:
            there = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in there.items()}
            wanted = {name: (tuple(t.shape), _DTYPES[str(t.dtype).removeprefix("torch.")]) for name, t in like.items()}
            if not _same_layout(found, wanted):
                raise FedmllmError(f"{path}: {_mismatch(found, wanted)}")
            tensors = {name: file.get_tensor(name) for name in like}
    except (SafetensorError, OSError) as error:
        raise FedmllmError(f"{path}: not a whole safetensors file: {error}{advice}") from None
    odd = [name for name, tensor in tensors.items() if not is_finite({name: tensor})]
    if odd:
        raise FedmllmError(f"{path}: {odd[0]} holds NaN or Inf ({len(odd)} tensors do)")
    return tensors


def _same_layout(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return found.keys() == wanted.keys() and all(_same(found[name], wanted[name]) for name in wanted)


def _same(found: Any, wanted: Any) -> bool:
    (shape, dtype), (like, type_) = found, wanted
    return (dtype, len(shape)) == (type_, len(like)) and all(m in (0, n) for n, m in zip(shape, like, strict=True))


def _mismatch(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    kinds = {"unknown": found.keys() - wanted.keys(), "missing": wanted.keys() - found.keys()}
    said = [f"{len(names)} {kind} tensors, such as {min(names)[:200]!r}" for kind, names in kinds.items() if names]
    odd = sorted(name for name in found.keys() & wanted.keys() if not _same(found[name], wanted[name]))
    if odd:
        is_, should = (f"{list(shape)} {dtype}" for shape, dtype in (found[odd[0]], wanted[odd[0]]))
        said.append(f"{odd[0]} is {is_}, should be {should} ({len(odd)} such)")
    return "; ".join(said)
