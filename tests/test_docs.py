"""The diffs of docs/extend are real: each is applied to a copy of the tree, and its commands run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.runs.suites.suite import Suite

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/extend").glob("*.md"))
KINDS = {"aggregator", "objective", "scenario", "prompt", "dataset", "metric", "backbone", "engine"}


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
    (backbone,) = blocks(ROOT / "docs/models.md", "toml")
    assert Experiment.parse({"data": "synthetic-irony", **tomllib.loads(backbone)}).backbone.name == "hf"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_diff_applies_and_its_commands_run(page: Path, tmp_path: Path):
    tree = tmp_path / "tree"
    for part in ("src", "tests", "experiments", "pyproject.toml"):
        place = ROOT / part
        copy = shutil.copytree if place.is_dir() else shutil.copy
        tree.mkdir(exist_ok=True)
        copy(place, tree / part)
    (diff,) = blocks(page, "diff")
    (tmp_path / "page.diff").write_text(diff)
    subprocess.run(["git", "apply", str(tmp_path / "page.diff")], cwd=tree, check=True)
    (commands,) = blocks(page, "sh")
    for command in commands.splitlines():
        program, *arguments = command.split()
        module = {"fedmllm": "fedmllm.cli", "pytest": "pytest"}[program]
        environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    if "experiments" in diff and page.stem != "dataset":
        assert list(tree.glob("runs/*/summary.json"))
