"""Flower's Ray simulation as an engine: the round loop runs over the grid of a ServerApp, clients in Ray actors.

The simulation is started at a process's first round and serves all its runs; Ray needs 7 to 9 s to start. It ends with the
process, or with `stop`.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
import torch

for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Without a cluster of the user's: loopback, where Ray otherwise listens on all interfaces, whatever address it is given.
    **({} if os.environ.get("RAY_ADDRESS") else {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}),
}.items():  # before flwr and ray are imported: nothing phones home unless the user asked for it
    os.environ.setdefault(_name, _value)

from fedmllm.flower.processes import need  # noqa: E402

need("flwr", "ray")

from flwr.app import Context, Message  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402
from ray import cloudpickle  # noqa: E402
from ray._private import ray_constants  # noqa: E402

from fedmllm.config.engine import Engine as EngineSettings  # noqa: E402
from fedmllm.config.engine import FlowerSimulation as Settings  # noqa: E402
from fedmllm.core.errors import FedmllmError  # noqa: E402
from fedmllm.core.types import ClientFailure, ClientUpdate, Round, Sent  # noqa: E402
from fedmllm.federation.client import Clients  # noqa: E402
from fedmllm.federation.exchange import Header, distinct  # noqa: E402
from fedmllm.flower.messages import Packed, ask, read_update  # noqa: E402
from fedmllm.flower.simulation_client import KEPT, Job  # noqa: E402
from fedmllm.flower.simulation_client import app as client_app  # noqa: E402
from fedmllm.flower.wire import ABOUT  # noqa: E402

if os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == "0":
    ray_constants.ENABLE_RAY_CLUSTER = False  # as if the variable had been there, where somebody imported ray before us

START_S = 180.0  # Ray's own start-up, at most
POLL_S = 0.02
DEAD_ACTOR = re.compile(r"RayActorError|ActorDiedError|ActorUnavailableError|WorkerCrashedError")


class Simulation:
    """A running Flower simulation: a ServerApp that lends its grid, and actors behind it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.grid: Grid | None = None
        self._ready, self._close, self._error = threading.Event(), threading.Event(), ""
        self._thread = threading.Thread(target=self._simulate, name="flower-simulation", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_S) or self.grid is None:
            self.stop()
            raise FedmllmError(f"Flower's simulation did not start: {self._error or f'nothing within {START_S:.0f} s'}")
        if threading.current_thread() is threading.main_thread():  # Ray has put a handler of its own in our place
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    def _simulate(self) -> None:
        logging.getLogger("flwr").setLevel(logging.ERROR)
        server_app = ServerApp()

        @server_app.main()
        def lend(grid: Grid, context: Context) -> None:
            while len(list(grid.get_node_ids())) < self.settings.num_actors:  # they register beside us
                if self._close.wait(0.05):
                    return
            self.grid = grid
            self._ready.set()
            self._close.wait()

        try:
            run_simulation(server_app, client_app, self.settings.num_actors, backend_config=self._backend())
        except BaseException as error:  # flwr leaves by SystemExit where an extra is missing
            self._error = f"{type(error).__name__}: {error}"
        finally:
            self.grid = None
            self._ready.set()

    def _backend(self) -> dict[str, Any]:
        s = self.settings
        resources = {"num_cpus": s.cpus_per_actor, "num_gpus": s.gpus_per_actor}
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address := os.environ.get("RAY_ADDRESS"):  # the user's cluster
            return {"init_args": {"address": address, **quiet}, "client_resources": resources}
        here = {"num_cpus": s.num_actors * s.cpus_per_actor, "include_dashboard": False}
        return {"init_args": {**here, **quiet}, "client_resources": resources}

    def ended(self) -> str:
        """Why it no longer runs; "" while it does."""
        return "" if self._thread.is_alive() and self.grid else f"Flower's simulation ended: {self._error or 'stopped'}"

    def check(self) -> dict[int, str]:
        """Nobody is lost while it runs. Raises FedmllmError where it has ended."""
        if reason := self.ended():
            raise FedmllmError(reason)
        return {}

    def stop(self) -> None:
        self._close.set()
        self._thread.join(timeout=30)


_running: dict[Settings, Simulation] = {}


def running(settings: Settings) -> Simulation:
    """The simulation of this process: started if there is none, started anew for other settings."""
    if settings not in _running or _running[settings].ended():
        stop()
        _running[settings] = Simulation(settings)
    return _running[settings]


def stop() -> None:
    """End the simulation of this process, and its actors."""
    while _running:
        _running.popitem()[1].stop()


# Flower's worker threads are waited for when the interpreter ends, before `atexit` runs, and only end when told to.
threading._register_atexit(stop)  # type: ignore[attr-defined]


class FlowerSimulation:
    """Engine: (round, what each client receives) -> their updates, in ascending client order."""

    def __init__(self, settings: EngineSettings, clients: Clients) -> None:
        if not isinstance(settings, Settings) or clients.experiment is None:
            raise FedmllmError(
                "engine flower-simulation needs its own settings, and an experiment that actors can load"
            )
        self._settings, self._clients, self._experiment = settings, clients, clients.experiment

    def __call__(self, at: Round, sents: Mapping[int, Sent]) -> Iterator[ClientUpdate | ClientFailure]:
        answers = self._ask(at, {client: sents[client] for client in sorted(sents)})
        if dead := [a.client for a in answers if isinstance(a, ClientFailure) and DEAD_ACTOR.search(a.reason)]:
            stop()  # Flower puts a dead actor back among the idle ones, where it would fail every message it gets
            again = {answer.client: answer for answer in self._ask(at, {client: sents[client] for client in dead})}
            answers = [again.get(answer.client, answer) for answer in answers]
        yield from answers

    def _ask(self, at: Round, sents: Mapping[int, Sent]) -> list[ClientUpdate | ClientFailure]:
        simulation = running(self._settings)
        grid = simulation.grid
        if grid is None:
            raise FedmllmError(simulation.ended())
        nodes = sorted(grid.get_node_ids())  # alike: a message says which client it is about
        packed: dict[int, Packed] = {}
        for tree, clients in distinct({client: sent.travelling() for client, sent in sents.items()}):
            packed |= dict.fromkeys(clients, Packed(tree))
        messages = {
            client: Message(
                packed[client].content({"job": self._job(client, at, sent)}), nodes[i % len(nodes)], "train"
            )
            for i, (client, sent) in enumerate(sents.items())
        }
        replies = dict(ask(grid, messages, self._settings.timeout_s, POLL_S, simulation.check))
        return [self._read(client, at, sent, replies[client]) for client, sent in sents.items()]

    def _read(self, client: int, at: Round, sent: Sent, reply: Message | str) -> ClientUpdate | ClientFailure:
        extra = self._clients.aggregator.returned_extra(sent)
        update = read_update(client, reply, sent.returned(), extra)
        if isinstance(update, ClientUpdate) and isinstance(reply, Message) and KEPT in reply.content[ABOUT]:
            self._clients.keep(client, at, safetensors.torch.load(reply.content[ABOUT][KEPT]))
        return update

    def _job(self, client: int, at: Round, sent: Sent) -> bytes:
        threads = self._settings.threads or torch.get_num_threads()
        kept = self._clients.kept(client, at)
        shard, state = self._clients.shards[client], safetensors.torch.save(kept) if kept else b""
        job = cloudpickle.dumps(Job(self._experiment, self._clients.budget, at, Header.of(sent), shard, threads, state))
        return bytes(cloudpickle.dumps((self._experiment.imports, job)))
