"""Per-client state of an algorithm, stored on disk between rounds.

`FOLDER/client-3/round-0007.safetensors` holds what client 3 kept in round 7: SCAFFOLD's c_k, FedDyn's h_k, FedSA's B_k. A
round reads only what an earlier round wrote, so a run that resumes from a checkpoint finds the state of the checkpoint's
round. Absent clients cost no memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import make_folder, sync
from fedmllm.core.tensors import is_finite, params_digest
from fedmllm.core.types import Params

FILE = re.compile(r"round-([0-9]{4,9})\.safetensors")


class ClientStateStore:
    """The clients' state in a folder of its own.

    Args:
        folder: In the run's folder, or at a site.
        finished: Rounds that are finished; files of later rounds are removed, since these will be trained again.

    Raises:
        FedmllmError: rounds are finished and the folder is gone.
    """

    def __init__(self, folder: Path, finished: int = 0) -> None:
        self._folder = folder
        if finished and not folder.is_dir():
            raise FedmllmError(
                f"{folder}: the clients' state of rounds 1 to {finished} is missing; choose another --out"
            )
        make_folder(folder)
        for path in folder.glob("client-*/*"):
            if not (found := FILE.fullmatch(path.name)) or int(found[1]) > finished:
                _remove(path)

    def read(self, client: int, round_: int) -> Params:
        """The state that `client` has at the start of a round; {} if it never kept any.

        Raises:
            FedmllmError: the file is damaged.
        """
        rounds = [n for n in self.rounds(client) if n < round_]
        return self._read(self._path(client, max(rounds))) if rounds else {}

    def write(self, client: int, round_: int, state: Params) -> None:
        """Store the state that `client` keeps from a round. {} and values that are not finite leave the old state."""
        if state and is_finite(state):
            self._write(self._path(client, round_), state)

    def discard(self, round_: int, clients: Sequence[int]) -> None:
        """Remove the state from a round in which the updates of `clients` were refused: the server's does not match it."""
        for client in clients:
            path = self._path(client, round_)
            if path.exists():
                _remove(path)

    def prune(self, checkpoints: Sequence[int]) -> None:
        """Remove files that no resume needs, neither from a checkpoint of these rounds nor from a later one."""
        for folder in self._folder.glob("client-*"):
            client = int(folder.name.removeprefix("client-"))
            rounds = self.rounds(client)
            needed = {max((n for n in rounds if n <= number), default=0) for number in checkpoints}
            for number in rounds:
                if number <= max(checkpoints, default=0) and number not in needed:
                    _remove(self._path(client, number))

    def _path(self, client: int, round_: int) -> Path:
        return self._folder / f"client-{client}" / f"round-{round_:04d}.safetensors"

    def rounds(self, client: int) -> list[int]:
        """Rounds from which the client's state is stored."""
        names = (path.name for path in (self._folder / f"client-{client}").glob("*"))
        return [int(found[1]) for name in names if (found := FILE.fullmatch(name))]

    def _read(self, path: Path) -> Params:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                expected = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError) as error:
            raise FedmllmError(f"{path}: not a whole safetensors file: {error}; choose another --out") from None
        if expected != params_digest(tensors):
            raise FedmllmError(f"{path}: damaged: its content does not match its own digest; choose another --out")
        return tensors

    def _write(self, path: Path, state: Params) -> None:
        partial = path.with_suffix(".partial")
        try:
            make_folder(path.parent)
            with partial.open("wb") as file:
                file.write(save({name: t.contiguous() for name, t in state.items()}, {"sha256": params_digest(state)}))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync(path.parent)
        except OSError as error:
            raise FedmllmError(f"{path}: cannot be written: {error.strerror}") from error


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise FedmllmError(f"{path}: cannot be removed: {error.strerror}") from error
