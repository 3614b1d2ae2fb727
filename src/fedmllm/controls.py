"""What SCAFFOLD keeps for a client between the rounds that ask it: on the disk, so that absent clients cost no memory."""

from __future__ import annotations

import os
import re
from pathlib import Path

from safetensors.torch import save

from fedmllm.checkpoint import read_tensors
from fedmllm.record import sync
from fedmllm.tensors import is_finite, subtract, tree_map, zeros
from fedmllm.types import FedmllmError, Params

FILE = re.compile(r"round-([0-9]{4,9})\.safetensors")


class Controls:
    """The clients' control variates c_k, `FOLDER/client-3/round-0007.safetensors`, and the server's c.

    A file bears the round that made it, and a round reads only what was made before it: a run that goes on from a checkpoint
    finds what the checkpoint's round left, whatever came after it.
    """

    def __init__(self, folder: Path, num_clients: int, server: Params, begun: int) -> None:
        self._folder, self._num_clients = folder, num_clients
        self.server = server  # c; the run sets it anew after every round
        for path in folder.glob("client-*/*"):
            if not (found := FILE.fullmatch(path.name)) or int(found[1]) > begun:
                path.unlink()  # of a round that will be trained again

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

    def prune(self, oldest: int) -> None:
        """Remove what no resume from round `oldest` or later can need."""
        for folder in self._folder.glob("client-*"):
            rounds = sorted(n for n in self._rounds(folder) if n <= oldest)
            for number in rounds[:-1]:
                (folder / f"round-{number:04d}.safetensors").unlink()

    def _before(self, client: int, round_: int) -> Params:
        folder = self._folder / f"client-{client}"
        last = max((n for n in self._rounds(folder) if n < round_), default=0)
        return read_tensors(folder / f"round-{last:04d}.safetensors", self.server) if last else zeros(self.server)

    def _rounds(self, folder: Path) -> list[int]:
        return [int(found[1]) for path in folder.glob("*") if (found := FILE.fullmatch(path.name))]

    def _write(self, path: Path, tensors: Params) -> None:
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(save({name: t.contiguous() for name, t in tensors.items()}))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync(path.parent)
        except OSError as error:
            raise FedmllmError(f"{path}: cannot be written: {error.strerror}") from error
