"""What SCAFFOLD keeps for a client between the rounds that ask it: on the disk, so that absent clients cost no memory."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import make_folder, read_tensors, sync
from fedmllm.core.tensors import digest, is_finite, subtract, tree_map, zeros
from fedmllm.core.types import Params

FILE = re.compile(r"round-([0-9]{4,9})\.safetensors")


class Controls:
    """The clients' control variates c_k, `FOLDER/client-3/round-0007.safetensors`, and the server's c.

    A file bears the round that made it, and a round reads only what was made before it: a run that goes on from a checkpoint
    finds what the checkpoint's round left, whatever came after it.
    """

    def __init__(self, folder: Path, num_clients: int, server: Params, begun: int) -> None:
        self._folder, self._num_clients = folder, num_clients
        self.server = server  # c; the run sets it anew after every round
        there = list(folder.glob("client-*/*"))
        if begun and not there and any(t.any() for t in server.values()):
            raise FedmllmError(
                f"{folder}: what the clients' rounds up to {begun} left here is gone; choose another --out"
            )
        for path in there:
            if not (found := FILE.fullmatch(path.name)) or int(found[1]) > begun:
                _remove(path)  # of a round that will be trained again

    def offset(self, client: int, round_: int) -> Params:
        """c - c_k: what is added to each gradient of the client in this round."""
        return subtract(self.server, self._before(client, round_))

    def learned(self, client: int, round_: int, gradient: Params) -> Params:
        """Keep the mean gradient as the new c_k -> the client's part of the change of c: (new c_k - old c_k) / N.

        A gradient that is not finite is not kept; what is returned is then not finite either, and the update is refused.
        """
        change = tree_map(lambda new, old: (new - old) / self._num_clients, gradient, self._before(client, round_))
        if is_finite(gradient):
            self._write(self._folder / f"client-{client}" / f"round-{round_:04d}.safetensors", gradient)
        return change

    def forget(self, round_: int, clients: Sequence[int]) -> None:
        """What these left in the round: their updates were refused, so c holds nothing of it."""
        for client in clients:
            path = self._folder / f"client-{client}" / f"round-{round_:04d}.safetensors"
            if path.exists():
                _remove(path)

    def prune(self, kept: Sequence[int]) -> None:
        """Remove what no resume needs, neither from the checkpoints of the rounds `kept` nor from a later one."""
        for folder in self._folder.glob("client-*"):
            rounds = self._rounds(folder)
            needed = {max((n for n in rounds if n <= number), default=0) for number in kept}
            for number in rounds:
                if number <= max(kept, default=0) and number not in needed:
                    _remove(folder / f"round-{number:04d}.safetensors")

    def _before(self, client: int, round_: int) -> Params:
        folder = self._folder / f"client-{client}"
        last = max((n for n in self._rounds(folder) if n < round_), default=0)
        return self._read(folder / f"round-{last:04d}.safetensors") if last else zeros(self.server)

    def _read(self, path: Path) -> Params:
        tensors = read_tensors(path, self.server)
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get("sha256")
        if said != digest(tensors):
            raise FedmllmError(f"{path}: damaged: it is not what its own digest says; choose another --out")
        return tensors

    def _rounds(self, folder: Path) -> list[int]:
        return [int(found[1]) for path in folder.glob("*") if (found := FILE.fullmatch(path.name))]

    def _write(self, path: Path, tensors: Params) -> None:
        partial = path.with_suffix(".partial")
        try:
            make_folder(path.parent)
            with partial.open("wb") as file:
                file.write(save({name: t.contiguous() for name, t in tensors.items()}, {"sha256": digest(tensors)}))
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
