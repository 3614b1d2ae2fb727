"""The verbs about models: doctor, calibrate, estimate, export.

Mount with `app.command()(doctor)` and so on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmllm.cli.options import ExperimentFile, Set, Threads
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
    as_json: Annotated[bool, typer.Option("--json", help="Bytes and seconds as one JSON object.")] = False,
    memory_gb: Annotated[
        float, typer.Option("--memory-gb", help="Memory of the device that the model is to fit in.", min=0)
    ] = 24.0,
    threads: Threads = 0,
) -> None:
    """Memory and bytes sent, from settings and config.json alone; seconds a round, if this device is calibrated."""
    from fedmllm.config.experiment import Experiment

    settings = Experiment.load(experiment, set_ or [])
    from fedmllm.cli.threads import set_threads
    from fedmllm.reports.model import print_estimate

    set_threads(threads, [])
    print_estimate(settings, as_json, memory_gb)


def calibrate(
    experiment: Annotated[
        Path | None,
        typer.Argument(
            help="Experiment whose model and rows are measured. Default: the embedded ones.", metavar="EXPERIMENT.toml"
        ),
    ] = None,
    set_: Set = None,
    threads: Threads = 0,
) -> None:
    """Measure this device, and a model on it, for the times of `estimate`. The figures stay in the user's cache folder."""
    from fedmllm.config.experiment import Experiment

    settings = Experiment.load(experiment, set_ or []) if experiment else Experiment(data="synthetic-irony")
    from fedmllm.cli.threads import set_threads
    from fedmllm.runs.calibration import calibrate as measure
    from fedmllm.runs.calibration import calibration_file, model_key

    set_threads(threads, [])
    found = measure(settings)
    speed = found.models[model_key(settings)]
    typer.echo(f"{found.device}: " + ", ".join(f"{k} {v / 1e9:.3g} GFLOP/s" for k, v in found.products_per_s.items()))
    typer.echo(
        f"{settings.backbone.name}: {speed.pass_s * 1e3:.3g} ms a pass and {speed.token_s * 1e6:.3g} us a token; "
        f"{speed.encode_s * 1e3:.3g} ms to read a row for the first time"
    )
    typer.echo(f"kept in {calibration_file()}")


def export(
    run: RunArgument,
    merge: Annotated[Path, typer.Option(help="New folder for base and adapter in one.", metavar="DIR")],
    base: Annotated[Path | None, typer.Option(help="The base model, where it is not where the run had it.")] = None,
) -> None:
    """Write a run's result as one model folder. The adapter alone is RUN/adapter, a PEFT folder."""
    from fedmllm.backbones.export import export as write

    typer.echo(f"merged model: {write(run, merge, base)}")
