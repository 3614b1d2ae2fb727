"""Pages of the documentation: the plug-ins of docs/extend run, settings on the pages are settings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.runs.suites.suite import Suite

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/extend").glob("*.md"))
KINDS = {"aggregator", "objective", "scenario", "prompt", "dataset", "metric", "backbone", "engine", "completion"}
KINDS |= {"modality_dropout", "relation"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_there_is_a_page_for_each_way_to_extend():
    assert {page.stem for page in PAGES} == KINDS


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_experiment_of_a_page_needs_nothing_but_the_package(page: str):
    first = Experiment.parse(tomllib.loads(blocks(ROOT / page, "toml")[0]))
    assert first.data.name.startswith("synthetic")
    assert first.backbone.name == "tiny"
    named = re.findall(r"fedmllm run (\S+)", (ROOT / page).read_text())
    assert {Path(name).name for name in named} == {"mine.toml"}  # the block above it


def test_settings_on_the_pages_are_settings(tmp_path: Path):
    (tmp_path / "suite.toml").write_text(blocks(ROOT / "docs/report.md", "toml")[0])
    assert len(Suite.load(tmp_path / "suite.toml").cells) == 3 * (2 * 2 - 1)
    backbone, devices, *_ = blocks(ROOT / "docs/models.md", "toml")
    assert Experiment.parse({"data": "synthetic-irony", **tomllib.loads(backbone)}).backbone.name == "hf"
    experiment = Experiment.parse({"data": "synthetic-irony", **tomllib.loads(devices)})
    assert experiment.model_dump()["engine"]["devices"] == ("all",)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_a_plugin_outside_the_package_and_its_commands_run(page: Path, tmp_path: Path):
    for language in ("python", "toml", "jsonl"):
        for block in blocks(page, language):
            first, _, rest = block.partition("\n")
            file = tmp_path / first.removeprefix("# ")
            file.parent.mkdir(exist_ok=True)
            file.write_text(rest if language == "jsonl" else block)
    commands = [["-m", "fedmllm.cli", *line.split()[1:]] for code in blocks(page, "sh") for line in code.splitlines()]
    commands += [["-c", code] for code in blocks(page, "py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    folders = list(tmp_path.glob("runs/*/record.jsonl"))
    assert len(folders) == len(commands)
    for folder in folders:
        head = json.loads(folder.read_text().splitlines()[0])
        assert [plugin["module"] for plugin in head["plugins"]] == [next(tmp_path.glob("*.py")).stem]


def test_the_page_on_python_runs_from_top_to_bottom(tmp_path: Path):
    code = "\n".join(blocks(ROOT / "docs/python.md", "python"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "scenario.rate: got 40" in done.stdout  # the page's bad input
    assert (tmp_path / "report.html").is_file()


def test_a_suite_trains_with_an_aggregator_of_a_file(tmp_path: Path):
    page = ROOT / "docs/extend/aggregator.md"
    (tmp_path / "fedamsgrad.py").write_text(blocks(page, "python")[0])
    base = tomllib.loads(blocks(page, "toml")[0])
    tables = ""
    for key in ("data", "partition", "train"):
        tables += f"[base.{key}]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in base[key].items())
    (tmp_path / "suite.toml").write_text(
        f'imports = ["fedamsgrad.py"]\n[base]\nnum_rounds = 1\n{tables}[matrix]\n'
        '[matrix.methods]\nAMSGrad = { aggregator = "fedamsgrad" }\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "fedmllm.cli", "suite", "suite.toml", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*/summary.json"))) == 1


def test_the_tests_that_the_note_on_faults_names_are_there():
    named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", (ROOT / "results/faults.md").read_text())
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
