"""The ServerApp of a real federation: our round loop over the sites' answers, with checkpoints, on the server's machine.

A round asks each site of the cohort once. Too few answers: those that are missing are asked again; still too few: the run
stops with a reason, and `--resume` goes on from its last finished round. Nothing waits without an end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import http_grid

from fedmllm.config.engine import Engine as EngineSettings
from fedmllm.config.engine import FlowerSites as Settings
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.core.tensors import is_finite
from fedmllm.core.types import ClientFailure, ClientUpdate, Params, Round, Sent
from fedmllm.federation.client import Clients
from fedmllm.flower.messages import Packed, ask, read_update
from fedmllm.flower.patient import be_patient
from fedmllm.flower.server.experiment import AtSites
from fedmllm.flower.site.config import Request
from fedmllm.runs.run import run

POLL_S = 0.2
LATE_S = 5.0  # that a message outlives its round: the reason is then ours, "no answer within ...", not Flower's "unavailable"
PATIENCE_S = 60.0  # with a SuperLink that does not answer; started anew it would not know this run
PULL_S, PULL_FIRST_S, PULL_CAP_S = 600.0, 0.05, 0.5  # for an answer's parts: in all, between looks at first and later
RESTARTED = "its SuperNode was started anew and has forgotten the request"
Answers = dict[int, ClientUpdate | ClientFailure]


@dataclass(frozen=True)
class Job:
    """What `fedmllm server run` hands over, as a JSON file on the server's machine."""

    experiment: Experiment  # as `over_sites` made it
    nodes: Mapping[str, int]  # site -> Flower's node id, bound to the site's key; client 0 first
    out: Path
    resume: bool
    folder: Path  # from where the paths of the experiment count

    @classmethod
    def read(cls, path: Path) -> Job:
        table = json.loads(path.read_text(encoding="utf-8"))
        experiment = Experiment.parse(table["experiment"], str(path))
        return cls(experiment, table["nodes"], Path(table["out"]), table["resume"], Path(table["folder"]))


@dataclass(frozen=True)
class Link:
    """The sites that a ServerApp can reach: lent to the engine while the app runs."""

    grid: Grid
    nodes: Sequence[int]  # of client 0, 1, ...


# An answer is announced before its parts are there. Flower looks for them again after 1, 2, 4 s, and up to two hours long.
http_grid.pull_objects = partial(
    http_grid.pull_objects,
    max_time=PULL_S,
    max_tries_per_object=None,
    initial_backoff=PULL_FIRST_S,
    backoff_cap=PULL_CAP_S,
)

_link: list[Link] = []
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the job whose file the run's configuration names. Ends with an error where the run stopped."""
    job = Job.read(Path(str(context.run_config["job"])))
    os.chdir(job.folder)
    be_patient()
    grid._retry_invoker.max_time = (
        PATIENCE_S  # Flower's own has no end: its threads would outlive a SuperLink that is gone
    )
    _link[:] = [Link(grid, tuple(job.nodes.values()))]
    run(job.experiment, job.out, resume=job.resume)


class Sites:
    """Engine: (round, what each client receives) -> what the sites responded, in ascending client order."""

    def __init__(self, settings: EngineSettings, clients: Clients) -> None:
        if not isinstance(settings, Settings) or not clients.experiment:
            raise FedmllmError("engine flower-sites needs its own settings")
        if not _link:
            raise FedmllmError("engine flower-sites: run it with `fedmllm server run`, which reaches the sites")
        self._settings, self._clients, self._link = settings, clients, _link[0]
        self._experiment = clients.experiment
        if not isinstance(self._experiment.data, AtSites):
            raise FedmllmError(f"engine flower-sites: data is {self._experiment.data.name}, not at-sites")
        self._names = self._experiment.data.sites

    def __call__(self, at: Round, sents: Mapping[int, Sent]) -> Iterable[ClientUpdate | ClientFailure]:
        s, answers = self._settings, Answers()
        round_, cohort = at.number, list(sents)
        params = sents[cohort[0]].start  # the same for all: the engine's `supports` is empty
        for attempt in range(1, s.attempts + 1):
            missing = [k for k in sorted(cohort) if not usable(answers.get(k))]
            answers |= self._attempt(params, round_, missing)
            num_usable = sum(map(usable, answers.values()))
            if num_usable >= min(s.min_sites, len(cohort)):
                return [answers[client] for client in sorted(cohort)]
            if attempt < s.attempts:
                time.sleep(s.retry_s)
        said = "; ".join(
            f"{self._names[k]}: {a.reason if isinstance(a, ClientFailure) else 'its delta holds NaN or Inf'}"
            for k, a in sorted(answers.items())
            if not usable(a)
        )
        raise FedmllmError(
            f"round {round_}: {num_usable} of {len(cohort)} sites answered, engine.min_sites is {s.min_sites}, "
            f"after {s.attempts} attempts ({said}). --resume goes on from round {round_ - 1}"
        )

    def _attempt(self, params: Params, round_: int, cohort: Sequence[int]) -> Answers:
        """Ask each of these sites that is connected, or becomes so within `connect_s`."""
        grid, s = self._link.grid, self._settings
        since = self._connected(cohort)
        packed = Packed(params)
        messages = {k: self._message(packed, round_, k) for k in since}
        answers: Answers = {k: ClientFailure(k, "not connected") for k in cohort}

        def lost() -> dict[int, str]:  # a SuperNode that was killed forgets what it had fetched, and Flower waits on
            now = activations(grid)
            return {k: RESTARTED for k in since if now.get(self._link.nodes[k], since[k]) != since[k]}

        for client, reply in ask(grid, messages, s.round_timeout_s, POLL_S, lost):
            answers[client] = read_update(client, reply, params)
        return answers

    def _connected(self, cohort: Sequence[int]) -> dict[int, str]:
        """Client -> since when, of those that are connected, once all are or `connect_s` is over."""
        until = time.monotonic() + self._settings.connect_s
        while True:
            known = activations(self._link.grid)
            online = {k: known[node] for k in cohort if (node := self._link.nodes[k]) in known}
            if len(online) == len(cohort) or time.monotonic() > until:
                return online
            time.sleep(POLL_S)

    def _message(self, packed: Packed, round_: int, client: int) -> Message:
        base = self._clients.backbone.digest
        request = Request.of(self._experiment, base, self._names[client], client, round_)
        content = packed.content({"request": request.model_dump_json()})
        ttl = self._settings.round_timeout_s + LATE_S  # a site that was away does not work off what is over
        return Message(content, self._link.nodes[client], "train", ttl=ttl, group_id=str(round_))


def activations(grid: Grid) -> dict[int, str]:
    """Node id -> when it connected last, of the nodes that are connected."""
    return {node.node_id: node.last_activated_at for node in grid.get_nodes()}


def usable(answer: ClientUpdate | ClientFailure | None) -> bool:
    """Whether it can count towards `min_sites`; limits of the screen are checked later, by the loop."""
    return isinstance(answer, ClientUpdate) and is_finite(answer.delta)
