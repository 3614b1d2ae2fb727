"""Certainty in a report: families of tests, detectable differences, errors of the test rows."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats as scipy_stats

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.core.types import Example, Prediction
from fedmllm.reports.answers import answers, groups
from fedmllm.reports.archive import pack_results
from fedmllm.reports.compare import RunComparison, compare, row_verdict, show_comparison
from fedmllm.reports.comparisons import all_pairs
from fedmllm.reports.names import setting_meaning
from fedmllm.reports.numerals import NO_BREAK
from fedmllm.reports.reading import DatasetResults, read_results
from fedmllm.reports.row_error import num_test_sets, row_error
from fedmllm.reports.stats import holm
from fedmllm.reports.tables import result_table
from fedmllm.reports.write import latex, markdown, write_report
from fedmllm.runs.predictions import PredictionFile, read_predictions
from support.made_up import write_run

SETTINGS: Mapping[str, dict[str, Any]] = {
    "alpha 0.5": {},
    "beta 30 %": {"scenario": {"name": "missing", "rate": 0.3}},
    "beta 40 %": {"scenario": {"name": "missing", "rate": 0.4}},
    "beta 50 %": {"scenario": {"name": "missing", "rate": 0.5}},
}
METHODS: Mapping[str, dict[str, Any]] = {
    "FedAvg": {"aggregator": "fedavg"},
    "FedAdam": {"aggregator": "fedadam"},
    "FedYogi": {"aggregator": "fedyogi"},
    "Local": {"method": "local"},
    "Zero-shot": {"method": "zero-shot"},
}


def write_results(folder: Path, values: Mapping[tuple[str, str], Sequence[float]], own_rows: bool = False) -> Path:
    """Runs with these AUCs: (setting, method) -> one a seed."""
    for (setting, method), of_seeds in values.items():
        for seed, value in enumerate(of_seeds):
            data = {"name": "synthetic-irony", **({"seed": seed} if own_rows else {})}
            table = {"data": data, "seed": seed, **SETTINGS[setting], **METHODS[method]}
            run = folder / f"{setting}-{method}-{seed}".replace(" ", "-")
            write_run(run, Experiment.parse(table))
            rows = json.loads((run / "summary.json").read_text())["rows"]
            rows = [{**row, "value": value if row["metric"] == "auc" else row["value"]} for row in rows]
            (run / "summary.json").write_text(json.dumps({"rows": rows}))
            if own_rows:
                first, *rest = (run / "record.jsonl").read_text().splitlines()
                heading = json.loads(first)
                heading["digests"]["rows"] = f"{seed:016}"
                (run / "record.jsonl").write_text("\n".join([json.dumps(heading), *rest]) + "\n")
    return folder


def only(folder: Path) -> DatasetResults:
    (found,) = read_results([folder]).datasets
    return found


def said(dataset: DatasetResults) -> dict[str, str]:
    found = answers(dataset, result_table(dataset), all_pairs(dataset), groups(dataset))
    return {answer.question: answer.text.replace(NO_BREAK, " ") for answer in found}


def text_of(folder: Path) -> str:
    return markdown(read_results([folder])).replace(NO_BREAK, " ")


def noisy(mean: float, *noise: float) -> list[float]:
    return [mean + 0.01 * one for one in noise]


@pytest.fixture
def close(tmp_path: Path) -> Path:
    """FedAdam leads FedAvg in the mean over four settings with p = 0.03, which rows of settings do not establish."""
    values: dict[tuple[str, str], list[float]] = {}
    for i, setting in enumerate(SETTINGS):
        values[setting, "FedAvg"] = [0.80, 0.81, 0.79, 0.80]
        gain = [[0.5, 1.5, 3.0, 1.0], [2.5, 0.5, 1.0, 2.0], [0.5, 2.5, 1.0, 2.5], [1.0, 0.5, 2.5, 1.5]][i]
        values[setting, "FedAdam"] = [a + 0.01 * g for a, g in zip(values[setting, "FedAvg"], gain, strict=True)]
        values[setting, "Local"] = noisy(0.6, 0.0, 1.0, -1.0, 0.5)
    return write_results(tmp_path / "close", values)


def test_the_mean_over_settings_has_one_verdict_in_both_tables(close: Path):
    dataset = only(close)
    table = result_table(dataset)
    (pair,) = [c for c in all_pairs(dataset) if {c.higher, c.lower} == {"FedAdam", "FedAvg"}]
    assert pair.is_established
    assert table.overall is not None
    assert table.overall.is_clear
    assert not any(row.is_clear for row in table.rows)
    assert (table.row_family, table.mean_family) == (4, 3)
    text = text_of(close)
    assert (
        "Holm's correction is over the 4 pairs of federated methods in the rows of settings, and over the 3 pairs of methods "
        "with a federated one among them in the mean over settings."
    ) in text
    assert said(dataset)["What to use"].startswith("Use FedAdam: ")


def test_one_setting_has_the_verdict_of_the_pairs(tmp_path: Path):
    noise = (0.0, 1.0, -1.0)
    values = {
        ("alpha 0.5", "FedAvg"): noisy(0.7, *noise),
        ("alpha 0.5", "FedAdam"): noisy(0.72, 0.5, 1.0, 0.5),  # p = 0.026 alone, 0.13 among five pairs
        ("alpha 0.5", "Local"): noisy(0.7, 1.0, -1.0, 0.0),
        ("alpha 0.5", "Zero-shot"): noisy(0.7, -1.0, 0.0, 1.0),
    }
    dataset = only(write_results(tmp_path, values))
    (pair,) = [c for c in all_pairs(dataset) if {c.higher, c.lower} == {"FedAdam", "FedAvg"}]
    assert pair.test.p is not None
    assert pair.test.p < 0.05
    assert not pair.is_established
    assert not result_table(dataset).rows[0].is_clear
    use = said(dataset)["What to use"]
    assert use.startswith(
        "No method is established as best: FedAdam 72.7 % and FedAvg 70.0 % AUC; the lead over FedAvg, 2.7 "
    )
    assert "is not established with 3 seeds, about" in use
    assert "\\approx" in latex(read_results([tmp_path]))


def test_every_test_has_its_own_detectable_difference(close: Path, tmp_path: Path):
    dataset = only(close)
    text = text_of(close)
    for c in all_pairs(dataset):
        assert c.test.std is not None
        t, n = scipy_stats.t.ppf, c.test.n
        expected = (t(0.975, n - 1) + t(0.8, n - 1)) * c.test.std / n**0.5
        assert c.test.detectable == pytest.approx(expected)
        line = next(line for line in text.splitlines() if line.startswith(f"| {c.higher} | {c.lower} |"))
        assert f" | {100 * expected:.1f} points | " in line
    (page, *_) = write_report([close], tmp_path / "page.html")
    assert "<button>detectable</button>" in page.read_text()


def test_the_detectable_difference_names_its_methods(close: Path, tmp_path: Path):
    assert "With 4 seeds, a difference of FedAdam and FedAvg below " in said(only(close))["How sure this is"]
    assert "Detectable difference of FedAdam and FedAvg (80 % power, 5 %): " in text_of(close)
    three = {("alpha 0.5", m): noisy(0.7, i, -i, i * i) for i, m in enumerate(("FedAvg", "FedAdam", "FedYogi"), 1)}
    dataset = only(write_results(tmp_path / "three", three))
    assert "With 3 seeds, a difference of two federated methods below" in said(dataset)["How sure this is"]


def test_unequal_numbers_of_seeds_are_a_range(tmp_path: Path):
    values = {("alpha 0.5", "FedAvg"): noisy(0.7, 0, 1, 2), ("alpha 0.5", "FedAdam"): noisy(0.8, 1, 0)}
    folder = write_results(tmp_path / "two", values)
    assert result_table(only(folder)).seeds() == (2, 3)
    assert "mean ± standard deviation over 2 to 3 seeds." in text_of(folder)
    assert said(only(folder))["How sure this is"].startswith("With 2 to 3 seeds, ")
    alone = {("alpha 0.5", "FedAvg"): [0.7], ("alpha 0.5", "Local"): [0.6, 0.7]}
    assert "seeds share" not in text_of(write_results(tmp_path / "alone", alone))


def test_other_training_rows_are_no_other_test_set(tmp_path: Path):
    for size in (400, 800):
        folder = write_results(tmp_path / str(size), {("alpha 0.5", "FedAvg"): noisy(0.8, 0.01, -0.01)})
        for run in folder.iterdir():
            first, *rest = (run / "record.jsonl").read_text().splitlines()
            heading = json.loads(first)
            heading["settings"]["data"]["num_train"] = size
            heading["digests"]["rows"] = f"{size:016}"
            (run / "record.jsonl").write_text("\n".join([json.dumps(heading), *rest]) + "\n")
    assert num_test_sets(only(tmp_path)) == 1


def test_a_mean_over_test_sets_has_less_error_than_a_run(tmp_path: Path):
    values = {("alpha 0.5", m): noisy(0.8, 0, 1, 2, -3) for m in ("FedAvg", "Local")}
    dataset = only(write_results(tmp_path / "own", values, own_rows=True))
    assert num_test_sets(dataset) == 4
    error = row_error(dataset, result_table(dataset))
    assert error is not None
    q1, q2, m = 0.8 / 1.2, 2 * 0.64 / 1.8, 149
    expected = ((0.16 + m * (q1 + q2 - 1.28)) / 150**2) ** 0.5
    assert (error.one_set, error.mean) == pytest.approx((expected, expected / 2))
    one, mean = (f"{100 * 1.96 * e:.1f} points" for e in (expected, expected / 2))
    sure = said(dataset)["How sure this is"]
    assert f"the 300 test rows alone leave ± {one} in a run, ± {mean} in the mean over 4 test sets" in sure
    text = text_of(tmp_path / "own")
    one, mean = (f"{100 * e:.1f} points" for e in (expected, expected / 2))
    assert (
        f"test rows alone give to a federated method: {one} in a run and {mean} in a mean over the 4 test sets" in text
    )
    shared = write_results(tmp_path / "shared", values)
    assert "that all seeds share alone leave ± " in said(only(shared))["How sure this is"]
    assert "the seeds share the rows, so their standard deviation does not include it" in text_of(shared)


@pytest.mark.parametrize("methods", [("FedAvg",), ("FedAvg", "FedAdam")])
def test_captions_of_one_seed_speak_of_no_spread(tmp_path: Path, methods: Sequence[str]):
    values = {(s, m): [0.7 + 0.1 * i] for s in ("alpha 0.5", "beta 50 %") for i, m in enumerate(methods)}
    folder = write_results(tmp_path, values)
    text = text_of(folder)
    for words in ("standard deviation", "Holm", "etectable", "Use ", "≈"):
        assert words not in text
    assert "one seed: no tests" in text
    assert 'unsure"' not in write_report([folder], folder / "page.html")[0].read_text()


def test_a_column_that_is_spread_over_sites_is_named():
    settings = {"scenario": {"name": "aligned"}, "partition": {"name": "dirichlet", "alpha": 0.1, "column": "colour"}}
    assert setting_meaning(settings) == "values of 'colour' are spread over sites by Dirichlet(0.1): very uneven"
    settings["partition"] |= {"column": ""}
    assert setting_meaning(settings).startswith("labels are spread")


def test_the_mean_is_that_of_the_settings(close: Path):
    table = result_table(only(close))
    assert table.overall is not None
    means = [row.cells["FedAdam"].spread.mean for row in table.rows]
    assert table.overall.cells["FedAdam"].spread.mean == pytest.approx(statistics.fmean(means))


def sides(folder: Path, values: Mapping[str, Mapping[str, Sequence[float]]]) -> tuple[Path, Path]:
    """Folders of FedAvg and FedAdam."""
    places = []
    for method in ("FedAvg", "FedAdam"):
        places.append(folder / method)
        write_results(places[-1], {(s, method): of_method[method] for s, of_method in values.items()})
    return places[0], places[1]


def printed(found: RunComparison) -> str:
    console = Console(width=80, file=io.StringIO())
    show_comparison(found, console)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split()).replace(NO_BREAK, " ")


def test_compare_counts_a_seed_once_whatever_it_has_been_run_on(tmp_path: Path):
    """Two settings of three seeds are three differences, not six."""
    a, b = sides(
        tmp_path,
        {
            "alpha 0.5": {"FedAvg": [0.80, 0.82, 0.81], "FedAdam": [0.81, 0.85, 0.82]},
            "beta 50 %": {"FedAvg": [0.70, 0.69, 0.71], "FedAdam": [0.70, 0.74, 0.72]},
        },
    )
    found = compare(a, b)
    row = next(row for row in found.rows if row.metric == "auc")
    assert row.test is not None
    assert (found.num_pairs, row.num_cells, row.test.n) == (6, 2, 3)
    expected = scipy_stats.ttest_1samp([-0.005, -0.04, -0.01], 0)
    assert row.test.p == pytest.approx(expected.pvalue)
    assert (row.family, row.p_holm) == (1, pytest.approx(row.test.p))  # the headline
    others = [r for r in found.rows if r is not row]
    tested = [r.test.p for r in others if r.test and r.test.p is not None]
    assert len(tested) > 1
    assert {r.family for r in others} == {len(tested)}
    assert [r.p_holm for r in others] == pytest.approx(list(holm(dict(enumerate(tested))).values()))
    text = printed(found)
    assert "not established with 3 seeds, about" in row_verdict(row).replace(NO_BREAK, " ")
    assert "the mean over its 2 pairs of runs" in text
    assert f"Paired t-test over 3 seeds; the headline metric is tested alone, Holm over {len(tested)} other" in text
    assert "detectable" in text


def test_compare_leaves_out_a_seed_without_all_settings(tmp_path: Path):
    values = {
        "alpha 0.5": {"FedAvg": [0.8, 0.9, 0.7], "FedAdam": [0.7, 0.7, 0.6]},
        "beta 50 %": {"FedAvg": [0.7, 0.6], "FedAdam": [0.5, 0.3]},
    }
    row = compare(*sides(tmp_path, values)).rows[0]
    assert row.test is not None
    assert (row.test.n, row.num_pairs) == (2, 5)
    assert (row.a, row.b) == (pytest.approx(0.75), pytest.approx(0.55))


def test_compare_of_one_seed_has_differences_alone(tmp_path: Path):
    found = compare(*sides(tmp_path, {"alpha 0.5": {"FedAvg": [0.8], "FedAdam": [0.7]}}))
    assert found.rows[0].test is not None
    assert found.rows[0].test.difference == pytest.approx(0.1)
    assert row_verdict(found.rows[0]) == "one seed: no test"
    text = printed(found)
    assert "One seed: differences alone. The paired test needs at least two seeds on both sides" in text
    assert "Holm over" not in text


def test_compare_says_that_a_side_reads_no_modality(tmp_path: Path):
    a, b = sides(tmp_path, {"alpha 0.5": {"FedAvg": [0.8], "FedAdam": [0.7]}})
    for run in a.iterdir():
        rows = [{**row, "visible": "none"} for row in json.loads((run / "summary.json").read_text())["rows"]]
        (run / "summary.json").write_text(json.dumps({"rows": rows}))
    with pytest.raises(FedmllmError, match="FedAvg reads no modality"):
        compare(a, b)


def with_predictions(run: Path, data_seed: int, *skills: float) -> None:
    """An evaluation for each skill: predictions of 60 test rows, which the data seed draws."""
    file = PredictionFile(run / "predictions.jsonl.gz")
    for round_, skill in enumerate(skills, start=1):
        rng, noise = np.random.default_rng(data_seed), np.random.default_rng([data_seed, int(100 * skill)])
        predictions = []
        for i in range(60):
            truth = bool(rng.random() < 0.5)
            example = Example(i, {}, "?", ("no", "yes"), "yes" if truth else "no", f"t:{i}", {})
            predictions.append(Prediction(example, (0.0, skill * (2 * truth - 1) + noise.normal()), None))
        file.write(predictions, "all", round_)
    file.close()


def test_compare_has_the_error_of_the_test_rows(tmp_path: Path):
    values = {"alpha 0.5": {"FedAvg": [0.8, 0.82, 0.81, 0.8], "FedAdam": [0.7, 0.75, 0.75, 0.7]}}
    a, b = sides(tmp_path, values)
    halves = []
    for own in (False, True):  # all seeds on one test set, then a set each
        for place, skill in ((a, 1.0), (b, 0.5)):
            for seed in range(4):
                run = next(place.glob(f"*-{seed}"))
                (run / "predictions.jsonl.gz").unlink(missing_ok=True)
                with_predictions(run, seed if own else 0, skill)
        row = compare(a, b).rows[0]
        assert row.row_half is not None
        halves.append(row.row_half)
    assert 0.4 < halves[1] / halves[0] < 0.7  # four test sets: about half of the error
    assert "± test rows" in printed(compare(a, b))
    (next(b.glob("*-2")) / "predictions.jsonl.gz").unlink()
    assert compare(a, b).rows[0].row_half is None
    assert "± test rows" not in printed(compare(a, b))


def test_an_archive_keeps_the_last_predictions_and_gives_the_same_report(tmp_path: Path):
    values = {("alpha 0.5", m): [0.8, 0.82] for m in ("FedAvg", "FedAdam")}
    folder = write_results(tmp_path / "runs", values)
    for run in folder.iterdir():
        with_predictions(run, 0, 0.1, 1.0)
    for out, predictions in ((tmp_path / "with.tar.xz", True), (tmp_path / "without.tar.xz", False)):
        pack_results(folder, out, predictions)
    (run, *_) = read_results([tmp_path / "with.tar.xz"]).runs
    source = folder / run.folder.name / "predictions.jsonl.gz"
    assert len(list(read_predictions(source))) == 2
    assert run.predictions is not None
    assert next(read_predictions(source, run.predictions)) == list(read_predictions(source))[1]
    texts = [text_of(place) for place in (folder, tmp_path / "with.tar.xz", tmp_path / "without.tar.xz")]
    assert texts[0] == texts[1]
    assert "(bootstrap over rows)" in texts[1]
    assert "(Hanley and McNeil's formula" in texts[2]
