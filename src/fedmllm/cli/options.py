"""What several verbs take from the command line. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ExperimentFile = Annotated[Path, typer.Argument(help="Experiment file.", metavar="EXPERIMENT.toml")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: --set scenario.rate=0.5", metavar="A.B=V")
]
