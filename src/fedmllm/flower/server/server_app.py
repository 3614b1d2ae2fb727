"""ServerApp of a real federation: the round loop over sites.

A round asks each site of the cohort once. After too few replies the missing sites are asked again; after too few attempts
the run stops with a reason, and `--resume` continues from its last finished round. Every wait has a limit.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedmllm.config.engine import Engine as EngineSettings
from fedmllm.config.engine import FlowerSites as Settings
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.core.tensors import is_finite
from fedmllm.core.types import ClientFailure, ClientUpdate, Params, Round, Sent
from fedmllm.federation.client import Clients
from fedmllm.federation.exchange import distinct
from fedmllm.flower import patches
from fedmllm.flower.messages import Packed, ask, read_update
from fedmllm.flower.request import DIGEST, KEPT, Request, header_of
from fedmllm.flower.secure.terms import Terms
from fedmllm.flower.server.experiment import AtSites
from fedmllm.flower.server.ranks import SiteRanks
from fedmllm.flower.server.secure_rounds import SecureRounds
from fedmllm.flower.wire import ABOUT
from fedmllm.runs.run import run

_POLL_S = 0.2
LATE_S = 5.0  # a message lives longer than its round, so that the reason is "no reply within ...", not Flower's "unavailable"
PATIENCE_S = 60.0  # with a SuperLink that does not respond; a restarted one does not know this run
NOT_CONNECTED = "not connected"
RESTARTED = "its SuperNode was restarted and lost the request"
Answers = dict[int, ClientUpdate | ClientFailure]


@dataclass(frozen=True)
class ServerJob:
    """Arguments of a run, as `fedmllm server run` writes them into a JSON file on the server's machine."""

    experiment: Experiment  # as `over_sites` made it
    nodes: Mapping[str, int]  # site -> Flower's id of its node, which is bound to the site's key; client 0 first
    out: Path
    resume: bool
    folder: Path  # base of the experiment's relative paths

    @classmethod
    def read(cls, path: Path) -> ServerJob:
        table = json.loads(path.read_text(encoding="utf-8"))
        experiment = Experiment.parse(table["experiment"], str(path))
        return cls(experiment, table["nodes"], Path(table["out"]), table["resume"], Path(table["folder"]))


@dataclass(frozen=True)
class Link:
    """Connection of the running ServerApp to the sites, for the engine."""

    grid: Grid
    nodes: Sequence[int]  # of client 0, 1, ...


_link: list[Link] = []
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the job that the run's configuration names. Raises if the run stopped before its end."""
    job = ServerJob.read(Path(str(context.run_config["job"])))
    os.chdir(job.folder)
    patches.retry_server_errors()
    patches.pull_replies_often()
    patches.limit_retries(grid, PATIENCE_S)
    _link[:] = [Link(grid, tuple(job.nodes.values()))]
    run(job.experiment, job.out, resume=job.resume)


