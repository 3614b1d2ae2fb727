"""The verbs of a real federation: `fedmllm site` for whoever holds data, `fedmllm server` for whoever aggregates."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmllm.core.errors import ConfigError, FedmllmError

site_app = typer.Typer(help="Take part in a federation with the data of this machine.", no_args_is_help=True)
server_app = typer.Typer(help="Run a federation of sites.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The server's folder.", metavar="FOLDER")]
SiteFile = Annotated[Path, typer.Argument(help="The site's own file.", metavar="SITE.toml")]
EXAMPLE = """\
name = {name}
server = "{server}"
ca = "ca.crt"        # from the server's people
key = "site.key"     # stays here; site.key.pub goes to the server's people

[data]               # as in an experiment: name, root, columns; stays here
name = "table"
root = "data"
train = "train.csv"
columns = {{ image = "scan", question = "question", answer = "answer" }}

[backbone]           # the base model on this machine
name = "tiny"

[allow]              # what the server may ask for; anything else is refused
max_steps = 200
max_rounds = 100
metrics = ["loss", "num_steps", "num_tokens", "time_s"]

[allow.settings]
"train.lr" = {{ max = 1e-2 }}
"train.batch_size" = {{ min = 4 }}     # a delta of few rows says more about each of them
"lora.r" = {{ max = 64 }}
"""


def _quiet() -> None:
    from fedmllm.flower.processes import need
    from fedmllm.flower.site.config import QUIET

    os.environ.update(QUIET)
    need("flwr")


@site_app.command("new")
def site_new(
    folder: Annotated[Path, typer.Argument(help="A folder for the site's file and key.")],
    name: Annotated[str, typer.Option(help="What the federation calls this site.")],
    server: Annotated[str, typer.Option(help="Where the server is reached: host:port.")] = "127.0.0.1:8000",
) -> None:
    """Make a key, and a SITE.toml to be filled in."""
    _quiet()
    from fedmllm.flower.keys import make_site_key
    from fedmllm.flower.site.config import check_name

    path = folder / "site.toml"
    if path.exists():
        raise FedmllmError(f"{path} exists; choose another folder")
    try:
        check_name(name)
    except ValueError as error:
        raise ConfigError(f"--name: got {name[:100]!r}; {error}") from None
    public = make_site_key(folder / "site.key")
    path.write_text(EXAMPLE.format(name=json.dumps(name, ensure_ascii=False), server=server), encoding="utf-8")
    typer.echo(f"fill in {path}; give {public} to the server's people, and get ca.crt from them")


@site_app.command("check")
def site_check(path: SiteFile) -> None:
    """Read the site's file and rows, and say what a server may ask for. Sends nothing."""
    from fedmllm.flower.site.config import Site

    site = Site.load(path)
    examples, shard = site.shard(0)
    shown: dict[str, int] = {}
    for visible in shard.visible:
        key = "+".join(sorted(visible)) or "none"
        shown[key] = shown.get(key, 0) + 1
    typer.echo(f"site {site.name}: {len(shard.rows)} of {len(examples)} rows; they show {shown}")
    typer.echo(f"allowed: {site.allow.model_dump_json()}")


@site_app.command("start")
def site_start(
    path: SiteFile,
    dry_run: Annotated[
        Path | None,
        typer.Option(help="Train one round of this experiment and print what would be sent; sends nothing."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="With --dry-run: where to write exactly what would be sent.")
    ] = None,
) -> None:
    """Serve until Ctrl-C: train when the server asks, within what the site allows."""
    _quiet()
    if dry_run:
        from fedmllm.flower.site.dry_run import dry_run as show

        show(path, dry_run, adapter, typer.echo)
    else:
        from fedmllm.flower.site.process import run_site

        run_site(path)


