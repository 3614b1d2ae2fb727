"""Digest of the files of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path


def files_digest(files: Mapping[str, Path]) -> str:
    """Return a digest of names and contents. Files are read in parallel, each once in a process while it does not change.

    Args:
        files: Name -> file, in the order that counts.

    Returns:
        64 hex digits of a SHA-256.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        hashes = list(pool.map(lambda f: _of_content(f, f.stat().st_size, f.stat().st_mtime_ns), files.values()))
    lines = [f"{name} {hash_}" for name, hash_ in zip(files, hashes, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@lru_cache(maxsize=256)
def _of_content(file: Path, size: int, mtime_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
