"""Stacked engine over several devices.

Each device has its own copy of the frozen model, and trains its share of a round's clients in a thread. torch releases
Python's lock while it computes.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import replace
from threading import Event
from typing import cast

import torch

from fedmllm.backbones.folder import device_of
from fedmllm.backbones.hub_kernels import without_hub_kernels
from fedmllm.config import engine as settings
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.types import ClientUpdate, Round, Sent
from fedmllm.federation.client import Clients
from fedmllm.federation.engines.stacked.engine import Halted, StackedEngine, deterministic


def start(settings_: settings.Engine, clients: Clients) -> StackedEngine | ReplicaEngine:
    """The engine of these settings: on the backbone's device alone, or on all of `settings.devices`.

    Args:
        settings_: Of the engine `stacked`.
        clients: The inputs of local training.

    Raises:
        ConfigError: This machine lacks a device, or the model is on none of them.
    """
    stacked = cast("settings.Stacked", settings_)
    devices = find_replica_devices(stacked.devices, clients.backbone.device)
    return ReplicaEngine(stacked, clients, devices) if len(devices) > 1 else StackedEngine(stacked, clients)


def find_replica_devices(names: Sequence[str], own: torch.device) -> list[torch.device]:
    """The devices, that of the loaded model first, then the others as named.

    Args:
        names: `engine.devices`; () = the model's device alone.
        own: The device of the loaded model.

    Raises:
        ConfigError: This machine has no such device, or `own` is not one of them.
    """
    if not names:
        return [own]
    count = torch.cuda.device_count()
    if "all" in names:
        if not count:
            raise ConfigError("engine.devices: got 'all', but this machine has no CUDA device")
        names = [f"cuda:{number}" for number in range(count)]
    found = []
    for name in names:
        try:
            found.append(_numbered(device_of(name)))
        except ConfigError as error:
            raise ConfigError(f"engine.devices: {str(error).removeprefix('backbone.device: ')}") from None
    if (own := _numbered(own)) not in found:
        raise ConfigError(
            f"engine.devices: got {', '.join(names)}, but the model is on {own} (backbone.device), which must be one of them"
        )
    found.remove(own)
    return [own, *found]


def _numbered(device: torch.device) -> torch.device:
    """ "cuda" is "cuda:0", and a CPU has no number."""
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else torch.device(device.type)


def clients_by_device(rows: Mapping[int, int], num_devices: int, most: int) -> list[list[int]]:
    """The clients of each device, with as equal sums of rows as the largest clients first allow.

    A function of these numbers alone, so that a round that is repeated is divided in the same way.

    Args:
        rows: Client -> rows that it trains on in the round.
        num_devices: At least one.
        most: Clients of a device.

    Returns:
        Ascending clients for each device; [] for devices that have none.
    """
    parts: list[list[int]] = [[] for _ in range(num_devices)]
    for client in sorted(rows, key=lambda k: (-rows[k], k)):
        free = [part for part in parts if len(part) < most]
        min(free, key=lambda part: (sum(rows[k] for k in part), len(part))).append(client)
    return [sorted(part) for part in parts]


class ReplicaEngine:
    """Engine: (round, what each client receives) -> their updates, in ascending client order.

    At most `settings.clients` adapters are in memory of each device at once.

    Args:
        settings_: Of the engine.
        clients: The inputs of local training; its backbone is the copy on the first device.
        devices: By `find_replica_devices`, at least two.
    """

    def __init__(self, settings_: settings.Stacked, clients: Clients, devices: Sequence[torch.device]) -> None:
        self._settings, self._clients, self._devices = settings_, clients, devices
        self._halt = Event()
        self._engines = [StackedEngine(settings_, clients, self._halt)]
        note = self._engines[0].note
        of_each = "each with its own copy of the model, which train clients at the same time"
        self.note = f"{len(devices)} devices ({', '.join(map(str, devices))}), {of_each}{f'; {note}' if note else ''}"

    def __call__(self, at: Round, sents: Mapping[int, Sent]) -> Iterator[ClientUpdate]:
        members, size = sorted(sents), self._settings.clients * len(self._devices)
        for begin in range(0, len(members), size):
            chunk = {client: sents[client] for client in members[begin : begin + size]}
            rows = {client: self._num_rows(client, at.number) for client in chunk}
            parts = clients_by_device(rows, len(self._devices), self._settings.clients)
            yield from self._together(at, [{client: chunk[client] for client in part} for part in parts if part])

    def _num_rows(self, client: int, round_: int) -> int:
        """Rows of all steps of the client in the round, repeated ones as often as they are."""
        clients = self._clients
        whole = clients.train.epochs * len(clients.shards[client].rows)
        return min(whole, clients.num_steps(client, round_) * clients.rows_per_step)

    def _together(self, at: Round, parts: Sequence[Mapping[int, Sent]]) -> list[ClientUpdate]:
        """Train one part on each device at the same time; raises the first device's error once all have stopped."""
        while len(self._engines) < len(parts):
            self._engines.append(self._replica(self._devices[len(self._engines)]))
        self._clients.store.complete([self._clients.shards[client] for part in parts for client in part])

        def train(engine: StackedEngine, device: torch.device, part: Mapping[int, Sent]) -> list[ClientUpdate]:
            try:
                with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                    return list(engine(at, part))
            except BaseException:
                self._halt.set()  # the round is lost: the others do not have to finish it
                raise

        self._halt.clear()
        # Both change the state of the process, and restore what they found. So no thread may be the first or the last one.
        with deterministic(self._settings.deterministic), without_hub_kernels(), ThreadPoolExecutor(len(parts)) as pool:
            tasks = [
                pool.submit(contextvars.copy_context().run, train, engine, device, part)
                for engine, device, part in zip(self._engines, self._devices, parts, strict=False)
            ]
            try:
                wait(tasks)
            finally:
                if not all(task.done() for task in tasks):  # this thread was interrupted
                    self._halt.set()
        faults = [fault for task in tasks if (fault := task.exception()) is not None]
        if faults:
            raise next((fault for fault in faults if not isinstance(fault, Halted)), faults[0])
        return sorted((update for task in tasks for update in task.result()), key=lambda update: update.client)

    def _replica(self, device: torch.device) -> StackedEngine:
        """An engine with a copy of the frozen model on a device, loaded as the first one was."""
        experiment = self._clients.experiment
        if experiment is None:
            raise FedmllmError(
                "engine.devices: these clients belong to no experiment, so a copy of the model cannot be loaded"
            )
        backbone = experiment.backbone.model_copy(update={"device": str(device)}).load(experiment.seed)
        if backbone.digest != self._clients.backbone.digest:
            raise FedmllmError(
                f"engine.devices: the model's files have changed since it was loaded first; {device}: {backbone.digest}"
            )
        clients = replace(self._clients, backbone=backbone, store=self._clients.store.on(backbone))
        return StackedEngine(self._settings, clients, self._halt)
