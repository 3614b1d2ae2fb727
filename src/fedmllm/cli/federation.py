"""Verbs of a real federation: `fedmllm site` and `fedmllm server`."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmllm.cli.options import imported
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.storage import writing

site_app = typer.Typer(
    help="Take part in a federation with the data of this machine.", no_args_is_help=True, rich_markup_mode=None
)
server_app = typer.Typer(help="Run a federation of sites.", no_args_is_help=True, rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(help="The server's folder.", metavar="FOLDER")]
SiteFile = Annotated[Path, typer.Argument(help="The site's own file.", metavar="SITE.toml")]
SiteName = Annotated[str, typer.Argument(help="The site's name.", metavar="NAME")]
EXAMPLE = """\
name = {name}
server = "{server}"
ca = "ca.crt"        # from the server operator
key = "site.key"     # stays here; send site.key.pub to the server operator

[data]               # as in an experiment: name, root, columns; stays here
name = "table"
root = "data"
train = "train.csv"
columns = {{ image = "scan", question = "question", answer = "answer" }}

[backbone]           # the base model on this machine
name = "tiny"

[allow]              # what the server may ask for; anything else is refused
min_steps = 2        # a delta of few steps and few rows says more about each row
max_steps = 200
min_rows_per_step = 4
max_rounds = 100
metrics = ["loss", "num_steps", "num_tokens", "time_s"]

[allow.settings]
"train.lr" = {{ max = 1e-2 }}
"lora.r" = {{ max = 8 }}     # the larger the rank, the more rows a delta can be split into

# For secure aggregation: the site.key.pub of each site, from that site and not from the server. Then secure_sites = 3 in
# [allow] makes sure that nothing leaves this site unmasked.
# [peers]
# other-site = "ecdsa-sha2-nistp384 ..."
"""


def _quiet() -> None:
    from fedmllm.flower.patches import check_installed
    from fedmllm.flower.processes import QUIET

    os.environ.update(QUIET)
    check_installed("flwr")


@site_app.command("new", short_help="Make a key and a SITE.toml.")
def site_new(
    folder: Annotated[Path, typer.Argument(help="New folder for the site's file and key.", metavar="FOLDER")],
    name: Annotated[str, typer.Option(help="What the federation calls this site.")],
    server: Annotated[str, typer.Option(help="Address of the server.", metavar="HOST:PORT")] = "127.0.0.1:8000",
) -> None:
    """Make a key, and a SITE.toml to be filled in."""
    _quiet()
    from fedmllm.flower.keys import make_site_key
    from fedmllm.flower.request import check_name

    path = folder / "site.toml"
    if path.exists():
        raise FedmllmError(f"{path} exists; choose another folder")
    try:
        check_name(name)
    except ValueError as error:
        raise ConfigError(f"--name: got {name[:100]!r}; {error}") from None
    with writing(folder):
        public = make_site_key(folder / "site.key")
        path.write_text(EXAMPLE.format(name=json.dumps(name, ensure_ascii=False), server=server), encoding="utf-8")
    typer.echo(f"fill in {path}; send {public} to the server operator, and get ca.crt from there")


@site_app.command("key", short_help="Replace the site's key.")
def site_key(path: SiteFile) -> None:
    """Replace the site's key, for example after the server removed it. The old one is kept with the suffix .old."""
    _quiet()
    from fedmllm.flower.keys import replace_site_key
    from fedmllm.flower.site.config import Site

    public = replace_site_key(Site.load(path).key)
    typer.echo(f"send {public} to the server operator, who registers it with `fedmllm server add`")


@site_app.command("check", short_help="Read the site's file and rows; send nothing.")
def site_check(path: SiteFile) -> None:
    """Read the site's file and rows, and print what a server may ask for. Sends nothing."""
    from fedmllm.flower.site.config import DEFAULTS, Site

    site = Site.load(path)
    examples, shard = site.shard(0)
    visible = Counter("+".join(sorted(modalities)) or "none" for modalities in shard.visible)
    typer.echo(f"site {site.name}: {len(shard.rows)} of {len(examples)} rows; visible: {dict(visible)}")
    limits = site.allow.model_copy(update={"settings": {**DEFAULTS, **site.allow.settings}})
    typer.echo(f"allowed: {limits.model_dump_json()}")


