"""A server's folder: settings, register of sites, commands to SuperLink."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.spec import Spec, validate
from fedmllm.core.storage import write_atomically, writing
from fedmllm.flower.processes import binary, environment
from fedmllm.flower.request import check_name
from fedmllm.scenarios.partitions import in_order

SETTINGS, SITES, CONNECTION = "server.toml", "sites.json", "fedmllm"
KEY_IN_USE = "Public key already in use"  # Flower's words
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

    host: str = "127.0.0.1"
    """Address of SuperLink. Whoever reaches it can start runs; sites connect through the gate or a proxy."""
    port: int = Field(8000, ge=1, le=65535)
    """Port of SuperLink."""
    gate: str = Field("", pattern=r"^$|^\S+:[0-9]{1,5}$")
    """Address of the gate, which sites connect to: "0.0.0.0:9092"; "" = no gate, for a server behind another proxy."""


class Server:
    """A federation's server.

    Args:
        folder: As `Server.new` made it. It may have been moved.

    Raises:
        ConfigError: `server.toml` cannot be read or has a bad key.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        try:
            table = tomllib.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"{folder / SETTINGS}: cannot be read: {error.strerror}; run `fedmllm server new`"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{folder / SETTINGS}: not a TOML file: {error}") from None
        self.listen = Listen.model_validate(validate(Listen, table, str(folder / SETTINGS)))
        ca = json.dumps(str(self.folder / "ca.crt"))
        address = f'address = "127.0.0.1:{self.listen.port}"\nroot-certificates = {ca}\n'
        connection = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{address}'
        path = self.folder / "flwr" / "config.toml"
        if not path.exists() or path.read_text(encoding="utf-8") != connection:  # the folder was moved or mounted
            write_atomically(path, connection)

    @classmethod
    def new(cls, folder: Path, hosts: Sequence[str], port: int, gate: str = "") -> Server:
        """Make a server's folder.

        Args:
            folder: Must not have a `server.toml`.
            hosts: Names and addresses by which sites reach the server; the certificate is for them.
            port: Of SuperLink, on loopback.
            gate: Address of the gate; "" = no gate.

        Raises:
            ConfigError: The port or the gate is not valid.
            FedmllmError: The folder has a `server.toml` or a key already, or cannot be written.
        """
        from fedmllm.flower.keys import make_authority

        if (folder / SETTINGS).exists():
            raise FedmllmError(f"{folder / SETTINGS} exists; choose another folder")
        validate(Listen, {"port": port, "gate": gate}, "")
        with writing(folder):
            make_authority(folder, hosts)
            write_atomically(folder / SETTINGS, f'host = "127.0.0.1"\nport = {port}\ngate = "{gate}"\n')
            (folder / "app").mkdir()
            write_atomically(folder / "app" / "pyproject.toml", APP)
            (folder / "flwr").mkdir(mode=0o700)
            write_atomically(folder / SITES, "{}")
        return cls(folder)

    def flwr(self, *words: str, timeout_s: float = 180.0) -> dict[str, Any]:
        """Run `flwr WORDS --format json`.

        Args:
            words: Arguments of the command.
            timeout_s: Limit of the command.

        Returns:
            The table that it printed.

        Raises:
            FedmllmError: The command failed; with Flower's message.
        """
        command = [binary("flwr"), *words, "--format", "json"]
        try:
            done = subprocess.run(
                command,
                env=environment(self.folder / "flwr"),
                cwd=self.folder,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise FedmllmError(f"flwr {words[0]}: no response from SuperLink within {timeout_s:g} s") from None
        text = done.stdout[done.stdout.find("{") :]
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError:
            found = {"error-message": (done.stdout + done.stderr).strip()[-500:]}
        if done.returncode or not found.get("success"):
            raise FedmllmError(f"flwr {' '.join(words[:2])}: {found.get('error-message', found)}")
        return found

    def sites(self) -> dict[str, int]:
        """The registered sites with their node ids, in the order of their names: clients 0, 1, ..."""
        table = json.loads((self.folder / SITES).read_text(encoding="utf-8"))
        return {name: int(table[name]) for name in sorted(table, key=in_order)}

    def add(self, name: str, public_key: Path) -> int:
        """Register a site. SuperLink must be running.

        Args:
            name: Of the site, as in its own file.
            public_key: Path of its public key.

        Returns:
            Flower's id of the site's node.

        Raises:
            ConfigError: The name is not a valid one, or there is no such key file.
            FedmllmError: The name is taken, or SuperLink refuses the key.
        """
        sites = self.sites()
        try:
            check_name(name)
        except ValueError as error:
            raise ConfigError(f"site {name[:100]!r}: {error}") from None
        if not public_key.is_file():
            raise ConfigError(f"{public_key}: no such file; a site's public key, site.key.pub, is needed")
        if name in sites:
            raise FedmllmError(f"site {name!r} is registered already, as node {sites[name]}")
        try:
            found = self.flwr("supernode", "register", str(public_key.absolute()), CONNECTION, "--name", name)
        except FedmllmError as error:
            if KEY_IN_USE not in str(error):
                raise
            raise FedmllmError(
                f"{public_key}: this key is registered for another site, or was removed; Flower never accepts a removed key "
                "again. Make a new one at the site with `fedmllm site key SITE.toml`, and register that"
            ) from None
        node = int(found["node-id"])
        write_atomically(self.folder / SITES, json.dumps({**sites, name: node}, indent=1))
        return node

    def remove(self, name: str) -> int:
        """Revoke a site's key, for ever: Flower never accepts it again. SuperLink must be running.

        Args:
            name: Of the site.

        Returns:
            Flower's id of the site's node.

        Raises:
            ConfigError: No such site is registered.
        """
        sites = self.sites()
        if name not in sites:
            raise ConfigError(f"site {name[:100]!r} is not registered; registered: {', '.join(sites) or 'none'}")
        self.flwr("supernode", "unregister", str(sites[name]), CONNECTION)
        write_atomically(self.folder / SITES, json.dumps({k: v for k, v in sites.items() if k != name}, indent=1))
        return sites[name]

    def submit(self, job: Path, wait_s: float) -> str:
        """Start a run.

        Args:
            job: As `server_app.Job` reads it.
            wait_s: For SuperLink to respond, at most.

        Returns:
            Flower's id of the run.

        Raises:
            FedmllmError: No run could be started, with the last reason.
        """
        until, words = time.monotonic() + wait_s, ("-c", f"job={json.dumps(str(job))}")
        while True:
            try:
                return str(self.flwr("run", str(self.folder / "app"), CONNECTION, *words)["run-id"])
            except FedmllmError as error:
                if time.monotonic() > until:
                    raise FedmllmError(f"no run was started: {error}; is `fedmllm server start` running?") from None
            time.sleep(2)

    def cancel(self, run_id: str) -> None:
        """Stop a run, if SuperLink responds."""
        with contextlib.suppress(FedmllmError):
            self.flwr("stop", run_id, CONNECTION)

    def is_reachable(self) -> bool:
        """Return whether something listens on SuperLink's port."""
        with socket.socket() as probe:
            probe.settimeout(5)
            return probe.connect_ex(("127.0.0.1", self.listen.port)) == 0

    def status(self, run_id: str) -> tuple[str, str]:
        """Status and details of a run: ("running", ""), ("finished:failed", reason), ..., or ("unreachable", "")."""
        try:
            found = self.flwr("list", "--run-id", run_id, CONNECTION)["runs"][0]
            return str(found["status"]), str(found.get("status-details", ""))
        except (FedmllmError, KeyError, IndexError):
            return "unreachable", ""
