"""The verb `fedmllm audit`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedmllm.cli.options import ExperimentFile, Set

BOUNDS = {"tokens": "words found", "one-run": "epsilon at least", "lira": "AUC", "canary": "exposure, bits"}


class AuditKind(StrEnum):
    """Attacks."""

    tokens = "tokens"
    one_run = "one-run"
    lira = "lira"
    canary = "canary"


def attack(
    experiment: ExperimentFile,
    kind: Annotated[AuditKind, typer.Option(help="tokens, one-run, lira or canary.", metavar="KIND")],
    set_: Set = None,
    out: Annotated[Path, typer.Option(help="File for the table.")] = Path("audit.json"),
    canaries: Annotated[int, typer.Option(help="For one-run: canaries.", min=10)] = 200,
    shadows: Annotated[int, typer.Option(help="For lira: federations to train.", min=4)] = 8,
) -> None:
    """Attack an experiment's own privacy. Exits with 1 if an attack succeeds."""
    from fedmllm.config.experiment import Experiment

    settings = Experiment.load(experiment, set_ or [])
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from fedmllm.runs.audits.audit import audit as start

    rows = start(settings, kind.value, out, canaries, shadows)
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("claim", BOUNDS[kind.value], "attack", "result"):
        table.add_column(column, overflow="fold")
    for row in rows:
        bound = f"{row['bound']:.3g}"
        if "largest_bound" in row:
            bound += f" (this audit: at most {row['largest_bound']:.3g})"
        table.add_row(row["claim"], bound, row["attack"], row["reason"] or "not broken by this attack")
    Console().print(table)
    typer.echo(f"table: {out}")
    if any(row["caught"] for row in rows):
        raise typer.Exit(1)
