"""The verbs about models: doctor, estimate, export.

Mount with `app.command()(doctor)` and so on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmllm.cli.options import ExperimentFile, Set
from fedmllm.core.errors import FedmllmError

ModelFolder = Annotated[str, typer.Argument(help="Model folder; hub:owner/name asks the network.", metavar="MODEL_DIR")]
RunArgument = Annotated[Path, typer.Argument(help="Folder of a finished run.", metavar="RUN")]


def doctor(
    model: ModelFolder,
    base: Annotated[str, typer.Option(help="How the base is held: float32, float64, bfloat16, nf4.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    max_tokens: Annotated[int, typer.Option(help="Longest row.", min=1)] = 4096,
    targets: Annotated[str, typer.Option(help="Regex of LoRA targets; empty = the family's.")] = "",
) -> None:
    """Load a model folder, check that it keeps what this package promises, print memory, LoRA targets and payload."""
    from fedmllm.backbones.base import FromFolder
    from fedmllm.core.spec import validate

    table = {"path": model, "device": device, "max_tokens": max_tokens}
    table |= {"precision": {"base": base}, "lora": {"targets": targets}}
    spec = validate(FromFolder, table, "doctor")
    from fedmllm.reports.model import doctor as examine

    assert isinstance(spec, FromFolder)
    failed = [check.name for check in examine(spec) if not check.good]
    if failed:
        raise FedmllmError(f"{model}: these checks failed: {', '.join(failed)}; results with this model may be wrong")


def estimate(
    experiment: ExperimentFile,
    set_: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes as one JSON object.")] = False,
) -> None:
    """Memory for weights, LoRA, optimiser and activations, and bytes sent a round: from settings and config.json alone."""
    from fedmllm.config.experiment import Experiment

    settings = Experiment.load(experiment, set_ or [])
    from fedmllm.reports.model import print_estimate

    print_estimate(settings, as_json)


def export(
    run: RunArgument,
    merge: Annotated[Path, typer.Option(help="New folder for base and adapter in one.", metavar="DIR")],
    base: Annotated[Path | None, typer.Option(help="The base model, where it is not where the run had it.")] = None,
) -> None:
    """Write a run's result as one model folder. The adapter alone is RUN/adapter, a PEFT folder."""
    from fedmllm.backbones.export import export as write

    typer.echo(f"merged model: {write(run, merge, base)}")
