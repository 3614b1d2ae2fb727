"""Outputs that cannot be made: each verb names the place and the reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmllm.cli.main import app
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.run import run

DATA = {"name": "synthetic-irony", "num_train": 12, "num_validation": 4, "num_test": 4}
EXPERIMENT = (
    'num_rounds = 1\npartition = { name = "iid", num_clients = 2 }\n'
    'data = { name = "synthetic-irony", num_train = 12, num_validation = 4, num_test = 4 }\n'
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(Experiment.parse({"data": DATA, "method": "majority"}), tmp_path_factory.mktemp("m") / "run").folder


@pytest.mark.parametrize("place", ["f", "f/x", "n" * 300])
@pytest.mark.parametrize("verb", ["suite", "run", "data export", "report", "site new", "server new"])
def test_an_output_that_cannot_be_made_is_named(verb: str, place: str, finished: Path, tmp_path: Path) -> None:
    if verb.startswith(("site", "server")):
        pytest.importorskip("flwr", reason="the extra 'flower' is not installed")
    (tmp_path / "f").write_text("")
    (tmp_path / "x.toml").write_text(EXPERIMENT)
    (tmp_path / "s.toml").write_text('title = "s"\n[matrix]\nseeds = [0]\n[base]\n' + EXPERIMENT)
    out = str(tmp_path / place)
    words = {
        "suite": ["suite", str(tmp_path / "s.toml"), "--out", out],
        "run": ["run", str(tmp_path / "x.toml"), "--out", out],
        "data export": ["data", "export", str(tmp_path / "x.toml"), out],
        "report": ["report", str(finished), "--out", out + "/r.html"],
        "site new": ["site", "new", out, "--name", "A"],
        "server new": ["server", "new", out],
    }[verb]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, FedmllmError | OSError)
    if isinstance(done.exception, OSError):  # `main` prints it with its place
        assert str(done.exception.filename).startswith(out[:200])
    else:
        assert str(tmp_path) in str(done.exception)


def test_the_command_line_prints_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    (tmp_path / "x.toml").write_text(EXPERIMENT)
    words = [sys.executable, "-m", "fedmllm.cli", "data", "export", str(tmp_path / "x.toml"), str(tmp_path / "f")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'f'}: cannot be written: ")


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"rows": [{"value": "x"}]}',
        b'{"rows": [{"value": 1e400}]}',
        b'{"rows": [{}]}',
        b"{}",
    ],
)
def test_a_strange_summary_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.summary.write_bytes(content)
    with pytest.raises(FedmllmError, match=r"summary\.json: not a summary"):
        folder.read_rows()


def test_a_summary_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.summary.mkdir()
    with pytest.raises(FedmllmError, match=r"summary\.json: cannot be read: Is a directory"):
        folder.read_rows()


def test_a_full_temporary_folder_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing as large as an adapter is written outside the run's folder."""
    import tempfile

    def refuse(**named: Any) -> str:
        assert str(named["dir"]).startswith(str(tmp_path))
        return real(**named)

    real = tempfile.mkdtemp
    monkeypatch.setattr(
        tempfile, "mkdtemp", lambda suffix=None, prefix=None, dir=None: refuse(suffix=suffix, prefix=prefix, dir=dir)
    )
    table = {"data": DATA, "partition": {"name": "iid", "num_clients": 2}, "num_rounds": 1}
    run(Experiment.parse(table), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
