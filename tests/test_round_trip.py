"""Settings written out and read back: the same experiment, which reads the same rows, in a suite, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.run import run
from fedmllm.runs.suites.scheduler import CellState, run_suite
from fedmllm.runs.suites.suite import Cell, Suite

GOLDEN = json.loads((Path(__file__).parent / "golden/run_ids.json").read_text(encoding="utf-8"))
SMALL = {"num_train": 24, "num_test": 6}
TRAIN = {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 1}


class Silent:
    def update(self, state: CellState) -> None: ...

    def finished(self, cell: Cell, seconds: float, error: str) -> None: ...


def read_back(experiment: Experiment) -> list[Experiment]:
    return [
        Experiment.parse(experiment.dump()),
        Experiment.parse(json.loads(json.dumps(experiment.model_dump(mode="json")))),
    ]


def own_rows(folder: Path) -> dict[str, Any]:
    """A table whose question and choices are settings, and whose rows name their clients."""
    lines = ["case,site,note,ill", *(f"{i},{'AB'[i % 2]},note {i},{('no', 'yes')[i % 2]}" for i in range(12))]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    columns = {"id": "case", "text": "note", "answer": "ill", "client": "site"}
    return {
        "name": "table", "root": str(folder), "train": "rows.csv", "test": "rows.csv", "question": "Is it ill?",
        "choices": ["no", "yes"], "judged_by": ["accuracy"], "columns": columns,
    }  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN["experiments"], ids=lambda case: json.dumps(case["table"])[:80])
def test_settings_read_back_are_the_same_experiment(case: dict[str, Any]) -> None:
    one = Experiment.parse(case["table"])
    for two in read_back(one):
        assert two == one
        assert (two.identity(), two.run_id()) == (one.identity(), case["run_id"])


@pytest.mark.parametrize("name", ["synthetic-irony", "synthetic-crisis", "table"])
def test_settings_read_back_read_the_same_rows(name: str, tmp_path: Path) -> None:
    one = Experiment.parse({"data": own_rows(tmp_path) if name == "table" else {"name": name, **SMALL}})
    for two in read_back(one):
        for split in ("train", "test"):
            assert two.data.load(split).examples == one.data.load(split).examples
        assert two.partition == one.partition


def test_a_suite_gives_what_single_runs_give_for_every_data_set_without_a_download(tmp_path: Path) -> None:
    data = {
        "own": own_rows(tmp_path),
        **{name: {"name": name, **SMALL} for name in ("synthetic-irony", "synthetic-crisis")},
    }
    cells = []
    for name, table in data.items():
        partition = {} if name == "own" else {"partition": {"name": "iid", "num_clients": 2}}
        e = Experiment.parse({"data": table, "num_rounds": 1, "train": TRAIN, **partition})
        cells.append(Cell({"data": name, "seeds": "0"}, e, e.run_id()))
    state = run_suite(Suite("data", tuple(cells)), tmp_path / "out", 1, 1, 10**12, Silent())
    assert (state.finished, state.failed) == (3, {})
    for cell in cells:
        alone = run(cell.experiment, tmp_path / "alone" / cell.run_id)
        in_suite = RunFolder(tmp_path / "out" / cell.run_id).read_rows()
        assert [row["value"] for row in in_suite] == [row["value"] for row in alone]
