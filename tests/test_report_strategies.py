"""A report of methods with and without strategies, and of runs that differ in settings alone."""

from __future__ import annotations

import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.reports.answers import answers, groups
from fedmllm.reports.compare import compare
from fedmllm.reports.comparisons import additions, all_pairs
from fedmllm.reports.reading import read_results
from fedmllm.reports.roles import role_of
from fedmllm.reports.tables import published_table, result_table
from fedmllm.reports.write import write_report
from fedmllm.runs.run import run
from fedmllm.runs.suites.suite import Suite
from support.made_up import write_run
from support.runs import experiment

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


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs on the same clients: nothing, the public client, retrieve, and the oracle."""
    folder = tmp_path_factory.mktemp("completed")
    missing = {"name": "missing", "rate": 0.5}
    strategies: dict[str, dict[str, Any]] = {
        "none": {},
        "client": {"public": {"rows": 6, "client": True}},
        "retrieve": {"public": {"rows": 6}, "completion": "retrieve"},
        "oracle": {"completion": "oracle"},
    }
    for name, table in strategies.items():
        for seed in (0, 1):
            run(experiment(num_rounds=1, scenario=missing, seed=seed, **table), folder / f"{name}-{seed}")
    return folder


def test_public_rows_as_a_client_are_compared_with_what_they_control(completed: Path):
    report = read_results([completed / f"{name}-{seed}" for name in ("none", "client", "retrieve") for seed in (0, 1)])
    assert not report.notes
    methods = ["FedAvg", "FedAvg + public-client", "FedAvg + retrieve"]
    pairs = all_pairs(report.datasets[0])
    assert {frozenset((c.higher, c.lower)) for c in pairs} == set(map(frozenset, combinations(methods, 2)))
    assert {c.test.n for c in pairs} == {2}
    found = compare(completed / "none-0", completed / "client-0")
    assert (found.num_pairs, found.digests) == (1, {})


def test_a_bound_and_a_control_are_in_the_table_and_are_never_ranked(completed: Path, tmp_path: Path):
    data = read_results([completed]).datasets[0]
    assert data.candidates == ["FedAvg", "FedAvg + retrieve"]
    assert data.roles == {"FedAvg + oracle": "bound", "FedAvg + public-client": "control"}
    table, pairs = result_table(data), all_pairs(data)
    for row in table.rows:
        assert not row.cells["FedAvg + oracle"].mark
        assert not row.cells["FedAvg + public-client"].mark
    assert frozenset(("FedAvg + oracle", "FedAvg + public-client")) not in {
        frozenset((c.higher, c.lower)) for c in pairs
    }
    use = answers(data, table, pairs, groups(data))[0].text
    recommended = use.split(";")[0]
    assert "oracle" not in recommended
    assert "public-client" not in recommended
    assert "FedAvg + oracle (bound)" in use
    write_report([completed], tmp_path / "report.html")
    assert (
        "Not ranked: FedAvg + oracle (bound: trained with content that the masks hide)."
        in (tmp_path / "report.md").read_text()
    )
    assert "FedAvg + public-client (control)" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("table", "role"),
    [
        ({}, "method"),
        ({"completion": "retrieve", "public": {"rows": 2}}, "method"),
        ({"completion": {"name": "retrieve", "answer": "any"}, "public": {"rows": 2}}, "control"),
        ({"completion": {"name": "retrieve", "answer": "random"}, "public": {"rows": 2}}, "control"),
        ({"completion": {"name": "retrieve", "match": "random"}, "public": {"rows": 2}}, "control"),
        ({"completion": {"name": "retrieve", "whole": True}, "public": {"rows": 2}}, "control"),
        ({"completion": "imagine"}, "method"),
        ({"completion": {"name": "imagine", "answer": "any"}}, "control"),
        ({"public": {"rows": 2, "client": True}}, "control"),
        ({"completion": "oracle", "public": {"rows": 2, "client": True}}, "bound"),
    ],
)
def test_older_records_get_their_role_from_the_settings(table: dict[str, Any], role: str):
    settings = experiment(**table)
    assert settings.role() == role == role_of({}, settings.model_dump(mode="json"))


def test_the_record_of_a_plug_in_states_its_role():
    assert role_of({"role": "bound"}, {"completion": {"name": "of-a-plug-in"}}) == "bound"
    assert role_of({}, {"completion": {"name": "of-a-plug-in"}}) == role_of({}, {}) == "method"
