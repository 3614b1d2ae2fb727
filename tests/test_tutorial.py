"""The tutorial: its files and commands, run as they stand on the page, with less training."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_from_a_csv_to_predictions_and_a_report(shared: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/tutorial.md").read_text()
    shutil.copytree(shared / "cases/hospital", tmp_path / "hospital")
    for block in re.findall(r"^```toml\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE):
        name = block.partition("\n")[0].removeprefix("# ")
        shorter = re.sub(r"num_rounds = \d+", "num_rounds = 1", block).replace("test_rate = 0.3", "test_rate = 0.15")
        (tmp_path / name).write_text(shorter.replace("accumulation = 1", "accumulation = 1\nmax_steps = 1"))
    lines = [c for b in re.findall(r"^```sh\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE) for c in b.splitlines()]
    assert [line.split()[1] for line in lines] == ["data", "run", "predict", "suite", "report", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    outputs = {}
    for line in lines:
        command = [sys.executable, "-m", "fedmllm.cli", *line.split()[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        outputs[line] = done.stdout
    assert "north" in outputs[lines[0]]
    assert "the model before training" in outputs[lines[1]]
    answers = list(csv.DictReader((tmp_path / "answers.csv").open()))
    assert len(answers) == 60
    assert {row["answer"] for row in answers} <= {"no", "yes"}
    report = (tmp_path / "report.md").read_text()
    assert "test row has: image only" in report
    assert "omplete" not in report.partition("## ")[2].partition("| scenario")[0]  # data with gaps
    assert "test rows as they are" in report
    assert "test rows with everything" not in report