@site_app.command("ledger", short_help="Print what was spent of epsilon.")
def site_ledger(path: SiteFile) -> None:
    """Print the epsilon of all requests that were answered, by run and in total."""
    from fedmllm.flower.site.config import Site, state_folder
    from fedmllm.flower.site.ledger import Ledger, spent
    from fedmllm.runs.privacy import NOISE_KEY

    site = Site.load(path)
    allow, state = site.allow, state_folder(path)
    entries = Ledger.of(site, state, state / NOISE_KEY).entries(allow.epsilon_since)
    for run_id in dict.fromkeys(entry.run_id for entry in entries):
        of_run = [entry for entry in entries if entry.run_id == run_id]
        typer.echo(f"run {run_id}: {len(of_run)} requests, epsilon {spent(of_run, allow.epsilon_delta):.4g}")
    if without := sum(not entry.noise_multiplier for entry in entries):
        typer.echo(f"{without} requests had no noise: no epsilon holds for the rows that they were about")
    if allow.epsilon_since:
        typer.echo(f"requests before {allow.epsilon_since} (allow.epsilon_since) are not counted")
    limit = "no limit" if allow.max_epsilon is None else f"limit {allow.max_epsilon:g}"
    for unit in sorted({entry.unit for entry in entries if entry.noise_multiplier}) or ["row"]:
        total = spent(
            [entry for entry in entries if entry.unit == unit or not entry.noise_multiplier], allow.epsilon_delta
        )
        typer.echo(f"all runs: epsilon {total:.4g} at delta {allow.epsilon_delta:g} per {unit}; {limit}")


@site_app.command("start", short_help="Serve the site until Ctrl-C.")
def site_start(
    path: SiteFile,
    dry_run: Annotated[
        Path | None,
        typer.Option(
            help="Train one round of this experiment and print what would be sent; sends nothing.",
            metavar="EXPERIMENT.toml",
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="With --dry-run: file for exactly what would be sent.", metavar="FILE")
    ] = None,
) -> None:
    """Serve until Ctrl-C: train when the server asks, within what the site allows."""
    _quiet()
    if dry_run:
        from fedmllm.flower.site.dry_run import dry_run as show

        show(path, dry_run, adapter, typer.echo)
    else:
        from fedmllm.flower.site.process import run_site

        run_site(path, imported())


@server_app.command("new", short_help="Make certificates and an empty register.")
def server_new(
    folder: Folder,
    host: Annotated[
        list[str] | None, typer.Option(help="Names or addresses by which sites reach the server.", metavar="HOST")
    ] = None,
    port: Annotated[int, typer.Option(help="Of SuperLink, on loopback.", min=1, max=65535)] = 8000,
    gate: Annotated[
        str, typer.Option(help='Address for sites: "0.0.0.0:9092". Only their calls pass.', metavar="HOST:PORT")
    ] = "",
) -> None:
    """Make certificates and an empty register of sites."""
    from fedmllm.flower.server.folder import Server

    _quiet()
    Server.new(folder, list(dict.fromkeys([*(host or []), "localhost", "127.0.0.1"])), port, gate)
    typer.echo(f"{folder}: give ca.crt to the sites; ca.key and server.key stay here")


@server_app.command("start", short_help="Keep the server running until Ctrl-C.")
def server_start(folder: Folder) -> None:
    """Keep SuperLink running until Ctrl-C. If it dies, it is restarted."""
    _quiet()
    from fedmllm.flower.server.folder import Server
    from fedmllm.flower.server.superlink import serve

    try:
        serve(Server(folder), _say)
    except KeyboardInterrupt:
        _say("stopped")


