"""A user's own rows in every form, with columns mapped in the TOML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedmllm.core.errors import ConfigError, DataError
from fedmllm.scenarios.assign import assign
from fedmllm.scenarios.masks import Aligned
from fedmllm.scenarios.partitions import ByColumn
from support import rawsets

COLUMNS = {"image": "scan", "text": "report", "answer": "label", "client": "site", "id": "case", "keep": ["machine"]}
ROWS = [
    {"case": "c1", "scan": "scans/1.png", "report": 'no "acute" find, ok', "label": "no", "site": "north", "machine": "A"},
    {"case": "c2", "scan": "", "report": "fracture of the wrist", "label": "yes", "site": "south", "machine": "B"},
    {"case": "c3", "scan": "scans/3.png", "report": "", "label": "yes", "site": "north", "machine": "A"},
]  # fmt: skip


def table(root: Path, train: str, columns: dict | None = None, **settings):
    settings = {"question": "Is there a fracture?", "choices": ["no", "yes"], **settings}
    return rawsets.dataset("table", root, train=train, columns=columns or COLUMNS, **settings)


def write(root: Path, form: str) -> str:
    names = list(ROWS[0])
    if form == "jsonl":
        rawsets.write_lines(root / "rows.jsonl", [json.dumps(row) for row in ROWS])
    elif form == "csv":
        quoted = [",".join('"' + str(v).replace('"', '""') + '"' for v in row.values()) for row in ROWS]
        rawsets.write_lines(root / "rows.csv", [",".join(names), *quoted], "\r\n", "\ufeff")
    elif form == "tsv":
        rawsets.write_lines(root / "rows.tsv", ["\t".join(names), *("\t".join(row.values()) for row in ROWS)])
    elif form == "json":
        rows = [{**row, "image": row["scan"], "question": "Q", "choices": ["no", "yes"], "answer": "x"} for row in ROWS]
        rawsets.write_json(root / "rows.json", rows)
    else:
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(ROWS), root / "rows.parquet")
    return f"rows.{form}"


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet"])
def test_the_same_rows_from_every_form(tmp_path: Path, form: str) -> None:
    data = table(tmp_path, write(tmp_path, form))
    one, two, three = data.load("train").examples
    assert [e.id for e in (one, two, three)] == ["c1", "c2", "c3"]
    assert one.fields == {"image": (tmp_path / "scans/1.png",), "text": 'no "acute" find, ok'}
    assert (two.fields.keys(), two.answer) == ({"text"}, "yes")
    assert three.fields.keys() == {"image"}
    assert one.columns == {"set": "table", "client": "north", "machine": "A"}
    assert one.choices == ("no", "yes")
    assert data.modalities() == ("image", "text")
    assert data.client_column() == "client"
    shards = assign(data.load("train").examples, data.modalities(), ByColumn(), Aligned(), 0)
    assert [s.rows for s in shards] == [(0, 2), (1,)]
    assert [s.visible for s in shards] == [({"image", "text"}, {"image"}), ({"text"},)]


def test_test_rows_keep_the_columns_that_they_have(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "site"} for row in ROWS]
    rows[2]["machine"] = ""
    rawsets.write_lines(tmp_path / "test.jsonl", [json.dumps(row) for row in rows])
    data = table(tmp_path, write(tmp_path, "jsonl"), test="test.jsonl")
    about = [e.columns for e in data.load("test").examples]
    assert about == [{"set": "table", "machine": "A"}, {"set": "table", "machine": "B"}, {"set": "table"}]


def test_columns_say_question_and_choices_for_single_rows(tmp_path: Path) -> None:
    lines = ["scan,question,choices,answer", "a.png,Which side?,left|right,left", "b.png,What is it?,,a cyst"]
    rawsets.write_lines(tmp_path / "a.csv", lines)
    one, two = rawsets.dataset("table", tmp_path, train="a.csv", columns={"image": "scan"}).load("train").examples
    assert (one.question, one.choices, one.answer) == ("Which side?", ("left", "right"), "left")
    assert (two.question, two.choices, two.answer) == ("What is it?", (), "a cyst")
    assert [one.id, two.id] == [2, 3]  # without ids a row is called after its line


def test_several_pictures_a_row_and_one_column_a_camera(tmp_path: Path) -> None:
    row = {"views": ["a.png", "b.png"], "front": "f.png", "back": None, "question": "?", "answer": "x"}
    rawsets.write_lines(tmp_path / "a.jsonl", [json.dumps(row)])
    (many,) = rawsets.dataset("table", tmp_path, train="a.jsonl", columns={"image": "views"}).load("train").examples
    assert many.fields == {"image": (tmp_path / "a.png", tmp_path / "b.png")}
    columns = {"image": {"CAM_FRONT": "front", "CAM_BACK": "back"}}
    data = rawsets.dataset("table", tmp_path, train="a.jsonl", columns=columns)
    assert data.modalities() == ("CAM_FRONT", "CAM_BACK")
    assert data.load("train").examples[0].fields == {"CAM_FRONT": (tmp_path / "f.png",)}


def test_an_imagefolder_with_metadata(tmp_path: Path) -> None:
    lines = ["file_name,caption,answer", "x/1.png,a cat,yes", "2.png,,no"]
    rawsets.write_lines(tmp_path / "train" / "metadata.csv", lines)
    data = table(tmp_path, "train", {"text": "caption"})
    one, two = data.load("train").examples
    assert data.modalities() == ("image", "text")
    assert one.fields == {"image": (tmp_path / "train/x/1.png",), "text": "a cat"}
    assert two.fields == {"image": (tmp_path / "train/2.png",)}


def test_an_imagefolder_with_a_subfolder_for_each_label(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/deep/2.JPG", "dog/1.jpeg", "dog/notes.txt"):
        rawsets.write_lines(tmp_path / "train" / name, [])
    data = rawsets.dataset("table", tmp_path, train="train", question="What is it?")
    examples = data.load("train").examples
    assert [e.id for e in examples] == ["cat/1.png", "cat/deep/2.JPG", "dog/1.jpeg"]
    assert [e.answer for e in examples] == ["cat", "cat", "dog"]
    assert examples[0].choices == ("cat", "dog")
    with pytest.raises(
        DataError,
        match=r"pictures without answers; allowed: one of metadata.jsonl, .* file_name and answer, or its pictures in two",
    ):
        rawsets.dataset("table", tmp_path, train="train/cat", question="?").load("train")


def test_llava_conversations(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A heart."},
        {"from": "human", "value": "Is it large?"},
        {"from": "gpt", "value": "No."},
    ]
    rows = [{"id": "a", "image": "1.jpg", "conversations": turns}, {"id": "b", "conversations": turns[2:]}]
    rawsets.write_json(tmp_path / "chat.json", rows)
    examples = rawsets.dataset("table", tmp_path, train="chat.json").load("train").examples
    assert [(e.id, e.question, e.answer) for e in examples] == [
        ("a", "What is it?", "A heart."), ("a#2", "Is it large?", "No."), ("b", "Is it large?", "No."),
    ]  # fmt: skip
    assert [e.fields for e in examples] == [{"image": (tmp_path / "1.jpg",)}] * 2 + [{}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1}, r"chat.json:1\[0\]: row 1: no 'conversations' with a turn of the user"),
        ({"conversations": [{"role": "user", "content": "?"}]}, r"json:1\[0\]: turn 0 of the user has no answer"),
        (
            {"conversations": [{"role": "robot", "content": "?"}]},
            r"json:1\[0\]: a turn is {role, content} with a role of",
        ),
        ({"conversations": ["?"]}, r"json:1\[0\]: a turn is"),
    ],
)
def test_broken_conversations(tmp_path: Path, row: dict, message: str) -> None:
    rawsets.write_json(tmp_path / "chat.json", [row])
    with pytest.raises(DataError, match=message):
        rawsets.dataset("table", tmp_path, train="chat.json").load("train")


def test_one_file_a_hospital(tmp_path: Path) -> None:
    for name in ("north", "site 10", "site 2"):
        rawsets.write_lines(tmp_path / f"{name}.csv", ["scan,answer", "1.png,no", "2.png,yes"])
    data = table(tmp_path, "*.csv", {"image": "scan", "client": "file"})
    examples = data.load("train").examples
    shards = assign(examples, data.modalities(), ByColumn(), Aligned(), 0)
    clients = [{examples[row].columns["client"] for row in s.rows} for s in shards]
    assert clients == [{"north"}, {"site 2"}, {"site 10"}]
    assert examples[0].id == "north-2"


def test_ids_that_stand_in_several_files_begin_with_the_name_of_their_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rawsets.write_lines(tmp_path / f"{name}.csv", ["id,scan,answer", "7,1.png,no", "8,1.png,no"])
    rows = table(tmp_path, "*.csv", {"image": "scan"}).load("train")
    assert [e.id for e in rows.examples] == ["a-7", "a-8", "b-7", "b-8"]
    assert "'7' stand in several files" in rows.notes[0]
    rawsets.write_lines(tmp_path / "b.csv", ["id,scan,answer", "9,1.png,no", "9,2.png,no"])
    with pytest.raises(DataError, match=r"b.csv:3: id '9' is already that of .*b.csv:2"):
        table(tmp_path, "*.csv", {"image": "scan"}).load("train")


def test_files_whose_names_differ_in_their_ending_are_two_clients(tmp_path: Path) -> None:
    rawsets.write_lines(tmp_path / "site.csv", ["scan,answer", "1.png,no"])
    rawsets.write_lines(tmp_path / "site.tsv", ["scan,answer", "2.png,no"])
    for folder in ("ward.1", "ward.2"):
        rawsets.write_lines(tmp_path / folder / "metadata.csv", ["file_name,answer", "1.png,no"])
    for form, pattern, names in (
        ("csv", "site.*", ["site.csv", "site.tsv"]),
        ("imagefolder", "ward.*", ["ward.1", "ward.2"]),
    ):
        image = "file_name" if form == "imagefolder" else "scan"
        data = table(tmp_path, pattern, {"image": image, "client": "file"}, form=form)
        assert [e.columns["client"] for e in data.load("train").examples] == names


def test_validation_of_its_own_or_held_out(tmp_path: Path) -> None:
    lines = [json.dumps({"id": i, "scan": f"{i}.png", "answer": "no"}) for i in range(200)]
    rawsets.write_lines(tmp_path / "a.jsonl", lines)
    rawsets.write_lines(tmp_path / "b.jsonl", lines[:3])
    held = table(tmp_path, "a.jsonl", {"image": "scan"}, validation_rate=0.3)
    train, validation = (held.load(split).examples for split in ("train", "validation"))
    assert {e.id for e in train} | {e.id for e in validation} == set(range(200))
    assert len(train) + len(validation) == 200
    assert 35 <= len(validation) <= 85
    own = table(tmp_path, "a.jsonl", {"image": "scan"}, validation="b.jsonl", validation_rate=0.3)
    assert (len(own.load("train").examples), len(own.load("validation").examples)) == (200, 3)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": "scna", "answer": "label"},
            r"rows.csv: no row has a column 'scna' \(data.columns.image\); columns: file, case, scan",
        ),
        ({"image": "scan", "answer": "lable"}, r"rows.csv:2: row 2: no 'lable'; the row has: file, case, scan"),
        ({"image": "scan", "answer": "label", "client": "ward"}, r"rows.csv:2: row 2: no 'ward'"),
        (
            {"image": "scan", "answer": "label", "choices": "options"},
            r"no row has a column 'options' \(data.columns.choices",
        ),
        ({"image": "scan", "answer": "label", "id": "number"}, r"rows.csv:2: 'number' is None, neither"),
        (
            {"image": "scan", "answer": "machine"},
            r"row 2: the answer 'A' is none of the choices 'no', 'yes', nor one of",
        ),
        ({"image": "report", "answer": "label", "text": "scan"}, None),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, columns: dict, message: str | None) -> None:
    data = table(tmp_path, write(tmp_path, "csv"), columns)
    if message is None:
        assert len(data.load("train").examples) == 3
        return
    with pytest.raises(DataError, match=message):
        data.load("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": {"answer": "x"}}, "data.columns: name the column of the images or texts"),
        ({"choices": ["a", "a"]}, "give two or more choices, each of them once"),
        ({"choices": ["a"]}, "give two or more choices"),
        ({"train": "rows.xls"}, "data.form: of which form is 'rows.xls'"),
        ({"columns": {"image": "scan", "lable": "x"}}, "data.columns.lable: unknown key"),
    ],
)
def test_settings_that_make_no_table(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rawsets.dataset("table", tmp_path, **{"train": "rows.csv", "columns": COLUMNS, **settings})


def test_a_split_that_is_not_named_or_leaves_the_root(tmp_path: Path) -> None:
    write(tmp_path, "csv")
    with pytest.raises(ConfigError, match=r"data\.test: missing"):
        table(tmp_path, "rows.csv").load("test")
    with pytest.raises(DataError, match="lies outside"):
        table(tmp_path / "inner", "../rows.csv").load("train")
    with pytest.raises(DataError, match=r"has none of others\.csv"):
        table(tmp_path, "others.csv").load("train")
    with pytest.raises(DataError, match="no file is called like"):
        table(tmp_path, "site_*.csv").load("train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a.csv:1: empty"),
        ("scan,answer\n1.png\n", r"a.csv:2: 1 columns; the header has 2"),
        ('scan,answer\n1.png,"no\n2.png,yes\n', r"a.csv:2: not csv: .*is a quote left open in this row\?"),
        ("scan,answer\n../1.png,no\n", r"a.csv:2: row 2: image '../1.png' lies outside"),
        ("scan,answer,choices\n1.png,a,a|a\n", r"a.csv:2: row 2: choices \('a', 'a'\); allowed: 2 to 26"),
    ],
)
def test_broken_csv(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        table(tmp_path, "a.csv", {"image": "scan"}).load("train")


def test_csv_fields_may_span_lines_and_rows_keep_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('scan,answer\n1.png,"two\nlines"\n2.png,x\n')
    data = rawsets.dataset("table", tmp_path, train="a.csv", question="?", columns={"image": "scan"})
    assert [(e.answer, e.where.rpartition(":")[2]) for e in data.load("train").examples] == [
        ("two\nlines", "2"),
        ("x", "4"),
    ]


def test_no_question_anywhere(tmp_path: Path) -> None:
    rawsets.write_lines(tmp_path / "a.csv", ["scan,answer", "1.png,no"])
    with pytest.raises(DataError, match=r"a.csv:2: row 2: no question: neither a column 'question' nor data.question"):
        table(tmp_path, "a.csv", {"image": "scan"}, question="").load("train")


def test_pictures_inside_a_parquet_file_are_refused(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"scan": {"bytes": b"x", "path": "a.png"}, "answer": "no"}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'scan' holds struct<.*; write the pictures to files"):
        table(tmp_path, "a.parquet", {"image": "scan"}).load("train")
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"b.parquet: not a Parquet file"):
        table(tmp_path, "b.parquet", {"image": "scan"}).load("train")
