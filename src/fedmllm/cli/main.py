"""The verbs. No maths here, and nothing that loads torch before a verb needs it."""

from __future__ import annotations

import errno
import io
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from fedmllm.cli import data as data_cli
from fedmllm.cli import federation as site_cli
from fedmllm.cli.audit import attack
from fedmllm.cli.build_vlm import build_vlm
from fedmllm.cli.models import calibrate, doctor, estimate, export
from fedmllm.cli.options import ExperimentFile, Set, Threads, Track, Verbs, show_arguments_once
from fedmllm.cli.predict import predict
from fedmllm.cli.settings import explain, schema
from fedmllm.cli.suites import compare, report, suite
from fedmllm.core.errors import ConfigError, FedmllmError

show_arguments_once()
typer.core.HAS_RICH = False  # help is plain text; with rich installed typer 0.20 writes "\\[required]" into it
app = typer.Typer(
    name="fedmllm",
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

OutOption = Annotated[Path | None, typer.Option(help="Folder for record, summary and adapter. Default: runs/RUN_ID.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fedmllm {version('fedmllm')}")
        raise typer.Exit


@app.callback()
def common(
    version_: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Federated fine-tuning of multimodal LLMs when clients hold different modalities."""


@app.command(short_help="Embedded model and data, one table in a few minutes.")
def quickstart(out: OutOption = None) -> None:
    """Embedded model and data, four scenarios, five methods: one table in two or three minutes. No network, no GPU."""
    from fedmllm.cli.quickstart import run_quickstart

    run_quickstart(out)


@app.command(short_help="Run one experiment.")
def run(
    experiment: ExperimentFile,
    set_: Set = None,
    seed: Annotated[int | None, typer.Option(help="Override the experiment's seed.", min=0)] = None,
    out: OutOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(help="Override num_rounds; with --resume, a finished run trains on.", min=1)
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="in-process, stacked or flower-simulation.", metavar="NAME")
    ] = None,
    num_actors: Annotated[int | None, typer.Option(help="Ray actors of flower-simulation.", min=1)] = None,
    baselines: Annotated[
        bool, typer.Option(help="Evaluate the frozen model too, to say whether the result is better.")
    ] = True,
    threads: Threads = 0,
    track: Track = None,
) -> None:
    """Run one experiment: data x scenario x prompt x backbone x objective x aggregator x rounds."""
    from fedmllm.config.experiment import Experiment

    named = {"seed": seed, "num_rounds": rounds, "engine.name": engine, "engine.num_actors": num_actors}
    overrides = [*(set_ or []), *(f"{key}={value}" for key, value in named.items() if value is not None)]
    settings = Experiment.load(experiment, overrides)  # every setting is checked before torch is loaded
    from fedmllm.cli.display import Bars, learned_text, show_table
    from fedmllm.cli.threads import set_threads
    from fedmllm.runs.folder import RunFolder
    from fedmllm.runs.run import run as start
    from fedmllm.runs.trackers import tracker

    folder = out or Path("runs") / settings.run_id()
    if resume and rounds and not out:  # the run with fewer rounds, as the file has them
        before = Experiment.load(experiment, [text for text in overrides if not text.startswith("num_rounds=")])
        shorter = Path("runs") / before.run_id()
        folder = shorter if not folder.exists() and shorter.exists() else folder
    trackers = [tracker(name, folder) for name in track or []]
    set_threads(threads, [RunFolder(folder).record] if resume else [])
    try:
        with Bars() as bars:
            rows = start(settings, folder, [bars, *trackers], resume, baselines)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same with --out {folder} --resume continues from the last finished round", err=True)
        raise typer.Exit(130) from None
    show_table(rows)
    typer.echo(f"record: {folder}")
    if claim := rows[0].get("privacy"):
        typer.echo(f"privacy: {claim}; record.jsonl says against whom, and what is outside")
    if text := learned_text(RunFolder(folder).record):
        typer.echo(text)


app.add_typer(data_cli.app, short_help="Data sets: sources, splits, export.")
app.add_typer(site_cli.site_app, name="site")
app.add_typer(site_cli.server_app, name="server")
app.command(short_help="Run a matrix of experiments, or resume one.")(suite)
app.command(short_help="Page and tables from the records of runs.")(report)
app.command(name="audit", short_help="Attack an experiment's privacy.")(attack)
app.command(short_help="Is the difference of two runs established?")(compare)
app.command(short_help="Describe a table or a member of a family.")(explain)
app.command(short_help="JSON Schema of an experiment file.")(schema)
app.command(short_help="Check a model folder.")(doctor)
app.command(name="build-vlm", short_help="Build a small vision-language model from packages.")(build_vlm)
app.command(short_help="Measure this device for the times of estimate.")(calibrate)
app.command(short_help="Memory, traffic and time, without running.")(estimate)
app.command(short_help="Predict the answers of new rows.")(predict)
app.command(short_help="Merge a run's adapter into its model.")(export)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # raised by a write, without the file's name


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt(f"signal {signum}")


def main() -> None:
    """Entry point: a FedmllmError is a message and a code (2 = settings, 1 = anything else), never a traceback."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character gets its code, not a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _interrupt)  # so that a stopped job's record ends like one stopped by Ctrl-C
    try:
        app()
    except FedmllmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:  # the file system or a network refuses something that no verb expects
        if error.filename is None and error.errno not in _FULL:
            raise
        print(f"error: {error.filename or 'a file cannot be written'}: {error.strerror}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
