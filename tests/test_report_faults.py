"""Reports over unequal, undefined, damaged or incomplete runs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.reports.answers import answers, groups
from fedmllm.reports.compare import compare, row_verdict
from fedmllm.reports.comparisons import all_pairs
from fedmllm.reports.numerals import MINUS, NO_BREAK, scale_of
from fedmllm.reports.reading import DatasetResults, read_results
from fedmllm.reports.tables import published_table, result_table
from fedmllm.reports.write import markdown, write_report
from support.made_up import write_run

ROOT = Path(__file__).parents[1]
CASES = ROOT / "../shared/cases/runs"


def case(name: str) -> Path:
    if not (CASES / name).is_dir():
        pytest.skip(f"no {CASES / name}")
    return CASES / name


def made(folder: Path, **settings: Any) -> Path:
    write_run(folder, Experiment.parse({"data": "synthetic-irony", **settings}))
    return folder


def changed(folder: Path, values: dict[str, float | None] | None = None, digests: dict[str, str] | None = None) -> None:
    """Other values of metrics, or other digests, in a run's files."""
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["rows"]:
        row["value"] = (values or {}).get(row["metric"], row["value"])
    (folder / "summary.json").write_text(json.dumps(summary))
    first, *rest = (folder / "record.jsonl").read_text().splitlines()
    heading = json.loads(first)
    heading["digests"] |= digests or {}
    (folder / "record.jsonl").write_text("\n".join([json.dumps(heading), *rest]) + "\n")


def only(folder: Path) -> DatasetResults:
    (found,) = read_results([folder]).datasets
    return found


def text_of(dataset: DatasetResults) -> str:
    found = answers(dataset, result_table(dataset), all_pairs(dataset), groups(dataset))
    return " ".join(answer.text for answer in found)


def test_runs_over_other_rows_are_named_and_not_compared(tmp_path: Path):
    folder = case("04-report-compare-ignore-digests")
    report = read_results([folder / "mix2"])
    assert len(report.runs) == 4
    (note,) = report.notes
    assert "unequal digests" in note
    assert "FedAvg: rows b582e6b9" in note
    assert "FedAdam: rows db41f9e9" in note
    assert all_pairs(report.datasets[0]) == []
    table = result_table(report.datasets[0])
    assert {cell.mark for row in table.rows for cell in row.cells.values()} == {""}
    assert note in markdown(report)
    write_report([folder / "mix2"], tmp_path / "page.html")
    assert "unequal digests" in (tmp_path / "page.html").read_text()


def test_runs_of_one_id_over_other_rows_both_stay():
    folder = case("04-report-compare-ignore-digests")
    report = read_results([folder / "e1", folder / "e2"])
    assert {run.method: run.rows[0]["value"] for run in report.runs} == {
        "FedAvg (rows=553bd034)": 0.5,
        "FedAvg (rows=18d805ff)": pytest.approx(1 / 3),
    }
    found = compare([folder / "e1"], [folder / "e2"])
    assert found.digests == {"rows": ("553bd034f556e454", "18d805ffc0449c63")}
    assert (found.num_pairs, found.rows[0].test) == (0, None)


@pytest.mark.parametrize("digest", ["partition", "base"])
def test_another_partition_or_base_is_not_paired(tmp_path: Path, digest: str):
    made(tmp_path / "a")
    changed(made(tmp_path / "b", aggregator="fedadam"), digests={digest: "f" * 16})
    made(tmp_path / "c", aggregator="fedyogi")
    report = read_results([tmp_path])
    assert len(report.notes) == 1
    assert f"{digest} " in report.notes[0]
    assert [(c.higher, c.lower) for c in all_pairs(report.datasets[0])] in (
        [("FedAvg", "FedYogi")], [("FedYogi", "FedAvg")], []
    )  # fmt: skip
    assert compare([tmp_path / "a"], [tmp_path / "b"]).digests.keys() == {digest}


