"""`fedmllm data`: sources of data sets, splits over clients, exports."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmllm.cli.options import ExperimentFile, Set

if TYPE_CHECKING:
    from fedmllm.config.experiment import Experiment

app = typer.Typer(
    name="data",
    help="Data sets: where to get one, who holds what, and export of a split.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@contextmanager
def without_collector() -> Iterator[None]:
    """Pause Python's cycle collector: half a million rows hold no cycle, and looking for one doubles the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Format(StrEnum):
    """Forms that a split is exported in."""

    CONVERSATIONS = "conversations"


@app.command(short_help="Source, licence and files of a data set.")
def where(name: Annotated[str, typer.Argument(help="Name of a data set, as in data.name.", metavar="SET")]) -> None:
    """Print the source of a data set, its license, and the files that are expected. Nothing is downloaded."""
    from fedmllm.reports.data import where_to_get

    typer.echo(where_to_get(name))


@app.command(short_help="Rows and modalities of each client.")
def show(
    experiment: Annotated[Path, typer.Argument(help="Experiment file, or suite file.", metavar="EXPERIMENT.toml")],
    set_: Set = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Ids and one 0/1 string per modality, for each client.")
    ] = False,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw label skew and who sees what (.png, .svg, .pdf).", metavar="FILE"),
    ] = None,
) -> None:
    """Print the rows of each client and their available modalities. Needs no image file.

    The table names the first 200 clients and sums up the others; --json lists all. Of a suite, the first cell of each data set.
    """
    from fedmllm.core.errors import ConfigError
    from fedmllm.runs.suites.suite import experiments_by_data

    experiments = experiments_by_data(experiment, set_ or [])
    if len(experiments) > 1 and (as_json or plot_file):
        option = "--json" if as_json else "--plot"
        raise ConfigError(
            f"{option}: {experiment} has {len(experiments)} data sets; write the settings of one cell into an experiment file"
        )
    for label, one in experiments.items():
        if label:
            changed = f" with {', '.join(set_)}" if set_ else ""
            typer.echo(f"cell: {label}{changed}", err=as_json)
        show_one(one, as_json, plot_file)


def show_one(experiment: Experiment, as_json: bool, plot_file: Path | None) -> None:
    """Print the table of one experiment, or its JSON, and draw it if there is a file to draw into."""
    from fedmllm.reports.data import Federation, plot

    with without_collector():
        federation = Federation.of(experiment)
        federation = federation if as_json else federation.with_test()
        text = json.dumps(federation.to_json(), ensure_ascii=False) if as_json else ""
    if plot_file:
        plot(federation, plot_file)
    for message in federation.skipped:
        typer.echo(f"left out: {message}", err=True)
    for note in federation.notes:
        typer.echo(f"note: {note}", err=True)
    if as_json:
        typer.echo(text)
    else:
        from rich.console import Console

        console = Console()
        for table in federation.to_tables(console.width):
            console.print(table)
    if plot_file:
        typer.echo(f"drawn: {plot_file}", err=True)


@app.command(short_help="One file per client, for other code bases.")
def export(
    experiment: ExperimentFile,
    folder: Annotated[Path, typer.Argument(help="Folder to write into; created if needed.", metavar="DIR")],
    set_: Set = None,
    format_: Annotated[Format, typer.Option("--format", help="Form of the files.")] = Format.CONVERSATIONS,
) -> None:
    """Write client_K.json for each client, in the form {id, image, conversations: [{role, content}]}."""
    from fedmllm.config.experiment import Experiment
    from fedmllm.reports.data import Federation
    from fedmllm.reports.data import export as write

    files = write(Federation.of(Experiment.load(experiment, set_ or [])), folder)
    typer.echo(f"{len(files) - 1} clients in {folder}; data.toml there reads them back in")
