"""The server's side around the ServerApp: SuperLink, registered sites, and runs that outlive a killed SuperLink.

Everything lies in one folder: certificates, the register of sites, SuperLink's database, the app. Flower's own programs do
the work, so this module loads neither torch nor Flower.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.spec import Spec, validate
from fedmllm.core.storage import write_atomically
from fedmllm.flower.processes import binary, die_with_parent, environment, exclusive_lock, is_dead, patient, stop
from fedmllm.flower.server.experiment import over_sites
from fedmllm.flower.server.watch import Watch
from fedmllm.flower.site.config import check_name
from fedmllm.runs.record import read
from fedmllm.scenarios.partitions import in_order

SETTINGS, SITES, CONNECTION, SECRET = "server.toml", "sites.json", "fedmllm", "executor-secret"
START_S = 60.0  # of a SuperLink, at most
OWN_REASON = "ServerApp failed with exception: "
APP = """[project]
name = "fedmllm-federation"
version = "0.1.0"
description = "The round loop of fedmllm; the code is the installed package's"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedmllm"

[tool.flwr.app.components]
serverapp = "fedmllm.flower.server.server_app:app"
clientapp = "fedmllm.flower.simulation_client:app"

[tool.flwr.app.config]
job = ""
"""


class Listen(Spec):
    """`server.toml`."""

    host: str = "127.0.0.1"  # SuperLink's own: whoever reaches it can start runs. Others come through a gate or a proxy
    port: int = Field(8000, ge=1, le=65535)
    gate: str = Field(
        "", pattern=r"^$|^\S+:[0-9]{1,5}$"
    )  # "0.0.0.0:9092": what sites reach; "" = none, or a proxy of your own


class Server:
    """A federation's server, by its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        try:
            table = tomllib.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"{folder / SETTINGS}: cannot be read: {error.strerror}; `fedmllm server new` makes it"
            ) from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{folder / SETTINGS}: not a TOML file: {error}") from None
        self.listen = Listen.model_validate(validate(Listen, table, str(folder / SETTINGS)))
        where = (
            f'address = "127.0.0.1:{self.listen.port}"\nroot-certificates = {json.dumps(str(self.folder / "ca.crt"))}\n'
        )
        connection = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{where}'
        path = self.folder / "flwr" / "config.toml"
        if (
            not path.exists() or path.read_text(encoding="utf-8") != connection
        ):  # the folder was moved, or mounted elsewhere
            write_atomically(path, connection)

    @classmethod
    def new(cls, folder: Path, hosts: Sequence[str], port: int, gate: str = "") -> Server:
        """A folder with certificates for `hosts`, settings, and the app. Raises FedmllmError where one exists."""
        from fedmllm.flower.keys import make_authority

        if (folder / SETTINGS).exists():
            raise FedmllmError(f"{folder / SETTINGS} exists; choose another folder")
        make_authority(folder, hosts)
        settings = f'host = "127.0.0.1"\nport = {port}\ngate = "{gate}"\n'
        (folder / SETTINGS).write_text(settings, encoding="utf-8")
        (folder / "app").mkdir()
        (folder / "app" / "pyproject.toml").write_text(APP, encoding="utf-8")
        (folder / "flwr").mkdir(mode=0o700)
        write_atomically(folder / SITES, "{}")
        return cls(folder)

    def start(self) -> subprocess.Popen[bytes]:
        """A SuperLink that ends with us -> its process, once it answers. Raises FedmllmError where it does not."""
        f = self.folder
        command = [
            binary("flower-superlink"), "--host", self.listen.host, "--port", str(self.listen.port),
            "--ssl-ca-certfile", str(f / "ca.crt"),
            "--ssl-certfile", str(f / "server.crt"), "--ssl-keyfile", str(f / "server.key"),
            "--enable-supernode-auth", "--database", str(f / "state.db"), "--disable-runtime-dependency-installation",
            "--isolation", "process", "--superexec-auth-secret-file", str(f / SECRET),
        ]  # fmt: skip
        process = self._child(command, "superlink.log")
        until = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(FedmllmError):
                self.flwr("list", "--limit", "1", CONNECTION)
                return process
            time.sleep(0.5)
        stop(process)
        raise FedmllmError(f"SuperLink did not start on port {self.listen.port}; see {f / 'superlink.log'}")

    def start_gate(self) -> subprocess.Popen[bytes]:  # what sites of other machines reach
        host, _, port = self.listen.gate.rpartition(":")
        module = [sys.executable, "-m", "fedmllm.flower.server.gate", str(self.folder)]
        return self._child([*module, host, port, str(self.listen.port)], "gate.log")

    def start_executor(self) -> subprocess.Popen[bytes]:
        """What starts ServerApps. SuperLink would start one itself, but not another where that one dies: no run would begin."""
        command = [
            *patient("flower-superexec"), "--runtime-api-address", f"127.0.0.1:{self.listen.port}",
            "--root-certificates", str(self.folder / "ca.crt"), "--superexec-auth-secret-file", str(self.folder / SECRET),
        ]  # fmt: skip
        return self._child(command, "superlink.log")

    def _child(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        f = self.folder
        with (f / log).open("ab") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=file, env=environment(f / "flwr"), cwd=f, preexec_fn=die_with_parent
            )

    def serve(self, say: Callable[[str], None]) -> None:
        """Keep a SuperLink and its helpers running until interrupted; what dies is started again, on the same database."""
        from fedmllm.flower.keys import CA_KEY, SERVER_KEY, refuse_open_key

        for key in (CA_KEY, SERVER_KEY):
            if (self.folder / key).exists():  # an authority's key may well lie elsewhere
                refuse_open_key(self.folder / key)
        with contextlib.closing(exclusive_lock(self.folder)), contextlib.ExitStack() as children:
            self._serve(say, children)

    def _serve(self, say: Callable[[str], None], children: contextlib.ExitStack) -> None:
        with open(os.open(self.folder / SECRET, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:  # noqa: PTH123
            file.write(secrets.token_hex(32).encode())

        def kept(child: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
            children.callback(stop, child)
            return child

        process, executor = kept(self.start()), kept(self.start_executor())
        gate = kept(self.start_gate()) if self.listen.gate else None
        door = f"; sites reach {self.listen.gate}" if gate else ""
        say(f"SuperLink on {self.listen.host}:{self.listen.port}{door}; log: {self.folder / 'superlink.log'}")
        while True:
            if process.poll() is not None:
                say(f"SuperLink died (exit status {process.returncode}); starting it again")
                process = kept(self.start())
            if is_dead(executor):  # it is not waited for: a ServerApp of its lives as long as its process id is taken
                say("the executor died; starting another; a run that is under way goes on")
                executor = kept(self.start_executor())
            if gate and gate.poll() is not None:
                say(f"the gate died (exit status {gate.returncode}); starting it again")
                gate = kept(self.start_gate())
            time.sleep(1)

    def flwr(self, *words: str, timeout_s: float = 180.0) -> dict[str, Any]:
        """`flwr WORDS --format json` -> what it printed. Raises FedmllmError with Flower's own words."""
        command = [binary("flwr"), *words, "--format", "json"]
        try:
            done = subprocess.run(
                command,
                env=environment(self.folder / "flwr"),
                cwd=self.folder,
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise FedmllmError(f"flwr {words[0]}: no answer from SuperLink within {timeout_s:g} s") from None
        text = done.stdout[done.stdout.find("{") :]
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError:
            found = {"error-message": (done.stdout + done.stderr).strip()[-500:]}
        if done.returncode or not found.get("success"):
            raise FedmllmError(f"flwr {' '.join(words[:2])}: {found.get('error-message', found)}")
        return found

    def sites(self) -> dict[str, int]:
        """Registered sites with their node ids, in the order of their names: client 0, 1, ..."""
        table = json.loads((self.folder / SITES).read_text(encoding="utf-8"))
        return {name: int(table[name]) for name in sorted(table, key=in_order)}

    def add(self, name: str, public_key: Path) -> int:
        """Register a site by its public key -> its node id. SuperLink must be running."""
        sites = self.sites()
        try:
            check_name(name)
        except ValueError as error:
            raise ConfigError(f"site {name[:100]!r}: {error}") from None
        if not public_key.is_file():
            raise ConfigError(f"{public_key}: no such file; a site's public key, site.key.pub, is needed")
        if name in sites:
            raise FedmllmError(f"site {name!r} is registered already, as node {sites[name]}")
        node = int(
            self.flwr("supernode", "register", str(public_key.absolute()), CONNECTION, "--name", name)["node-id"]
        )
        write_atomically(self.folder / SITES, json.dumps({**sites, name: node}, indent=1))
        return node

    def remove(self, name: str) -> int:
        """Take a site's key back -> its node id. SuperLink, which must be running, lets it in no more."""
        sites = self.sites()
        if name not in sites:
            raise ConfigError(f"site {name[:100]!r} is not registered; registered: {', '.join(sites) or 'none'}")
        self.flwr("supernode", "unregister", str(sites[name]), CONNECTION)
        write_atomically(self.folder / SITES, json.dumps({k: v for k, v in sites.items() if k != name}, indent=1))
        return sites[name]

    def status(self, run_id: str) -> tuple[str, str]:
        """Of a run: ("running", ""), ("finished:failed", why), ...; "unreachable" where SuperLink does not answer."""
        try:
            found = self.flwr("list", "--run-id", run_id, CONNECTION)["runs"][0]
            return str(found["status"]), str(found.get("status-details", ""))
        except (FedmllmError, KeyError, IndexError):
            return "unreachable", ""

    def run(
        self, experiment: Experiment, out: Path, resume: bool, test: bool, only: Sequence[str] = (), restarts: int = 5
    ) -> Iterator[dict[str, Any]]:
        """Run an experiment over the sites; yield the record's events as they come.

        A run that a killed SuperLink took with it is begun again from its last finished round, `restarts` times at most.
        Raises FedmllmError where it stopped for a reason of its own.
        """
        sites = {k: v for k, v in self.sites().items() if not only or k in only}
        if not sites or len(sites) < len(only):
            raise ConfigError(f"sites: got {list(only)}; registered: {', '.join(self.sites()) or 'none'}")
        whole = over_sites(experiment, tuple(sites), test)
        out.mkdir(parents=True, exist_ok=True)
        record, job = out.absolute() / "record.jsonl", out.absolute() / "job.json"
        if record.exists() and not resume:
            raise FedmllmError(f"{record} exists; --resume goes on with that run; or choose another --out")
        seen = sum(1 for _ in read(record)) if record.exists() else 0
        for attempt in range(restarts + 1):
            settings = whole.model_dump(mode="json")
            where = {"out": str(out.absolute()), "folder": str(Path.cwd())}
            about = {"nodes": sites, "resume": resume or attempt > 0, **where}
            write_atomically(job, json.dumps({"experiment": settings, **about}))
            started = self._submit(job)
            yield {"event": "submitted", "run": started, "attempt": attempt + 1}
            watch = Watch(self.status, started, record)
            try:
                while True:
                    ended = watch.ended()
                    events = list(read(record)) if record.exists() else []
                    seen = min(seen, len(events))  # a resumed record forgets what came after its checkpoint
                    yield from events[seen:]
                    last, seen = (events[-1] if events else {}), len(events)
                    if last.get("event") == "end" and (out / "summary.json").exists():
                        return
                    if ended:
                        break
                    time.sleep(0.5)
            except (KeyboardInterrupt, GeneratorExit):
                with contextlib.suppress(FedmllmError):
                    self.flwr("stop", started, CONNECTION)
                raise
            if watch.details.startswith(OWN_REASON):  # SuperLink lived to hear it, so it is the run's own
                raise FedmllmError(watch.details.removeprefix(OWN_REASON))
            yield {"event": "lost", "status": watch.status, "note": f"log: {self.folder / 'superlink.log'}"}
        raise FedmllmError(
            f"the run was lost {restarts + 1} times; see {self.folder / 'superlink.log'}; --resume goes on"
        )

    def _submit(self, job: Path) -> str:
        """Start the run once SuperLink answers -> its id."""
        until, words = time.monotonic() + 2 * START_S, ("-c", f"job={json.dumps(str(job))}")
        while True:
            try:
                return str(self.flwr("run", str(self.folder / "app"), CONNECTION, *words)["run-id"])
            except FedmllmError as error:
                if time.monotonic() > until:
                    raise FedmllmError(
                        f"no run could be started: {error}; is `fedmllm server start` running?"
                    ) from None
            time.sleep(2)
