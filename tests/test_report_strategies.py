"""A report of methods with and without strategies, and of runs that only settings tell apart."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.reports.findings import claim_finding, findings, losses
from fedmllm.reports.reading import read_results
from fedmllm.reports.stats import Paired
from fedmllm.reports.tables import result_table
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
    values = dataset.values()
    whole, cross = (statistics.fmean(values[setting, "FedAdam"].values()) for setting in ("alpha 0.5", "I5:T5"))
    ((text, test),) = losses(dataset, values, "FedAdam")
    assert f"goes from {100 * whole:.1f} ± " in text
    assert "(complete rows, split alike)" in text
    assert test is not None
    assert test.difference == pytest.approx(cross - whole)


def test_strategies_are_told_apart_from_the_methods_they_are_added_to(strategies: Path):
    dataset = read_results([strategies]).datasets[0]
    assert {"FedAdam", "FedAdam, agnostic prompt", "FedAdam, both strategies"} < set(dataset.methods)
    assert not [method for method in dataset.methods if "none" in method]
    found = [finding.text for finding in findings(dataset, result_table(dataset))]
    assert any(text.startswith("Of 18 published orderings") for text in found)  # 3 settings x 6 pairs of 4 methods
    added = [text for text in found if "4 methods with it against the same without" in text]
    assert {text.split(":")[0] for text in added} == {"agnostic prompt", "adaptive prox", "both strategies"}
    assert len(found) == 8  # lead, two baselines, one scenario, three strategies, the published orderings


def test_figures_leave_out_what_they_cannot_show(strategies: Path, tmp_path: Path):
    write_report([strategies], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "The figures leave out 16 methods" in page
    legend = page[page.index('aria-label="Methods"') :].split("</ul>")[0]
    assert legend.count("<li>") == 6
    head = page[page.index("<table") :].split("</thead>")[0]
    assert head.count("<button>") == 2 + 22 + 5  # setting, scenario, ours, published
    assert "<dd>MiniCPM-V-2_6</dd>" in page


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
    endings = (".html", ".md", "-results.csv", "-costs.csv")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {f"tiny-0.5{ending}" for ending in endings}


def test_a_difference_that_only_the_correction_hides_is_weak():
    claim = Paired(difference=0.2, low=0.05, high=0.35, p=0.03, n=3)
    found = [claim_finding("A against B:", claim, p_holm, 6) for p_holm in (0.03, 0.13)]
    assert [finding.tag for finding in found] == ["clear", "weak"]
    assert found[1].text.endswith("+20.0 points: more than noise taken alone, not as one of 6 claims.")
    assert claim_finding("A against B:", Paired(0.2, -0.05, 0.45, 0.08, 3), 0.4, 6).tag == "noise"
