"""A hospital's table: gaps written as words, site names, held-out test rows, other kinds of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmllm.cli.data import app
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.types import Example
from fedmllm.data.base import Dataset
from fedmllm.data.overlap import overlap
from fedmllm.reports.data import Federation
from fedmllm.runs.inputs import about_client
from support import rawsets

COLUMNS = {"id": "case", "image": "scan", "text": "report", "answer": "label", "client": "site"}


def hospital(root: Path, **settings: Any) -> Dataset:
    settings = {"question": "Is there a fracture?", "choices": ["no", "yes"], "columns": COLUMNS, **settings}
    return rawsets.dataset("table", root, **{"train": "rows.csv", **settings})


def test_na_is_a_missing_report_and_the_sites_have_names(shared: Path) -> None:
    data = hospital(shared / "cases" / "hospital", test_rate=0.2)
    rows = (*data.load("train").examples, *data.load("test").examples)
    assert len(rows) == 300
    by_id = {e.id: e for e in rows}
    assert by_id["H0003"].fields.keys() == {"image"}  # its report is "NA"
    assert not any(str(e.fields.get("text")) in ("NA", "NaN", "-", "null", "N/A") for e in rows)
    kept = hospital(shared / "cases" / "hospital", test_rate=0.2, na_values=[])
    assert {"NA"} <= {e.fields.get("text") for e in (*kept.load("train").examples, *kept.load("test").examples)}
    federation = Federation.of(Experiment.parse({"data": data}))
    names = [about_client(shard, federation.examples)["name"] for shard in federation.shards]
    assert names == sorted({e.columns["client"] for e in rows})
    assert len(names) == 4


def test_show_counts_patterns_test_rows_and_missing_files(tmp_path: Path) -> None:
    rawsets.write_lines(tmp_path / "1.png", [])
    lines = ["scan,report,label,site,split", "1.png,a,no,north,train", "2.png,NA,yes,north,train", ",b,no,south,0"]
    rawsets.write_lines(tmp_path / "rows.csv", [*lines, "1.png,c,yes,south,test"])
    columns = {key: value for key, value in COLUMNS.items() if key != "id"}
    data = {"name": "table", "root": str(tmp_path), "train": "rows.csv", "test_column": "split", "columns": columns}
    text = "\n".join(f"data.{key} = {json.dumps(value)}" for key, value in data.items() if key != "columns")
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in columns.items())
    (tmp_path / "e.toml").write_text(f'{text}\ndata.columns = {{ {table} }}\ndata.question = "?"\n')
    result = CliRunner().invoke(app, ["show", str(tmp_path / "e.toml")], catch_exceptions=False)
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in result.stdout.splitlines() if line.startswith("│")]
    assert [(row[0], row[-4:]) for row in cells] == [("north", ["1", "1", "0", "0"]), ("south", ["0", "0", "1", "0"])]
    assert "3 rows, 1 test rows" in result.stdout
    assert "1 of 1 test rows have a picture that is also in a training row: 5" in result.stderr
    assert "1 of 2 image files are not there" in result.stderr


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("1.png,x,NA,north", r"row 2: 'label' is empty \('NA' is one of data.na_values\)"),
        ("1.png,x,no,N/A", r"row 2: 'site' is empty \('N/A' is one of data.na_values\)"),
    ],
)
def test_words_for_a_missing_label_or_site_are_bad_rows(tmp_path: Path, cells: str, message: str) -> None:
    rawsets.write_lines(tmp_path / "rows.csv", ["scan,report,label,site", cells])
    columns = {key: value for key, value in COLUMNS.items() if key != "id"}
    with pytest.raises(DataError, match=message):
        hospital(tmp_path, columns=columns).load("train")
    rawsets.write_lines(tmp_path / "rows.csv", ["scan,report,label,site", "-,x,None,north", "nan,x,yes,north"])
    rows = hospital(tmp_path, columns=columns, choices=["None", "yes"]).load("train").examples
    assert [(e.answer, tuple(e.fields)) for e in rows] == [
        ("None", ("text",)),
        ("yes", ("text",)),
    ]  # a choice is an answer


def test_a_short_text_in_many_cells_gets_a_hint(tmp_path: Path) -> None:
    texts = ["see PACS"] * 6 + [f"report number {i}" for i in range(6)]
    lines = [f"{i}.png,{text},no,north" for i, text in enumerate(texts)]
    rawsets.write_lines(tmp_path / "rows.csv", ["scan,report,label,site", *lines])
    data = hospital(tmp_path, columns={key: value for key, value in COLUMNS.items() if key != "id"})
    assert data.load("train").notes == (
        "column 'report': 'see PACS' fills 6 of 12 cells; if it stands for a missing text, add it to data.na_values",
    )


def test_groups_stay_together_when_rows_are_held_out(tmp_path: Path) -> None:
    lines = [f"{i},{i}.png,x,no,north,p{i // 4}" for i in range(400)]
    rawsets.write_lines(tmp_path / "rows.csv", ["case,scan,report,label,site,patient", *lines])
    data = hospital(tmp_path, test_rate=0.3, validation_rate=0.2, group="patient")
    splits = [data.load(split).examples for split in ("train", "validation", "test")]
    patients = [{e.columns["patient"] for e in rows} for rows in splits]
    assert sum(map(len, splits)) == 400
    assert sum(map(len, patients)) == 100
    assert 15 <= len(patients[2]) <= 45  # 30 expected, standard deviation 4.6
    assert all(len(rows) == 4 * len(names) for rows, names in zip(splits, patients, strict=True))
    assert overlap(splits[0], splits[2], "patient") == ()


def test_overlap_names_equal_rows_pictures_and_groups() -> None:
    def row(number: int, path: str, patient: str) -> Example:
        return Example(number, {"image": (Path(path),)}, "?", (), "a", "w", {"patient": patient})

    train, test = [row(1, "a.png", "x"), row(2, "b.png", "y")], [row(3, "a.png", "z"), row(4, "c.png", "y")]
    assert overlap(train, test, "patient") == (
        "1 of 2 test rows are also training rows: 3",
        "1 of 2 test rows have a picture that is also in a training row: 3",
        "1 of 2 test rows have a 'patient' that is also in training rows: y",
    )


@pytest.mark.parametrize("head", ["", "sep=;\n"])
def test_semicolons_between_the_cells(tmp_path: Path, head: str) -> None:
    (tmp_path / "rows.csv").write_text(f'{head}case;scan;report;label;site\nH1;1.png;"a; b, c";no;north\n')
    (row,) = hospital(tmp_path).load("train").examples
    assert (row.id, row.fields["text"], row.columns["client"]) == ("H1", "a; b, c", "north")


def test_an_excel_workbook(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    workbook = openpyxl.Workbook()
    sheet = workbook.active
    for cells in (list(COLUMNS.values()), ["H1", "1.png", "NA", 1, "north"], [], ["H2", None, "b", 0, "south"]):
        sheet.append(cells)
    workbook.save(tmp_path / "rows.xlsx")
    one, two = hospital(tmp_path, train="rows.xlsx").load("train").examples
    assert (one.id, tuple(one.fields), one.answer) == ("H1", ("image",), "yes")
    assert (two.fields, two.answer, two.where.rpartition(":")[2]) == ({"text": "b"}, "no", "4")
    workbook.create_sheet("more").append(["x"])
    workbook.save(tmp_path / "rows.xlsx")
    with pytest.raises(DataError, match=r"rows.xlsx: several sheets have rows: Sheet, more; name one: data.sheet"):
        hospital(tmp_path, train="rows.xlsx").load("train")
    assert len(hospital(tmp_path, train="rows.xlsx", sheet="Sheet").load("train").examples) == 2
    sheet.append(["H3", "1.png", "#REF!", 0, "south"])
    workbook.save(tmp_path / "rows.xlsx")
    with pytest.raises(DataError, match=r"rows.xlsx:5: the cell in column 'report' holds Excel's error #REF!"):
        hospital(tmp_path, train="rows.xlsx", sheet="Sheet").load("train")
    (tmp_path / "rows.xlsx").write_text("no zip")
    with pytest.raises(DataError, match=r"rows.xlsx: not an Excel workbook"):
        hospital(tmp_path, train="rows.xlsx").load("train")


def test_test_rows_without_answers(tmp_path: Path) -> None:
    rawsets.write_lines(tmp_path / "new.csv", ["case,scan,report,site", "H9,1.png,x,north"])
    data = hospital(tmp_path, train="new.csv", test="new.csv", columns={**COLUMNS, "answer": ""})
    assert [(e.id, e.answer, e.columns["client"]) for e in data.load("test").examples] == [("H9", "", "north")]
    with pytest.raises(ConfigError, match=r"data.columns.answer: got \"\"; rows of the train split need answers"):
        data.load("train")


def test_one_way_to_name_test_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.test_rate: data.test is given too; keep one"):
        hospital(tmp_path, test="b.csv", test_rate=0.2)
    rawsets.write_lines(
        tmp_path / "rows.csv", ["case,scan,report,label,site,split", "1,1.png,x,no,a,train", "2,1.png,x,no,a,tset"]
    )
    with pytest.raises(DataError, match=r"row '2': 'split' is 'tset'; allowed: train"):
        hospital(tmp_path, test_column="split").load("train")


def test_later_settings_keep_the_run_id_of_a_table() -> None:
    settings = {"name": "table", "root": "r", "train": "a.csv", "columns": {"image": "scan"}}
    data = Dataset.pick(settings, "data")
    later = {"test_rate", "test_column", "group", "answers", "delimiter", "sheet", "na_values"}
    assert not later & data.identity().keys()
    assert Dataset.pick({**settings, "na_values": ["?"]}, "data").identity()["na_values"] == ["?"]


def test_vqa_rad_split_by_picture(shared: Path) -> None:
    root = shared / "data" / "vqa_rad"
    official = rawsets.dataset("vqa-rad", root)
    notes = overlap(official.load("train").examples, official.load("test").examples)
    assert any(note.startswith("446 of 451 test rows have a picture that is also in a training row") for note in notes)
    data = rawsets.dataset("vqa-rad", root, split="picture", validation_rate=0.1)
    splits = [data.load(split).examples for split in ("train", "validation", "test")]
    assert sum(map(len, splits)) == 1797 + 451
    assert overlap(splits[0], splits[2]) == overlap(splits[1], splits[2]) == overlap(splits[0], splits[1]) == ()
    assert 300 <= len(splits[2]) <= 600
    assert data.identity()["split"] == "picture"
    assert "test_rate" not in official.identity()