class Sites:
    """Engine `flower-sites`: maps (round, what each client receives) to the replies, in ascending client order.

    Args:
        settings: Of this engine.
        clients: The server's view of them: `AtSites`.

    Raises:
        FedmllmError: Other settings or data, or no running ServerApp.
    """

    def __init__(self, settings: EngineSettings, clients: Clients) -> None:
        if not isinstance(settings, Settings) or not clients.experiment:
            raise FedmllmError("engine flower-sites needs its own settings")
        if not _link:
            raise FedmllmError("engine flower-sites: run it with `fedmllm server run`, which connects to the sites")
        self.settings, self.clients, self._link = settings, clients, _link[0]
        self.experiment = clients.experiment
        if not isinstance(self.experiment.data, AtSites):
            raise FedmllmError(f"engine flower-sites: data is {self.experiment.data.name}, not at-sites")
        self.names = self.experiment.data.sites
        self.limited_ranks = SiteRanks(self, self.experiment.backbone.lora.r)
        self._secure = SecureRounds(self, settings.secure) if settings.secure else None

    def __call__(self, at: Round, sents: Mapping[int, Sent]) -> Iterable[ClientUpdate | ClientFailure]:
        if self._secure:
            return self._secure.round(at, sents)
        s, answers = self.settings, Answers()
        round_, cohort = at.number, sorted(sents)
        for attempt in range(1, s.attempts + 1):
            missing = [k for k in cohort if not usable(answers.get(k))]
            answers |= self._attempt(at, {k: sents[k] for k in missing})
            num_usable = sum(map(usable, answers.values()))
            if num_usable >= min(s.min_sites, len(cohort)):
                return [answers[client] for client in cohort]
            if attempt < s.attempts:
                time.sleep(s.retry_s)
        said = "; ".join(
            f"{self.names[k]}: {a.reason if isinstance(a, ClientFailure) else 'its delta holds NaN or Inf'}"
            for k, a in sorted(answers.items())
            if not usable(a)
        )
        raise FedmllmError(
            f"round {round_}: {num_usable} of {len(cohort)} sites replied, engine.min_sites is {s.min_sites}, "
            f"after {s.attempts} attempts ({said}). --resume continues from round {round_ - 1}"
        )

    def _attempt(self, at: Round, sents: Mapping[int, Sent]) -> Answers:
        """Ask each of these sites that is connected, or becomes so within `connect_s`."""
        since = self.connected(list(sents))
        answers: Answers = {k: ClientFailure(k, NOT_CONNECTED) for k in sents}
        for client, reply in self.exchange(at, since, self.requests(at, {k: sents[k] for k in since})):
            answers[client] = self._read(client, at, sents[client], reply)
        return answers

    def exchange(
        self, at: Round, since: Mapping[int, str], contents: Mapping[int, RecordDict]
    ) -> Iterator[tuple[int, Message | str]]:
        """Send a message to each of these connected clients; yield the replies as they come, or why there is none."""
        grid, s = self._link.grid, self.settings
        ttl = s.round_timeout_s + LATE_S  # a site that reconnects does not train for a round that is over
        messages = {
            k: Message(content, self._link.nodes[k], "train", ttl=ttl, group_id=str(at.number))
            for k, content in contents.items()
        }

        def lost() -> dict[int, str]:  # a SuperNode that was killed loses what it had fetched; Flower does not notice
            now = activations(grid)
            return {k: RESTARTED for k in contents if now.get(self._link.nodes[k], since[k]) != since[k]}

        yield from ask(grid, messages, s.round_timeout_s, _POLL_S, lost)

    def requests(
        self, at: Round, sents: Mapping[int, Sent], terms: Mapping[int, Terms] | None = None
    ) -> dict[int, RecordDict]:
        """The content of the message to each of these clients; with the terms of a secure sum, if it is one."""
        contents: dict[int, RecordDict] = {}
        for tree, clients in distinct({k: sent.travelling() for k, sent in sents.items()}):
            packed = Packed(tree)
            contents |= {k: self._content(packed, at, k, sents[k], terms[k] if terms else None) for k in clients}
        return contents

    def _read(self, client: int, at: Round, sent: Sent, reply: Message | str) -> ClientUpdate | ClientFailure:
        """A site's reply; the server stores only the digest of the state that the site keeps."""
        update = read_update(client, reply, sent.returned(), self.clients.aggregator.returned_extra(sent))
        if isinstance(update, ClientUpdate) and isinstance(reply, Message) and not self.keep_digest(client, at, reply):
            return ClientFailure(client, "its reply cannot be read: the digest of its state is not one")
        return update

    def keep_digest(self, client: int, at: Round, reply: Message) -> bool:
        """Store the digest of the state that a site keeps, if the algorithm has one. False if the reply has a bad one."""
        sha = str(reply.content[ABOUT].get(KEPT, "")) if self.clients.state else ""
        if not re.fullmatch(f"({DIGEST})?", sha):
            return False
        if self.clients.state:
            self.clients.keep(client, at, marker(sha))
        return True

    def _kept(self, client: int, at: Round) -> dict[int, str]:
        """Rounds of which the site's state counts, with its digest."""
        store = self.clients.state
        rounds = [n for n in store.rounds(client) if n < at.number] if store else []
        return {n: sha_of(store.read(client, n + 1)) for n in rounds} if store else {}

    def connected(self, cohort: Sequence[int], wait: bool = True) -> dict[int, str]:
        """The connected clients with the time since when; `wait`: once all are connected or `connect_s` is over."""
        until = time.monotonic() + (self.settings.connect_s if wait else 0)
        while True:
            known = activations(self._link.grid)
            online = {k: known[node] for k in cohort if (node := self._link.nodes[k]) in known}
            if len(online) == len(cohort) or time.monotonic() >= until:
                return online
            time.sleep(_POLL_S)

    def _content(self, packed: Packed, at: Round, client: int, sent: Sent, terms: Terms | None) -> RecordDict:
        base = self.clients.backbone.digest
        header, kept = header_of(sent, self.clients.aggregator), self._kept(client, at)
        most = self.limited_ranks.largest(client)
        request = Request.of(self.experiment, base, self.names[client], client, at, header, kept, most)
        return packed.content({"request": request.model_copy(update={"secure": terms}).model_dump_json()})


def marker(sha: str) -> Params:
    """A digest as the server's own entry for a client's state: resume, refusal and pruning treat it like the state itself."""
    return {"digest": torch.tensor([float(int(digit, 16)) for digit in sha])} if sha else {}


def sha_of(entry: Params) -> str:
    """Inverse of `marker`."""
    return "".join(f"{int(value):x}" for value in entry["digest"])


def activations(grid: Grid) -> dict[int, str]:
    """The connected nodes with the time of their last connection."""
    return {node.node_id: node.last_activated_at for node in grid.get_nodes()}


def usable(answer: ClientUpdate | ClientFailure | None) -> bool:
    """Return whether a reply counts towards `min_sites`. The round loop applies the update filter later."""
    return isinstance(answer, ClientUpdate) and is_finite(answer.delta) and is_finite(answer.extra)
