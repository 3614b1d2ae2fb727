"""Predictions for new rows: the numbers of the evaluation, without answers, in every form."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from fedmllm.cli.main import app
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, DataError, FedmllmError
from fedmllm.runs.predict import predict, table_of
from fedmllm.runs.predictions import read_predictions
from fedmllm.runs.run import run

NOTES = [f"{'fever and cough' if i % 2 else 'no complaints'} case {i}" for i in range(24)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a table of own rows, question and choices in the settings."""
    folder = tmp_path_factory.mktemp("predict")
    for name, labelled in (("train.csv", True), ("new.csv", False)):
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "note", *(["ill"] if labelled else [])])
            writer.writerows(
                [i, note, *(["yes" if i % 2 else "no"] if labelled else [])] for i, note in enumerate(NOTES)
            )
    data = {
        "name": "table", "root": str(folder), "train": "train.csv", "test": "train.csv", "question": "Is it ill?",
        "choices": ["no", "yes"], "judged_by": ["accuracy"], "columns": {"id": "case", "text": "note", "answer": "ill"},
    }  # fmt: skip
    table: dict[str, Any] = {"data": data, "partition": {"name": "iid", "num_clients": 2}, "num_rounds": 1}
    run(Experiment.parse(table), folder / "run")
    return folder


def test_rows_without_answers_get_the_predictions_of_the_evaluation(finished: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = predict(finished / "run", finished / "new.csv", progress=lambda *at: seen.append(at))
    (kept,) = read_predictions(finished / "run" / "predictions.jsonl.gz")
    assert [str(row["id"]) for row in found] == [str(i) for i in range(24)]
    assert seen[-1] == (24, 24)
    for row, prediction in zip(found, kept.predictions, strict=True):
        best = prediction.scores.index(max(prediction.scores))
        assert row["answer"] == ["no", "yes"][best]
        assert sum(row["p"].values()) == pytest.approx(1.0)
        assert row["visible"] == ["text"]
    hidden = predict(finished / "run", finished / "new.csv", visible="none")
    assert {json.dumps(row["p"]) for row in hidden} == {json.dumps(hidden[0]["p"])}  # nothing distinguishes the rows
    assert hidden[0]["visible"] == []


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_the_command_writes_every_form(name: str, finished: Path, tmp_path: Path) -> None:
    words = ["predict", str(finished / "run"), str(finished / "new.csv"), "--out", str(tmp_path / name)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "24 rows in" in done.stdout
    if name.endswith("jsonl"):
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    elif name.endswith("csv"):
        rows = list(csv.DictReader((tmp_path / name).open()))
    else:
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        rows = parquet.read_table(tmp_path / name).to_pylist()
    expected = predict(finished / "run", finished / "new.csv")
    assert [row["answer"] for row in rows] == [row["answer"] for row in expected]
    p = rows[3]["p"]
    assert (json.loads(p) if isinstance(p, str) else p) == expected[3]["p"]


def test_what_cannot_be_predicted_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out: got 'x.txt'; allowed endings: .jsonl, .csv, .parquet"):
        predict(finished / "run", finished / "new.csv", tmp_path / "x.txt")
    with pytest.raises(FedmllmError, match="neither the folder of a run nor a PEFT adapter folder"):
        predict(tmp_path, finished / "new.csv")
    with pytest.raises(ConfigError, match="an adapter does not name its model; give --experiment"):
        predict(finished / "run" / "adapter", finished / "new.csv")
    with pytest.raises(FedmllmError, match="no row has a column 'scan'"):
        predict(finished / "run", finished / "new.csv", columns={"text": "scan"})
    with pytest.raises(FedmllmError, match="no such adapter"):
        predict(finished / "run", finished / "new.csv", client=1)
    loaded = Experiment.parse(json.loads((finished / "run" / "record.jsonl").read_text().splitlines()[0])["settings"])
    by_adapter = predict(finished / "run" / "adapter", finished / "new.csv", experiment=loaded)
    assert by_adapter == predict(finished / "run", finished / "new.csv")


def test_a_folder_of_pictures_is_predicted_as_it_lies_there(tmp_path: Path) -> None:
    """Its pictures need no answers; the choices are the labels that the run was trained on."""
    for i in range(8):
        write_picture(tmp_path / "train" / ("cat" if i % 2 else "dog") / f"{i}.png", i)
    for i in range(3):
        write_picture(tmp_path / "new" / f"{i}.png", 40 + i)
    data = {"name": "table", "root": str(tmp_path), "train": "train", "test": "train", "question": "What is it?"}
    table: dict[str, Any] = {"data": data, "partition": {"name": "iid", "num_clients": 2}, "num_rounds": 1}
    run(Experiment.parse({**table, "train": {"max_steps": 1}}), tmp_path / "run")
    (tmp_path / "new" / "scan.dcm").write_text("")
    said: list[str] = []
    found = predict(tmp_path / "run", tmp_path / "new", notice=said.append)
    assert any("scan.dcm" in text for text in said)
    assert [row["id"] for row in found] == ["0.png", "1.png", "2.png"]
    assert all(set(row["p"]) == {"cat", "dog"} for row in found)
    assert all(row["visible"] == ["image"] for row in found)
    evaluated = predict(tmp_path / "run", tmp_path / "train")
    (kept,) = read_predictions(tmp_path / "run" / "predictions.jsonl.gz")
    best = {one.example.id: one.example.choices[one.scores.index(max(one.scores))] for one in kept.predictions}
    assert {row["id"]: row["answer"] for row in evaluated} == best
    (tmp_path / "rows.csv").write_text(
        "scan,ill\n" + "".join(f"train/dog/{i}.png,{['no', 'yes'][i // 2 % 2]}\n" for i in (0, 2, 4, 6))
    )
    own = {**data, "train": "rows.csv", "test": "rows.csv", "choices": ["no", "yes"], "images": str(tmp_path)}
    for image, places in (({"xray": "scan"}, ["0.png", "1.png", "2.png"]), ("", None)):
        columns = {"image": image, "answer": "ill", "text": "" if image else "scan"}
        experiment = Experiment.parse({**table, "data": {**own, "columns": columns}})
        if places is None:
            with pytest.raises(
                ConfigError, match=r"new: a folder of pictures, one a row, and the experiment reads no pictures;"
            ):
                table_of(experiment, tmp_path / "new", {})
            continue
        rows = table_of(experiment, tmp_path / "new", {}).load("test").examples
        assert [row.fields["xray"] for row in rows] == [(tmp_path / "new" / place,) for place in places]
    with pytest.raises(DataError, match=r"new: a folder of pictures without answers; allowed: one of metadata.jsonl"):
        Experiment.parse({**table, "data": {**data, "train": "new"}}).data.load("train")
    with pytest.raises(ConfigError, match=r'data.columns.answer: got ""; .* name their column in .*train'):
        Experiment.parse({**table, "data": {**data, "columns": {"answer": ""}}}).data.load("train")


def write_picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (shade * 5, 20, 200 - shade)).save(path)
