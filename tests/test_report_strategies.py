"""A report of methods with and without strategies, and of runs that differ in settings alone."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.reports.answers import groups
from fedmllm.reports.comparisons import additions
from fedmllm.reports.reading import read_results
from fedmllm.reports.tables import published_table, result_table
from fedmllm.reports.write import write_report
from fedmllm.runs.suites.suite import Suite
from support.made_up import write_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three settings of the published benchmark with all of its methods and strategies: 22 columns."""
    folder = tmp_path_factory.mktemp("strategies")
    suite = Suite.load(ROOT / "experiments/paper/hateful-memes.toml")
    suite.save(folder)
    for cell in suite.cells:
        if cell.labels["settings"] in ("alpha 5", "alpha 0.5", "I5:T5"):
            write_run(folder / cell.run_id, cell.experiment)
    return folder


def test_a_scenario_is_compared_with_complete_rows_that_were_split_alike(strategies: Path):
    """cross starts from alpha 0.5; alpha 5 would add the gain of an even split to the cost of hidden modalities."""
    dataset = read_results([strategies]).datasets[0]
    complete, cross = groups(dataset)
    assert (complete.settings, cross.settings) == (("alpha 0.5",), ("I5:T5",))
    assert complete.is_complete
    assert cross.loss is not None
    expected = statistics.fmean(cross.federated.values()) - statistics.fmean(complete.federated.values())
    assert cross.loss.difference == pytest.approx(expected)


def test_strategies_are_kept_apart_from_the_methods_they_are_added_to(strategies: Path):
    dataset = read_results([strategies]).datasets[0]
    assert {"FedAdam", "FedAdam, agnostic prompt", "FedAdam, both strategies"} < set(dataset.methods)
    assert not [method for method in dataset.methods if "none" in method]
    found = additions(dataset)
    assert {c.higher for c in found} == {"with agnostic prompt", "with adaptive prox", "with both strategies"}
    assert {c.family for c in found} == {3}
    published = published_table(dataset, result_table(dataset))
    assert published is not None
    assert published.num_orderings == 18  # 3 settings x 6 pairs of 4 methods


def test_figures_leave_out_what_they_cannot_show(strategies: Path, tmp_path: Path):
    write_report([strategies], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "The figures leave out 16 methods" in page
    legend = page[page.index('aria-label="Methods"') :].split("</ul>")[0]
    assert legend.count("<li>") == 6
    head = page[page.index("<table") :].split("</thead>")[0]
    assert head.count("<button>") == 2 + 22  # setting, scenario, methods
    assert "model MiniCPM-V-2_6 ·" in page


def test_a_method_stays_one_column_where_another_setting_tells_its_runs_apart(tmp_path: Path):
    base = {"data": "synthetic-irony", "aggregator": "fedadam"}
    half = {**base, "scenario": {"name": "missing", "rate": 0.5}}
    tables = [base, {**base, "train": {"lr": 1e-3}}, half, {**base, "seed": 1, "evaluate": {"batch_size": 3}}]
    for i, table in enumerate(tables):
        write_run(tmp_path / str(i), Experiment.parse(table))
    dataset = read_results([tmp_path]).datasets[0]
    assert set(dataset.methods) == {"FedAdam (train.lr=2e-05)", "FedAdam (train.lr=0.001)"}
    assert len(dataset.pick("beta 50 %", "FedAdam (train.lr=2e-05)")) == 1


@pytest.mark.parametrize("name", ["tiny-0.5", "tiny-0.5.html"])
def test_a_name_with_a_dot_is_kept(strategies: Path, tmp_path: Path, name: str):
    write_report([next(path.parent for path in strategies.glob("*/summary.json"))], tmp_path / "new" / name)
    endings = (".html", ".md", "-results.csv", "-costs.csv", "-rounds.csv")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {f"tiny-0.5{ending}" for ending in endings}
