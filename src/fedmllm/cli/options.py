"""Arguments and options of several verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import click
import typer
import typer.core

ExperimentFile = Annotated[Path, typer.Argument(help="Experiment file.", metavar="EXPERIMENT.toml")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: --set scenario.rate=0.5", metavar="A.B=V")
]
Threads = Annotated[int, typer.Option(help="Threads; 0 = the usable cores, or 1 on a busy machine.", min=0)]
Track = Annotated[
    list[str] | None, typer.Option(help="Also log to: tensorboard, wandb, mlflow, trackio.", metavar="NAME")
]

IMPORTS = "fedmllm.imports"  # key of a command's context


class Verbs(typer.core.TyperGroup):
    """Group of commands whose every command, also in groups within it, has the option `--import`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        add_import(self)


def add_import(group: click.Group) -> None:
    """Add `--import PLUGIN` to the commands of a group. The plug-ins are loaded before the command starts."""
    for command in group.commands.values():
        if isinstance(command, click.Group):
            add_import(command)
        else:
            command.params.append(
                typer.core.TyperOption(
                    param_decls=["--import"],
                    multiple=True,
                    expose_value=False,
                    is_eager=True,
                    callback=load,
                    metavar="PLUGIN",
                    help="Load a plug-in first: a module, or the path of a .py file. May be repeated.",
                )
            )


def load(context: click.Context, option: click.Parameter, names: tuple[str, ...]) -> None:
    """Load the plug-ins named on the command line. Raises ConfigError if one cannot be loaded."""
    if names and not context.resilient_parsing:
        from fedmllm.core.plugins import load_plugins

        context.meta[IMPORTS] = load_plugins(names, "--import")


def imported() -> tuple[str, ...]:
    """The plug-ins that the current command's `--import` named, with absolute paths, for its child processes."""
    found: tuple[str, ...] = click.get_current_context().meta.get(IMPORTS, ())
    return found


def show_arguments_once() -> None:
    """Adapt typer 0.20 to click 8.5, which clears the help of arguments and has a section for them of its own."""
    initialize = typer.core.TyperArgument.__init__

    def with_help(self: typer.core.TyperArgument, **settings: Any) -> None:
        initialize(self, **settings)
        self.help = settings.get("help")

    def none(self: click.Command, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The arguments are among what typer writes as options."""

    typer.core.TyperArgument.__init__ = with_help  # type: ignore[method-assign]
    if "format_arguments" not in vars(typer.core.TyperCommand):
        typer.core.TyperCommand.format_arguments = none  # type: ignore[method-assign, assignment]
