"""Experiments with more than two modalities, from file to report, and predictions of new rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.core.types import visible_of
from fedmllm.data.drivelm import CAMERAS
from fedmllm.data.synthetic_clinic import SyntheticClinic
from fedmllm.data.synthetic_driving import SENSORS, SyntheticDriving
from fedmllm.reports.importance import importances
from fedmllm.reports.reading import BySeed, DatasetResults, Draw
from fedmllm.reports.write import write_report
from fedmllm.runs.predict import predict
from fedmllm.runs.run import run
from fedmllm.runs.suites.suite import Suite

ROOT = Path(__file__).parent.parent
SMALL = ["data.num_train=24", "data.num_validation=4", "data.num_test=12", "num_rounds=1", "partition.num_clients=3"]


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of the clinic's experiment."""
    folder = tmp_path_factory.mktemp("clinic")
    visible = 'evaluate.visible=["all", "all-labs", "labs+genes", "none"]'
    run(Experiment.load(ROOT / "experiments/clinic/one.toml", [*SMALL, visible]), folder / "run")
    return folder


def test_the_clinic_trains_and_its_record_counts_every_modality(clinic: Path) -> None:
    lines = [json.loads(line) for line in (clinic / "run/record.jsonl").read_text().splitlines()]
    shows = [pattern for client in lines[0]["clients"] for pattern in client["shows"]]
    assert {m for pattern in shows for m in pattern.split("+")} - {"none"} == {"image", "text", "labs", "genes"}
    (trained,) = [line for line in lines if line["event"] == "round"]
    assert all(update["num_steps"] > 0 for update in trained["clients"])
    evaluated = [line for line in lines if line["event"] == "eval"]
    assert [line["visible"] for line in evaluated] == ["all", "all-labs", "labs+genes", "none"]
    assert all(0 <= line["metrics"]["auc"] <= 1 for line in evaluated)


def test_a_report_names_every_pattern_and_draws_every_modality(clinic: Path) -> None:
    write_report([clinic / "run"], clinic / "report")
    page = (clinic / "report.html").read_text(encoding="utf-8")
    for words in ("test: everything but labs", "test: labs and genes", "test: nothing"):
        assert words in page
    assert "share of the site's rows that show the modality" in page.lower()
    assert "genes: " in page
    assert "Importance of each modality" in page
    assert "### Importance of each modality: " in (clinic / "report.md").read_text(encoding="utf-8")
    assert "loses each of its modalities with a chance of 30 %" in page


@pytest.mark.parametrize("name", ["clinic/one", "clinic/sites", "driving/one", "driving/sensors"])
def test_the_experiments_load_and_their_scenarios_suit_their_modalities(name: str) -> None:
    path = ROOT / f"experiments/{name}.toml"
    if name.endswith("one"):
        experiments = [Experiment.load(path)]
    else:
        suite = Suite.load(path)
        experiments = [cell.experiment for cell in suite.cells]
        assert len({e.run_id() for e in experiments}) == len(experiments) >= 60
    assert {len(e.data.modalities()) for e in experiments} == {4 if "clinic" in name else 8}


def test_cars_of_three_kinds_train(tmp_path: Path) -> None:
    """A cell of the driving suite, made small: each client sees its own cameras and sensors."""
    cell = next(
        c
        for c in Suite.load(ROOT / "experiments/driving/sensors.toml").cells
        if c.label.startswith("three kinds of cars · FedAvg")
    )
    small = {"num_train": 30, "num_validation": 5, "num_test": 10}
    settings = cell.experiment.dump()
    settings = {**settings, "data": {**settings["data"], **small}, "num_rounds": 1}
    rows = run(Experiment.parse(settings), tmp_path / "run").rows
    assert {row["visible"] for row in rows} == {"all", "all-speed-range", "CAM_FRONT+range", "speed+range"}
    head = json.loads((tmp_path / "run/record.jsonl").read_text().splitlines()[0])
    assert (
        sorted(len(p.split("+")) for client in head["clients"] for p in client["shows"]) == [2] * 3 + [6] * 3 + [8] * 4
    )


class _Results(DatasetResults):
    """Results of one method whose metric is a known function of the visible modalities."""

    def __init__(self, names: list[str], value: Callable[[frozenset[str]], float]) -> None:
        self.names, self.value = names, value

    runs = property(lambda self: [SimpleNamespace(rows=[{"visible": name} for name in self.names])])  # type: ignore[assignment]
    modalities = ("a", "b", "c")  # type: ignore[assignment]
    methods, settings, metric = ["M"], ["S"], "auc"  # type: ignore[assignment]

    def values(self, metric: str = "", visible: str = "") -> dict[tuple[str, str], BySeed]:
        worth = self.value(visible_of(visible, self.modalities))
        return {("S", "M"): {Draw(seed): worth + 0.01 * seed for seed in range(2)}}


def test_importances_are_shapley_values_if_every_pattern_was_evaluated() -> None:
    """By hand: a adds 0.2; b and c add 0.1 together only, so 0.05 each; the constant counts for none."""
    every = ["all", "all-a", "all-b", "all-c", "a", "b", "c", "none"]
    value = lambda s: 0.5 + 0.2 * ("a" in s) + 0.1 * ({"b", "c"} <= s)  # noqa: E731
    (table,) = importances(_Results(every, value))
    assert table.is_shapley
    means = {m: spread.mean for m, spread in table.rows["S"].items()}
    assert means == pytest.approx({"a": 0.2, "b": 0.05, "c": 0.05})
    assert table.rows["S"]["a"].std == pytest.approx(0.0)
    (table,) = importances(_Results(["all", "all-b", "c"], value))
    assert not table.is_shapley
    assert {m: spread.mean for m, spread in table.rows["S"].items()} == pytest.approx({"b": 0.1})
    assert importances(_Results(["all", "a"], value)) == []


def test_new_rows_of_the_clinic_are_predicted_from_its_columns(clinic: Path) -> None:
    """The readings are written for the model as in training: hiding them changes the answer's probability."""
    (clinic / "new.csv").write_text(
        "case,report,amber,birch,heron,flint,coral\n1,so awful,80,70,R12H,wt,wt\n2,,3,,,,\n"
    )
    columns = {"image": ""}
    whole = predict(clinic / "run", clinic / "new.csv", columns=columns)
    assert [row["visible"] for row in whole] == [["text", "labs", "genes"], ["labs"]]
    part = predict(clinic / "run", clinic / "new.csv", columns=columns, visible="labs")
    assert [row["visible"] for row in part] == [["labs"], ["labs"]]
    assert whole[1]["p"] == pytest.approx(part[1]["p"])
    assert whole[0]["p"] != pytest.approx(part[0]["p"])


def test_the_ceilings_on_the_page_are_those_of_the_laws() -> None:
    page = (ROOT / "docs/modalities.md").read_text(encoding="utf-8")
    clinic, driving = SyntheticClinic(), SyntheticDriving()
    rows = {
        "all four": clinic.modalities(),
        "any three": ("image", "labs", "genes"),
        "picture and report, or labs and genes": ("labs", "genes"),
        "any other two": ("image", "genes"),
        "any one": ("labs",),
    }
    for words, visible in rows.items():
        assert f"| {words} | {clinic.ceilings(frozenset(visible))['auc']:.3f} |" in page
    best = [driving.ceilings(frozenset(v))["accuracy"] for v in (driving.modalities(), CAMERAS, SENSORS, ())]
    words = ("with everything", "without the sensors", "without the cameras", "with nothing")
    assert all(f"{value:.3f} {word}" in page for value, word in zip(best, words, strict=True))
