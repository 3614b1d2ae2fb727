"""Append-only files that can be cut to a checkpoint's length."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import make_folder


class AppendFile:
    """A file to which a run appends.

    Raises:
        FedmllmError: The file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            make_folder(path.parent)
            self._file = path.open("ab")
        except OSError as error:
            raise FedmllmError(f"{path}: cannot be written: {error.strerror}") from error

    def append(self, content: bytes) -> None:
        """Append a piece and pass it to the operating system.

        Raises:
            FedmllmError: The piece cannot be written.
        """
        try:
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            raise FedmllmError(f"{self.path}: cannot be written: {error.strerror}") from error

    def num_bytes(self) -> int:
        """Return the length of the file."""
        return os.fstat(self._file.fileno()).st_size

    def truncate(self, num_bytes: int) -> None:
        """Cut the file after the first `num_bytes` bytes: one operation of the file system, done or not done.

        Raises:
            FedmllmError: The file is shorter than that.
        """
        if num_bytes > self.num_bytes():
            raise FedmllmError(
                f"{self.path}: has {self.num_bytes()} bytes, but had {num_bytes} when the checkpoint was written: "
                "it was cut or replaced since, so it cannot be continued"
            )
        self._file.truncate(num_bytes)

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._file.fileno()

    def sync(self) -> None:
        """Wait until the file is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # a full disk was reported by the write that failed
            self._file.close()
