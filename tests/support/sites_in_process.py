"""Real sites and the server's engine in one process: trainers and messages are real, only Flower's transport is a call."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from flower_federation import NAMES, Federation

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.core.tensors import flatten
from fedmllm.flower.keys import make_site_key
from fedmllm.flower.secure.member import SecureMember
from fedmllm.flower.server import server_app
from fedmllm.flower.server.experiment import over_sites
from fedmllm.flower.site.config import Refused, Site
from fedmllm.flower.site.process import answer
from fedmllm.flower.site.trainer import Trainer, _floats, _request
from fedmllm.runs.run import run


class InThisProcess:
    """`ResidentTrainer` without its process."""

    def __init__(self, folder: Path) -> None:
        self.trainer, self.requests = Trainer(Site.load(folder / "site.toml"), folder / "site-state"), []

    @property
    def site(self) -> Site:
        return self.trainer.site

    def ask(self, head: dict[str, str], adapter: bytes) -> tuple[dict[str, Any], bytes]:
        self.requests.append(json.loads(head["request"]))
        try:
            delta, about = self.trainer.train(_request(head["request"]), _floats(adapter), head["manifest"])
        except (Refused, FedmllmError) as error:
            return {"refused": str(error)}, b""
        return {**about, "num_loads": 1, "busy_s": 0.0}, flatten(delta).numpy().tobytes()


class Wire:
    """A grid whose nodes are sites of this process."""

    def __init__(self, folder: Path) -> None:
        self.sites, self.members, self.replies = {}, {}, []
        self._waiting: dict[str, Any] = {}
        for node, name in enumerate(NAMES, start=10):
            self.sites[node] = InThisProcess(folder / name)
            self.members[node] = SecureMember(self.sites[node].trainer.site, folder / name / "site-state")

    def get_nodes(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(node_id=node, last_activated_at="now") for node in self.sites]

    def push_messages(self, messages) -> list[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            ids.append(f"message-{len(self.replies)}-{len(ids)}-{node}")
            content, _ = answer(message, self.sites[node], self.members[node])
            self.replies.append((node, content))
            self._waiting[ids[-1]] = Plain(content, reply_to=ids[-1])
        return ids

    def pull_messages(self, ids) -> list[Any]:
        return [self._waiting[i] for i in ids]


class Plain:
    """A message without Flower's ids of a task, which exist in a running ServerApp only."""

    def __init__(self, content, node: int = 0, kind: str = "", reply_to: str = "", **_: Any) -> None:
        self.content, self.metadata = content, SimpleNamespace(dst_node_id=node, reply_to_message_id=reply_to)

    def has_error(self) -> bool:
        return False


OPEN = "extra_tensors = true\nfrozen_adapter = true\n"


def write_sites(
    rows: Federation, folder: Path, allow: str = OPEN, peers: bool = True, own: Mapping[str, str] = MappingProxyType({})
) -> None:
    """A file and a key for each site; with all public keys if `peers`, and with limits of its `own`."""
    for name in NAMES:
        if not (folder / name / "site.key").exists():
            make_site_key(folder / name / "site.key")
    keys = {name: (folder / name / "site.key.pub").read_text().strip() for name in NAMES}
    known = "".join(f'{name} = "{key}"\n' for name, key in keys.items()) if peers else ""
    for name in NAMES:
        head = f'name = "{name}"\nserver = "localhost:1"\nca = "ca.crt"\nkey = "site.key"\nthreads = 1\n'
        tables = f"{rows._data(name)}[peers]\n{known}[allow]\n{allow}{own.get(name, '')}"
        (folder / name / "site.toml").write_text(head + tables)


def over_the_wire(
    rows: Federation,
    folder: Path,
    changes: list[str],
    monkeypatch,
    allow: str = OPEN,
    resume: bool = False,
    sinks=(),
    own: Mapping[str, str] = MappingProxyType({}),
) -> Wire:
    write_sites(rows, folder, allow, own=own)
    wire = Wire(folder)
    monkeypatch.setattr(server_app, "Message", Plain)
    monkeypatch.setattr(server_app, "_link", [server_app.Link(wire, tuple(wire.sites))])
    experiment = over_sites(Experiment.load(rows.folder / "experiment.toml", changes), NAMES, test=True)
    run(experiment, folder / "out", sinks, resume=resume)
    return wire


def adapter(out: Path) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def in_process(rows: Federation, folder: Path, changes: list[str]) -> str:
    experiment = Experiment.load(rows.folder / "experiment.toml", [*changes, "engine.name=in-process"])
    run(experiment, folder / "one")
    return adapter(folder / "one")
