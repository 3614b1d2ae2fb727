"""Help of every verb and sub-verb: complete and plain at 80 columns; and output to terminals without Unicode."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
import typer.main
from typer.testing import CliRunner

import fedmllm
from fedmllm.cli.main import app


def verbs(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from verbs(inner, (*path, name))


VERBS = dict(verbs(typer.main.get_command(app)))


def test_the_list_holds_verbs_and_sub_verbs():
    assert {("run",), ("site", "start"), ("server", "run"), ("data", "where")} <= set(VERBS)


@pytest.mark.parametrize("path", VERBS, ids=lambda path: " ".join(path) or "fedmllm")
def test_help_is_complete_plain_text_of_80_columns(path: tuple[str, ...]):
    text = CliRunner().invoke(app, [*path, "--help"], terminal_width=80, prog_name="fedmllm").output
    assert text.startswith("Usage: fedmllm")
    assert "\\[" not in text
    assert "Positional arguments:" not in text  # of click, in addition to "Arguments:" of typer
    assert "..." not in text.replace("COMMAND [ARGS]...", "").replace("DIR...", "")
    assert max(map(len, text.splitlines())) <= 80
    words = "".join(text.split())  # wherever a line was broken
    for parameter in VERBS[path].params:
        if getattr(parameter, "hidden", False):  # the name of an earlier release
            continue
        assert parameter.help, f"{parameter.name} has no help"
        assert "".join(parameter.help.split()) in words, parameter.name
    for name, inner in getattr(VERBS[path], "commands", {}).items():
        assert name in text
        assert inner.get_short_help_str(limit=10**6).rstrip(".") in " ".join(text.split())


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_character_that_a_terminal_lacks_is_written_as_its_code(stream: str):
    """Every verb prints through these streams: a site name, a reason of Flower with its dash, a table."""
    code = f"""
import sys
from fedmllm.cli import main
main.app = lambda: print("K\u00f6ln \u2014 left out", file=sys.{stream})
main.main()
"""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert getattr(done, stream) == b"K\\xf6ln \\u2014 left out\n"


def test_the_version_is_that_of_the_package():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"fedmllm {fedmllm.__version__}\n")
