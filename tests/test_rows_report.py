"""Results by test row, in a report and from `load_run`: rows with gaps, sites, kept columns, paired tests."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedmllm.cli.display import show_table
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.types import Example, Prediction
from fedmllm.reports.answers import answers, groups
from fedmllm.reports.comparisons import all_pairs
from fedmllm.reports.reading import read_results
from fedmllm.reports.rows import row_results
from fedmllm.reports.tables import matrices, result_table
from fedmllm.reports.texts import matrix_markdown
from fedmllm.reports.write import write_report
from fedmllm.runs.predictions import PredictionFile
from fedmllm.runs.result import load_run

NUM = 40
SETTINGS: dict[str, Any] = {
    "data": {"name": "table"},
    "scenario": {"name": "aligned"},
    "partition": {"name": "by-column", "column": "client"},
    "backbone": {"name": "tiny"},
    "prompt": {"name": "plain"},
    "train": {},
    "num_rounds": 1,
    "cohort_size": 0,
    "seed": 0,
}


def prediction(i: int, right: bool, hide_text: bool = False) -> Prediction:
    """Row i: every second one lacks its report; sites in turn."""
    fields = {"image": (Path("a.png"),)} | ({} if i % 2 else {"text": "x"})
    example = Example(i, fields, "?", ("no", "yes"), "yes" if i % 4 < 2 else "no", f"t:{i}", {"client": "ab"[i // 20]})
    chosen = example.choices.index(example.answer) == int(right)  # 1 if "yes" is chosen
    return Prediction(example, (-1.5, -0.25) if chosen else (-0.25, -1.5), None)


def made_run(folder: Path, method: str, wrong: set[int], wrong_image: set[int]) -> Path:
    """The folder of a run whose model answers these rows wrong."""
    folder.mkdir(parents=True)
    file = PredictionFile(folder / "predictions.jsonl.gz")
    rows = []
    for visible, missed in (("all", wrong), ("image", wrong_image)):
        file.write([prediction(i, i not in missed) for i in range(NUM)], visible, 1)
        about = {"scenario": "aligned", "setting": "column=client", "method": method, "prompt": "plain", "seed": 0}
        value = {"metric": "accuracy", "value": 1 - len(missed) / NUM, "std": None, "n": 1, "visible": visible}
        rows.append({**about, **value, "wall_s": 1.0, "num_rounds": 1, "run_id": f"{method}-id"})
    file.close()
    settings = {**SETTINGS, "method": "federated" if method == "fedavg" else method}
    clients = [{"client": 0, "name": "a", "labels": {"no": 5}, "shows": {"image+text": 3, "image": 2}}]
    head = {"event": "experiment", "settings": settings, "digests": {"rows": "r"}, "clients": clients, "num_test": NUM}
    (folder / "record.jsonl").write_text(json.dumps(head) + "\n")
    (folder / "summary.json").write_text(json.dumps({"rows": rows}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    no_report = set(range(1, NUM, 2))
    made_run(folder / "fedavg", "fedavg", set(list(no_report)[:8]), no_report | {0, 2, 4, 6, 8})
    made_run(folder / "zero", "zero-shot", set(range(0, NUM, 4)) | no_report, no_report)
    return folder


def test_a_report_on_rows_with_gaps_answers_by_what_a_row_has(runs: Path) -> None:
    dataset = read_results([runs]).datasets[0]
    table = result_table(dataset)
    (found,) = row_results(dataset, table.scale)
    assert found.has_gaps
    by = {(one.by, one.name): (one.num_rows, one.cells["FedAvg"].value) for one in (found.whole, *found.slices)}
    assert by["", "all rows"] == (NUM, 0.8)
    assert by["shows", "image + text"] == (20, 1.0)
    assert by["shows", "image only"] == (20, 0.6)
    assert {name for kind, name in by if kind == "site"} == {"a", "b"}
    (hidden,) = found.hidden
    assert (hidden.visible, hidden.test.num_rows) == ("image", 20)
    assert hidden.test.difference == pytest.approx(-5 / 20)
    (test,) = found.tests
    assert (test.higher, test.test.only_a, test.test.only_b) == ("FedAvg", 22, 0)
    assert test.p_holm == pytest.approx(2 / 2**22)
    assert found.confusions["Zero-shot"].labels == ("no", "yes")
    texts = {a.question: a.text for a in answers(dataset, table, all_pairs(dataset), groups(dataset), [found])}
    cost = texts["What missing data costs"].replace("\N{NO-BREAK SPACE}", " ")
    assert "100.0 % on test rows with image + text (20) and 60.0 % on test rows with image only (20)" in cost
    assert "image only \N{MINUS SIGN}25.0 points" in cost
    assert "omplete" not in " ".join(texts.values())


def test_the_files_of_a_report_have_the_rows(runs: Path, tmp_path: Path) -> None:
    write_report([runs], tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert "Accuracy by what a test row has" in page or "accuracy by what a test row has" in page
    assert '<details id="c0-rows" open>' in page
    assert "calibration error (ECE)" in page
    assert "| test row has: image only | 20 | 60.0 (" in (tmp_path / "x.md").read_text()
    lines = list(csv.DictReader((tmp_path / "x-rows.csv").open()))
    assert {(r["by"], r["name"]) for r in lines} >= {("", "all rows"), ("site", "b"), ("shows", "image only")}


def test_a_finished_run_answers_in_python(runs: Path) -> None:
    result = load_run(runs / "fedavg")
    whole, both, image = result.rows_by("shows")
    assert (whole["value"], both["value"], image["value"]) == (0.8, 1.0, 0.6)
    assert image["low"] < 0.6 < image["high"]
    assert [row["name"] for row in result.rows_by("site")] == ["all rows", "a", "b"]
    calibration, confusion = result.calibration(), result.confusion()
    assert calibration is not None
    assert calibration.accuracy == pytest.approx(0.8)
    assert confusion is not None
    assert sum(map(sum, confusion.counts)) == NUM
    with pytest.raises(ConfigError, match="by: got 'ward'; no test row has that column; allowed: shows, site"):
        result.rows_by("ward")
    with pytest.raises(FedmllmError, match="none with 'text' visible; there are: all, image"):
        result.rows_by("shows", visible="text")
    with pytest.raises(FedmllmError, match="metric: got 'acc'; allowed: accuracy"):
        result.rows_by("shows", "acc")


def test_rows_with_gaps_are_called_rows_as_they_are(runs: Path, tmp_path: Path) -> None:
    page, text, *_ = (path.read_text() for path in write_report([runs], tmp_path / "report.html"))
    dataset = read_results([runs]).datasets[0]
    assert dataset.has_gaps
    assert "| rows as they are | by-column |" in text
    assert "| trained on | rows as they are | image only |" in text
    assert '<td class="word">rows as they are</td>' in page
    assert "test: rows as they are" in page
    for one in (page, text):
        assert "everything |" not in one
        assert "| aligned" not in one
        assert ">aligned<" not in one
    assert "by-column: nothing is hidden; each row names its site" in text
    whole = [replace(run, heading={**run.heading, "clients": [{"shows": {"image+text": 5}}]}) for run in dataset.runs]
    complete = replace(dataset, runs=tuple(whole))
    assert {row.scenario for row in result_table(complete).rows} == {"aligned"}
    assert matrix_markdown(matrices(complete)[0], result_table(complete).scale).startswith(
        "| trained on | everything |"
    )


def test_a_table_leaves_out_metrics_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    about = {"run_id": "a", "seed": 0, "scenario": "aligned", "setting": "x", "method": "fedavg", "prompt": "plain"}
    about |= {"visible": "all", "std": None, "num_rounds": 1, "up_bytes": 1, "down_bytes": 1, "wall_s": 1.0}
    values = {"accuracy": 0.5, "token_f1": None, "unparsed": 0.0}

    def printed(**changed: float | None) -> str:
        show_table([{**about, "metric": name, "value": value} for name, value in {**values, **changed}.items()])
        return capsys.readouterr().out

    assert "accuracy" in printed()
    assert "token_f1" not in printed()
    assert "unparsed" not in printed()
    assert "token_f1" in printed(token_f1=0.0)  # a value, though it is 0
    assert "unparsed" in printed(unparsed=2.0)
    assert "accuracy" in printed(accuracy=None)  # the main metric says that it is not defined