@server_app.command("add", short_help="Register a site.")
def server_add(
    folder: Folder,
    name: SiteName,
    public_key: Annotated[Path, typer.Argument(help="The site's site.key.pub.", metavar="KEY.pub")],
) -> None:
    """Register a site by its public key. SuperLink must be running."""
    from fedmllm.flower.server.folder import Server

    typer.echo(f"site {name}: node {Server(folder).add(name, public_key)}")


@server_app.command("remove", short_help="Revoke a site's key.")
def server_remove(folder: Folder, name: SiteName) -> None:
    """Revoke a site's key, for ever: to return, the site needs a new one (`fedmllm site key`). SuperLink must be running."""
    from fedmllm.flower.server.folder import Server

    typer.echo(f"site {name}: node {Server(folder).remove(name)} has been removed")


@server_app.command("run", short_help="Run an experiment over the sites.")
def server_run(
    folder: Folder,
    experiment: Annotated[Path, typer.Argument(help="Experiment file.", metavar="EXPERIMENT.toml")],
    out: Annotated[Path, typer.Option(help="Folder for record, checkpoints, summary and adapter.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key.", metavar="A.B=V")] = None,
    site: Annotated[
        list[str] | None, typer.Option(help="Only these sites; default: all that are registered.", metavar="NAME")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    test: Annotated[bool, typer.Option(help="Whether this machine has the test rows of the experiment's data.")] = True,
) -> None:
    """Run an experiment over the registered sites. If SuperLink is killed, the run continues by itself."""
    from fedmllm.config.experiment import Experiment
    from fedmllm.flower.server.folder import Server
    from fedmllm.flower.server.runs import run_over_sites

    settings, server = Experiment.load(experiment, set_ or []), Server(folder)
    names = [name for name in server.sites() if not site or name in site]
    try:
        for event in run_over_sites(server, settings, out, resume, test, site or []):
            if line := line_of(event, names):
                _say(line)
    except KeyboardInterrupt:
        _say("stopped, also on SuperLink. Pass --resume to continue from the last finished round")
        raise typer.Exit(130) from None
    _say(f"adapter: {out / 'adapter'}; record: {out / 'record.jsonl'}")


def line_of(event: dict[str, Any], names: Sequence[str]) -> str:
    """An event of a run as a line for a terminal.

    Args:
        event: Of the record, or of `run_over_sites`.
        names: The sites' names; client k is the site `names[k]`.

    Returns:
        The line; "" for events that are not displayed.
    """
    kind = event["event"]
    if kind == "round":
        return _round_line(event, names)
    lines = {
        "finished": "the run in --out has finished with these settings and sites; nothing to do",
        "waiting": "SuperLink does not respond on port {port}: start `fedmllm server start`; waiting for {seconds:.0f} s",
        "submitted": "run {run} started" + (", attempt {attempt}" if event.get("attempt", 1) > 1 else ""),
        "lost": "the run was lost ({status}); it continues from its last finished round; {note}",
        "resumed": "resumed after round {round}",
        "eval": "{visible}: {metrics}",
        "stopped": "stopped: {reason}",
    }
    return lines.get(kind, "").format(**event)


def _round_line(event: dict[str, Any], names: Sequence[str]) -> str:
    who = {c["client"]: "mean" if "clients" in c else names[c["client"]] for c in event["clients"]}  # of a secure sum
    losses = ", ".join(f"{who[c['client']]} {c['loss']:.4f}" for c in event["clients"] if "loss" in c)
    num_updates = sum(len(c.get("clients", [c["client"]])) for c in event["clients"])
    masked = ", masked," if any("clients" in c for c in event["clients"]) else ""
    dropped = "".join(f"; {names[d['client']]} left out: {d['reason']}" for d in event["dropped"])
    head = f"round {event['round']}/{event['num_rounds']}: {num_updates} updates{masked} in {event['wall_s']:.1f} s"
    return f"{head}{'; loss ' if losses else ''}{losses}{dropped}"


def _say(line: str) -> None:
    """Print a line for the operator, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