def test_a_copy_counts_once_and_other_results_are_named(tmp_path: Path):
    made(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert read_results([tmp_path]).notes == ()
    changed(tmp_path / "b", {"auc": 0.5})
    report = read_results([tmp_path])
    assert len(report.runs) == 1
    assert "two folders with different results" in report.notes[0]


def test_unequal_seeds_have_no_first_place():
    folder = case("05-unequal-seeds")
    dataset = only(folder / "A")
    table = result_table(dataset)
    assert {cell.mark for cell in table.rows[0].cells.values()} == {""}
    assert table.rows[0].uneven
    (pair,) = all_pairs(dataset)
    assert (pair.higher, pair.test.n, pair.test.difference) == ("FedAvg", 1, pytest.approx(0.1))
    assert "(n=1)" in markdown(read_results([folder / "A"]))
    row = compare([folder / "CA"], [folder / "CB"]).rows[0]
    assert row.test is not None
    assert row.a is not None
    assert row.b is not None
    assert row.a - row.b == pytest.approx(row.test.difference)


def test_an_undefined_metric_is_said_to_be_undefined(tmp_path: Path):
    for name, aggregator in (("a", "fedavg"), ("b", "fedadam")):
        changed(made(tmp_path / name, aggregator=aggregator), dict.fromkeys(("auc", "auc_hard", "accuracy")))
    assert "AUC is not defined on the test rows" in text_of(only(tmp_path))
    write_report([tmp_path], tmp_path / "page.html")
    assert {row_verdict(row) for row in compare([tmp_path / "a"], [tmp_path / "b"]).rows} == {
        "not defined on either side"
    }
    changed(tmp_path / "a", {"accuracy": 0.5})
    changed(tmp_path / "b", {"accuracy": 0.75})
    assert only(tmp_path).metric == "accuracy"


def test_equal_differences_have_no_p(tmp_path: Path):
    for seed in (0, 1):
        changed(made(tmp_path / f"a{seed}", seed=seed), {"auc": 0.4 + 0.1 * seed})
        changed(made(tmp_path / f"b{seed}", seed=seed, aggregator="fedadam"), {"auc": 0.7 + 0.1 * seed})
    text = markdown(read_results([tmp_path]))
    assert "p < 0.001" not in text.replace(NO_BREAK, " ")
    assert "no tests" in text


def test_a_count_is_no_percentage():
    scale = scale_of("unparsed", [3.0])
    assert (scale.value(3.0), scale.higher_is_better) == (f"3.0{NO_BREAK}rows", False)
    assert scale_of("auc", [0.5]).difference(-0.154) == f"{MINUS}15.4{NO_BREAK}points"


def test_one_seed_is_said_once(tmp_path: Path):
    for i, name in enumerate(("fedavg", "fedadam", "fedyogi")):
        made(tmp_path / str(i), aggregator=name)
    text = markdown(read_results([tmp_path]))
    assert text.count("within noise") == 0
    assert text.count("One seed: no tests, and differences may be noise") == 1


@pytest.mark.parametrize(
    ("summary", "problem"),
    [
        (b'{"rows": [\xff]}', "UnicodeDecodeError"),
        (b"[" * 200_000, "RecursionError"),
        (b'{"rows": [{"value": "good"}]}', "KeyError"),
        (b"{}", "KeyError"),
    ],
)
def test_a_strange_summary_is_an_error_with_its_place(tmp_path: Path, summary: bytes, problem: str):
    made(tmp_path / "bad")
    (tmp_path / "bad" / "summary.json").write_bytes(summary)
    with pytest.raises(FedmllmError, match=f"bad: not a run's record and summary: {problem}"):
        read_results([tmp_path])


@pytest.mark.parametrize("value", ['"high"', "1e400", "NaN", "true"])
def test_a_value_that_is_no_number_is_an_error(tmp_path: Path, value: str):
    made(tmp_path / "bad")
    path = tmp_path / "bad" / "summary.json"
    rows = json.loads(path.read_text())["rows"]
    rows[0]["value"] = "HERE"
    path.write_text(json.dumps({"rows": rows}).replace('"HERE"', value))
    with pytest.raises(FedmllmError, match=r"bad: not a run's .*value: got .* finite number or null"):
        compare([tmp_path], [tmp_path])


def test_folders_in_place_of_files_are_errors(tmp_path: Path):
    made(tmp_path / "bad")
    (tmp_path / "bad" / "summary.json").unlink()
    (tmp_path / "bad" / "summary.json").mkdir()
    with pytest.raises(FedmllmError, match="bad: not a run's record and summary: IsADirectoryError"):
        read_results([tmp_path])
    (tmp_path / "suite.json").mkdir()
    with pytest.raises(FedmllmError, match=r"suite\.json: a folder"):
        read_results([tmp_path])


def test_published_numbers_stand_next_to_settings_that_agree():
    dataset = only(ROOT / "results/tiny-strategies")
    found = published_table(dataset, result_table(dataset))
    assert found is not None
    assert {row.setting for row in found.rows} == {"alpha 0.5", "beta 50 %", "I5:T5", "p 60 %"}
    means = [found.mean[m] for m in ("FedYogi", "FedAdam", "FedAvgM", "FedAdagrad", "YOCO, one round, 1 layer")]
    assert means == pytest.approx([73.7, 73.85, 60.5, 71.05, 69.9], abs=0.05)


def test_other_settings_have_no_published_numbers(tmp_path: Path):
    made(tmp_path / "a", partition={"name": "dirichlet", "alpha": 0.5, "num_clients": 4})
    made(tmp_path / "b", scenario={"name": "missing", "rate": 0.3}, partition={"name": "dirichlet", "alpha": 5.0})
    dataset = only(tmp_path)
    assert published_table(dataset, result_table(dataset)) is None


def test_rows_with_gaps_are_not_called_complete(tmp_path: Path):
    made(tmp_path / "a")
    first, *rest = (tmp_path / "a/record.jsonl").read_text().splitlines()
    heading = json.loads(first)
    heading["clients"][0]["shows"] = {"image+text": 3, "text": 4}
    (tmp_path / "a/record.jsonl").write_text("\n".join([json.dumps(heading), *rest]) + "\n")
    (group,) = groups(only(tmp_path))
    assert (group.name, group.is_complete) == ("Rows as they are", False)


@pytest.mark.parametrize("name", ["f/page.html", ".", "x" * 300 + ".html", "page.pdf"])
def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    made(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_text("")
    with pytest.raises(FedmllmError, match=r"cannot be written|unknown ending"):
        write_report([tmp_path / "run"], Path(name))


def test_the_ending_names_the_format_and_the_default_is_in_the_folder(tmp_path: Path):
    for seed in (0, 1):
        made(tmp_path / f"runs/a{seed}", seed=seed)
        made(tmp_path / f"runs/b{seed}", seed=seed, aggregator="fedadam", scenario={"name": "missing", "rate": 0.5})
    (tex,) = write_report([tmp_path / "runs"], tmp_path / "table.tex")
    text = tex.read_text()
    assert text.count("\\toprule") == 1
    assert "beta 50 \\% & -- &" in text
    assert "$\\pm$" in text
    assert (tmp_path / "runs/report.html") in write_report([tmp_path / "runs"])
    with pytest.raises(FedmllmError, match="is latex, but --format is html"):
        write_report([tmp_path / "runs"], tmp_path / "table.tex", "html")


def test_rounds_as_csv(tmp_path: Path):
    made(tmp_path / "run", num_rounds=4, evaluate={"every": 2})
    write_report([tmp_path / "run"], tmp_path / "x.csv")
    rows = list(csv.DictReader((tmp_path / "x-rounds.csv").open()))
    assert [row["round"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[1]["loss"]) == pytest.approx(0.5)
    assert [bool(row["auc (all)"]) for row in rows] == [False, True, False, True]


def test_old_and_new_keys_of_records_are_one(tmp_path: Path):
    made(tmp_path / "old/run")
    made(tmp_path / "new/run", seed=1)
    path = tmp_path / "old/run/record.jsonl"
    text = path.read_text().replace('"update_filter": {', '"screen": {')
    assert '"screen"' in text
    path.write_text(text)
    assert only(tmp_path).methods == ["FedAvg"]
    assert compare([tmp_path / "old"], [tmp_path / "new"]).settings.keys() == {"seed"} - {"seed"}


def test_the_page_explains_its_own_mark(tmp_path: Path):
    for seed in (0, 1):
        for name in ("fedavg", "fedadam"):
            made(tmp_path / f"{name}{seed}", seed=seed, aggregator=name)
    report = read_results([tmp_path])
    write_report([tmp_path], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "A frame: the lead of the best" in page
    assert "\u2248" not in page
    assert "\u2248: the lead of the best" in markdown(report)


def test_a_metric_below_its_range_is_shown(tmp_path: Path):
    changed(made(tmp_path / "a"), {"auc": -1.0})
    assert f"{MINUS}100.0" in markdown(read_results([tmp_path]))