@server_app.command("new")
def server_new(
    folder: Folder,
    host: Annotated[list[str] | None, typer.Option(help="Names or addresses by which sites reach it.")] = None,
    port: Annotated[int, typer.Option(help="Of SuperLink, on loopback.", min=1, max=65535)] = 8000,
    gate: Annotated[str, typer.Option(help='Where sites reach it, "0.0.0.0:9092"; nothing else is let through.')] = "",
) -> None:
    """Make certificates and an empty register of sites."""
    from fedmllm.flower.server.superlink import Server

    _quiet()
    Server.new(folder, list(dict.fromkeys([*(host or []), "localhost", "127.0.0.1"])), port, gate)
    typer.echo(f"{folder}: give ca.crt to the sites; ca.key and server.key stay here")


@server_app.command("start")
def server_start(folder: Folder) -> None:
    """Keep SuperLink running until Ctrl-C; one that dies is started again."""
    _quiet()
    from fedmllm.flower.server.superlink import Server

    try:
        Server(folder).serve(say)
    except KeyboardInterrupt:
        say("stopped")


@server_app.command("add")
def server_add(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="The site's name.")],
    public_key: Annotated[Path, typer.Argument(help="Its site.key.pub.")],
) -> None:
    """Register a site. SuperLink must be running."""
    from fedmllm.flower.server.superlink import Server

    typer.echo(f"site {name}: node {Server(folder).add(name, public_key)}")


@server_app.command("remove")
def server_remove(folder: Folder, name: Annotated[str, typer.Argument(help="The site's name.")]) -> None:
    """Take a site's key back: it is let in no more. SuperLink must be running."""
    from fedmllm.flower.server.superlink import Server

    typer.echo(f"site {name}: node {Server(folder).remove(name)} is registered no more")


@server_app.command("run")
def server_run(
    folder: Folder,
    experiment: Annotated[Path, typer.Argument(help="Experiment file.", metavar="EXPERIMENT.toml")],
    out: Annotated[Path, typer.Option(help="Folder for record, checkpoints, summary and adapter.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key.", metavar="A.B=V")] = None,
    site: Annotated[list[str] | None, typer.Option(help="Only these sites; default: all that are registered.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    test: Annotated[bool, typer.Option(help="Whether this machine has the test rows of the experiment's data.")] = True,
) -> None:
    """Run an experiment over the registered sites; go on by itself where SuperLink was killed."""
    from fedmllm.config.experiment import Experiment
    from fedmllm.flower.server.superlink import Server

    settings, server = Experiment.load(experiment, set_ or []), Server(folder)
    names = [name for name in server.sites() if not site or name in site]
    try:
        for event in server.run(settings, out, resume, test, site or []):
            if line := in_words(event, names):
                say(line)
    except KeyboardInterrupt:
        say("stopped, also on SuperLink; the same with --resume goes on from the last finished round")
        raise typer.Exit(130) from None
    say(f"adapter: {out / 'adapter'}; record: {out / 'record.jsonl'}")


def in_words(event: dict[str, Any], names: Sequence[str]) -> str:
    """An event of a run as a line for a terminal, clients by their sites' names; "" = not worth one."""
    kind = event["event"]
    if kind == "submitted":
        return f"run {event['run']} started" + (f", attempt {event['attempt']}" if event["attempt"] > 1 else "")
    if kind == "lost":
        return f"the run was lost ({event['status']}); going on from its last finished round; {event['note']}"
    if kind == "resumed":
        return f"resumed after round {event['round']}"
    if kind == "round":
        losses = ", ".join(f"{names[c['client']]} {c['loss']:.4f}" for c in event["clients"] if "loss" in c)
        dropped = "".join(f"; {names[d['client']]} left out: {d['reason']}" for d in event["dropped"])
        head = (
            f"round {event['round']}/{event['num_rounds']}: {len(event['clients'])} updates in {event['wall_s']:.1f} s"
        )
        return f"{head}{'; loss ' if losses else ''}{losses}{dropped}"
    if kind == "eval":
        return f"{event['visible']}: {event['metrics']}"
    if kind == "stopped":
        return f"stopped: {event['reason']}"
    return ""


def say(line: str) -> None:
    """A line for the terminal, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
