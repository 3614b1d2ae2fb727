"""Engine `flower-simulation`: clients in the Ray actors of Flower's simulation.

The round loop stays in this process and uses the grid of a ServerApp. The simulation starts at a process's first round,
because Ray needs 7 to 9 s for it, and serves all runs of the process. It ends with the process, or with `stop`.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
import torch

from fedmllm.flower import patches
from fedmllm.flower.processes import QUIET

patches.check_installed("flwr", "ray")
patches.prepare_ray()
for _name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"):
    os.environ.setdefault(_name, QUIET[_name])  # before flwr is imported

from flwr.app import Context, Message  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402
from ray import cloudpickle  # noqa: E402

from fedmllm.config.engine import Engine as EngineSettings  # noqa: E402
from fedmllm.config.engine import FlowerSimulation as Settings  # noqa: E402
from fedmllm.core.errors import FedmllmError  # noqa: E402
from fedmllm.core.types import ClientFailure, ClientUpdate, Round, Sent  # noqa: E402
from fedmllm.federation.client import Clients  # noqa: E402
from fedmllm.federation.exchange import Header, distinct  # noqa: E402
from fedmllm.flower.messages import Packed, ask, read_update  # noqa: E402
from fedmllm.flower.request import KEPT  # noqa: E402
from fedmllm.flower.simulation_client import Algorithm, SimulationJob  # noqa: E402
from fedmllm.flower.simulation_client import app as client_app  # noqa: E402
from fedmllm.flower.wire import ABOUT  # noqa: E402

patches.keep_ray_on_loopback()

_START_S = 180.0  # limit of the start, of which Ray takes most
_POLL_S = 0.02
DEAD_ACTOR = re.compile(r"RayActorError|ActorDiedError|ActorUnavailableError|WorkerCrashedError")


class Simulation:
    """A running Flower simulation: a ServerApp whose grid this process uses, and Ray actors.

    Args:
        settings: Number and resources of the actors.

    Raises:
        FedmllmError: It did not start within `START_S`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.grid: Grid | None = None
        self._ready, self._close, self._error = threading.Event(), threading.Event(), ""
        self._thread = threading.Thread(target=self._simulate, name="flower-simulation", daemon=True)
        self._thread.start()
        if not self._ready.wait(_START_S) or self.grid is None:
            self.stop()
            raise FedmllmError(
                f"Flower's simulation did not start: {self._error or f'nothing within {_START_S:.0f} s'}"
            )
        patches.restore_sigterm()

    def _simulate(self) -> None:
        logging.getLogger("flwr").setLevel(logging.ERROR)
        server_app = ServerApp()

        @server_app.main()
        def lend(grid: Grid, context: Context) -> None:
            # Actors register in threads of their own, and Ray, which replaces the handler of SIGTERM, connects in another one.
            while len(list(grid.get_node_ids())) < self.settings.num_actors or not patches.ray_is_connected():
                if self._close.wait(0.05):
                    return
            self.grid = grid
            self._ready.set()
            self._close.wait()

        try:
            run_simulation(server_app, client_app, self.settings.num_actors, backend_config=self._backend())
        except BaseException as error:  # flwr raises SystemExit if an extra is missing
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
        """The reason why it has ended; "" while it runs."""
        return "" if self._thread.is_alive() and self.grid else f"Flower's simulation ended: {self._error or 'stopped'}"

    def check(self) -> dict[int, str]:
        """No client is lost while the simulation runs. Raises FedmllmError if it has ended."""
        if reason := self.ended():
            raise FedmllmError(reason)
        return {}

    def stop(self) -> None:
        """End the ServerApp, and with it the actors."""
        self._close.set()
        self._thread.join(timeout=30)


_running: dict[Settings, Simulation] = {}


def running(settings: Settings) -> Simulation:
    """The simulation of this process; started if none runs with these settings."""
    if settings not in _running or _running[settings].ended():
        _stop()
        _running[settings] = Simulation(settings)
    return _running[settings]


def _stop() -> None:
    """End the simulation of this process, and its actors."""
    while _running:
        _running.popitem()[1].stop()


patches.call_before_threads_are_joined(_stop)  # Flower's worker threads end only after it


class SimulationEngine:
    """Maps (round, what each client receives) to their updates, in ascending client order.

    Args:
        settings: Of this engine.
        clients: Their experiment is what the actors load.

    Raises:
        FedmllmError: Other settings, or clients that do not come from an experiment.
    """

    def __init__(self, settings: EngineSettings, clients: Clients) -> None:
        if not isinstance(settings, Settings) or clients.experiment is None:
            raise FedmllmError(
                "engine flower-simulation needs its own settings, and an experiment that actors can load"
            )
        self._settings, self._clients, self._experiment = settings, clients, clients.experiment

    def __call__(self, at: Round, sents: Mapping[int, Sent]) -> Iterator[ClientUpdate | ClientFailure]:
        answers = self._ask(at, {client: sents[client] for client in sorted(sents)})
        if dead := [a.client for a in answers if isinstance(a, ClientFailure) and DEAD_ACTOR.search(a.reason)]:
            _stop()  # Flower puts a dead actor back among the idle ones, where every message to it would fail
            again = {answer.client: answer for answer in self._ask(at, {client: sents[client] for client in dead})}
            answers = [again.get(answer.client, answer) for answer in answers]
        yield from answers

    def _ask(self, at: Round, sents: Mapping[int, Sent]) -> list[ClientUpdate | ClientFailure]:
        simulation = running(self._settings)
        grid = simulation.grid
        if grid is None:
            raise FedmllmError(simulation.ended())
        nodes = sorted(grid.get_node_ids())  # all alike: the message names its client
        packed: dict[int, Packed] = {}
        for tree, clients in distinct({client: sent.travelling() for client, sent in sents.items()}):
            packed |= dict.fromkeys(clients, Packed(tree))
        messages = {
            client: Message(
                packed[client].content({"job": self._job(client, at, sent)}), nodes[i % len(nodes)], "train"
            )
            for i, (client, sent) in enumerate(sents.items())
        }
        replies = dict(ask(grid, messages, self._settings.timeout_s, _POLL_S, simulation.check))
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
        c = self._clients
        algorithm = Algorithm(c.objective, c.aggregator, c.availability, c.row_noise)
        job = SimulationJob(self._experiment, c.budget, at, Header.of(sent), shard, threads, state, algorithm)
        return bytes(cloudpickle.dumps((self._experiment.imports, cloudpickle.dumps(job))))
