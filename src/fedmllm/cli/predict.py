"""The verb `fedmllm predict`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fedmllm.cli.options import Set

SourceArgument = Annotated[
    Path, typer.Argument(help="Folder of a finished run, or of a PEFT adapter.", metavar="RUN|ADAPTER")
]
RowFile = Annotated[
    Path, typer.Argument(help="Rows in any form of the data set `table`; no answers needed.", metavar="ROWS")
]


def predict(
    source: SourceArgument,
    rows: RowFile,
    out: Annotated[Path, typer.Option(help="File to write: .jsonl, .csv or .parquet.")],
    experiment: Annotated[
        Path | None, typer.Option(help="Experiment that names model and columns, for an adapter.", metavar="FILE")
    ] = None,
    visible: Annotated[str, typer.Option(help="Modalities to use: all, none, or names joined by +.")] = "all",
    column: Annotated[
        list[str] | None, typer.Option(help="Name a column: --column image=scan", metavar="KEY=NAME")
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="Whose adapter, for a run of method local.", metavar="SITE|NUMBER")
    ] = None,
    set_: Set = None,
) -> None:
    """Predict the answers of new rows with a trained adapter."""
    from fedmllm.config.experiment import Experiment
    from fedmllm.core.errors import ConfigError

    columns = {}
    for text in column or []:
        key, mark, name = text.partition("=")
        if not mark:
            raise ConfigError(f"--column: got {text!r}; give KEY=NAME, as in image=scan")
        columns[key] = name
    if set_ and not experiment:
        raise ConfigError("--set: changes the file of --experiment, which is not given")
    settings = Experiment.load(experiment, set_ or []) if experiment else None
    from rich.progress import Progress

    from fedmllm.runs.predict import predict as start

    began, notices = time.perf_counter(), list[str]()
    with Progress(transient=True) as bar:
        task = bar.add_task("loading", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, description="rows", completed=done, total=total)

        found = start(source, rows, out, settings, visible, columns, client, show, notices.append)
    for text in notices:
        typer.echo(text, err=True)
    typer.echo(f"{len(found)} rows in {time.perf_counter() - began:.1f} s: {out}")
