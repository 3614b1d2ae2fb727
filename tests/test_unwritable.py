"""Outputs that cannot be made: each verb names the place and the reason."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmllm.backbones.tiny import Tiny
from fedmllm.cli.main import app
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import check_writable
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.run import run

DATA = {"name": "synthetic-irony", "num_train": 12, "num_validation": 4, "num_test": 4}
EXPERIMENT = (
    'num_rounds = 1\npartition = { name = "iid", num_clients = 2 }\n'
    'data = { name = "synthetic-irony", num_train = 12, num_validation = 4, num_test = 4 }\n'
)
AUDITED = 'privacy = { name = "client-dp", noise_multiplier = 10.0, clip = 0.5 }\nupdate_filter.on_bad_update = "drop_client"\n'


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = {"data": DATA, "partition": {"name": "iid", "num_clients": 2}, "num_rounds": 1, "train": {"max_steps": 1}}
    return run(Experiment.parse(table), tmp_path_factory.mktemp("t") / "run").folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(Experiment.parse({"data": DATA, "method": "majority"}), tmp_path_factory.mktemp("m") / "run").folder


@pytest.mark.parametrize("place", ["f", "f/x", "n" * 300])
@pytest.mark.parametrize(
    "verb",
    [
        "suite",
        "run",
        "data export",
        "data show",
        "report",
        "export",
        "predict",
        "audit",
        "quickstart",
        "site new",
        "server new",
    ],
)
def test_an_output_that_cannot_be_made_is_named_before_the_work(
    verb: str, place: str, finished: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if verb.startswith(("site", "server")):
        pytest.importorskip("flwr", reason="the extra 'flower' is not installed")
    (tmp_path / "f").write_text("")
    if verb == "data show":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "rows.csv").write_text("image,text\n,hello\n")
    (tmp_path / "x.toml").write_text(EXPERIMENT + (AUDITED if verb == "audit" else ""))
    (tmp_path / "s.toml").write_text('title = "s"\n[matrix]\nseeds = [0]\n[base]\n' + EXPERIMENT)
    out = str(tmp_path / place)
    words = {
        "suite": ["suite", str(tmp_path / "s.toml"), "--out", out],
        "run": ["run", str(tmp_path / "x.toml"), "--out", out],
        "data export": ["data", "export", str(tmp_path / "x.toml"), out],
        "data show": ["data", "show", str(tmp_path / "x.toml"), "--plot", out + "/p.png"],
        "report": ["report", str(finished), "--out", out + "/r.html"],
        "export": ["export", str(trained), "--merge", out + "/m"],
        "predict": ["predict", str(trained), str(tmp_path / "rows.csv"), "--out", out + "/r.csv"],
        "audit": ["audit", str(tmp_path / "x.toml"), "--kind", "one-run", "--out", out + "/a.json"],
        "quickstart": ["quickstart", "--out", out],
        "site new": ["site", "new", out, "--name", "A"],
        "server new": ["server", "new", out],
    }[verb]
    monkeypatch.setattr(Tiny, "load", lambda *_: pytest.fail("the place is looked at after the work"))
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, FedmllmError | OSError), done.output
    if isinstance(done.exception, OSError):  # `main` prints it with its place
        assert str(done.exception.filename).startswith(out[:200])
    else:
        assert re.search(rf"{re.escape(str(tmp_path))}/.*: cannot be (written|drawn): ", str(done.exception))


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


def test_a_folder_that_is_a_file_is_not_taken_for_a_key(tmp_path: Path) -> None:
    keys = pytest.importorskip("fedmllm.flower.keys", reason="the extra 'flower' is not installed")
    (tmp_path / "f").write_text("")
    with pytest.raises(FedmllmError, match=r"f/site\.key: cannot be written: .*f is not a folder"):
        keys.make_site_key(tmp_path / "f" / "site.key")


def test_a_probe_leaves_nothing_and_no_file_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    check_writable(tmp_path / "a.json")
    check_writable(tmp_path / "b.json")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "{}"
    with pytest.raises(FedmllmError, match="cannot be written: Is a directory"):
        check_writable(tmp_path)


ON_A_FULL_DISK = """
import json, os, resource, signal, sys
from typer.testing import CliRunner
from fedmllm.cli.main import app
from fedmllm.core.errors import FedmllmError
resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, words)
    assert done.exit_code, (words, done.output)
    print(type(done.exception).__name__, done.exception, done.output.replace(chr(10), " "), sep="; ")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit on the size of files")
def test_a_full_disk_is_named(trained: Path, tmp_path: Path) -> None:
    """In a process whose files may not grow beyond 40 bytes: each verb names the file that could not be written."""
    (tmp_path / "x.toml").write_text(EXPERIMENT)
    (tmp_path / "s.toml").write_text('title = "s"\n[matrix]\nseeds = [0]\n[base]\n' + EXPERIMENT)
    (tmp_path / "rows.csv").write_text("image,text\n,hello\n")
    x, out = str(tmp_path / "x.toml"), str(tmp_path / "o")
    verbs = [
        ["data", "export", x, out + "1"],
        ["run", x, "--out", out + "2"],
        ["report", str(trained), "--out", out + "3/r.html"],
        ["export", str(trained), "--merge", out + "4"],
        ["predict", str(trained), str(tmp_path / "rows.csv"), "--out", out + "5.csv"],
        ["data", "show", x, "--plot", out + "6.png"],
    ]
    if importlib.util.find_spec("matplotlib") is None:
        verbs.pop()
    if importlib.util.find_spec("flwr"):
        verbs += [["server", "new", out + "7"], ["site", "new", out + "8", "--name", "A"]]
    code = [sys.executable, "-c", ON_A_FULL_DISK, json.dumps(verbs)]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(verbs)
    for line, words in zip(lines, verbs, strict=True):
        assert re.match(
            rf"FedmllmError; {tmp_path}/o\d\S*: cannot be (written|drawn): .*(File too large|os error 27)", line
        ), words
