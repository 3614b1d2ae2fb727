"""A user's own rows with everything that was seen to go wrong: named with file and line, or skipped and counted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedmllm.core.errors import ConfigError, DataError
from support import rawsets
from support.tables import COLUMNS, as_parquet, load, refused


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"2.png,caf\xe9\n", r"a.csv:3: not UTF-8: byte 0xe9 in column 10; convert"),
        (b'2.png,"two\nli\xe9nes"\n', r"a.csv:4: not UTF-8: byte 0xe9 in column 3"),
        (b'2.png,"b" x\n', r"a.csv:3: not csv: .*is a quote left open in this row\?"),
        (b'2.png,"left open\n', r"a.csv:3: not csv: .*is a quote left open in this row\?"),
        (b"2.png,b\rc\n", r"a.csv:3: not csv: a carriage return outside of quotes; lines end with LF or CRLF"),
        (b"2.png," + b"x" * 10_000_001 + b"\n", r"a.csv:3: not csv: a cell of more than 10,000,000 characters"),
        (b"2.png\n", r"a.csv:3: 1 columns; the header has 2"),
    ],
    ids=["not UTF-8", "not UTF-8 in quotes", "text after quotes", "left open", "CR", "huge", "short"],
)
def test_a_broken_csv_row_stops_no_other_row(tmp_path: Path, bad: bytes, message: str) -> None:
    refused(tmp_path, b'scan,answer\n1.png,a\n%b3.png,"c"\n' % bad, "csv", message)


def test_long_reports_and_several_broken_rows_in_one_csv(tmp_path: Path) -> None:
    """131,072 characters are the csv module's own limit."""
    content = b'scan,answer\n1.png,%b\n2.png,"open\n3.png,"two\nlines"\n4.png,"\xff"\n5.png,"open\n6.png,f\n' % (
        b"x" * 200_000
    )
    (tmp_path / "a.csv").write_bytes(content)
    rows = load(tmp_path, "a.csv", on_bad_row="skip")
    assert [(e.id, len(e.answer)) for e in rows.examples] == [(2, 200_000), (4, len("two\nlines")), (8, 1)]
    assert [message.partition("a.csv:")[2][:2] for message in rows.skipped] == ["3:", "6:", "7:"]


@pytest.mark.parametrize(("ending", "mark"), [("csv", ","), ("tsv", "\t")])
def test_a_name_that_is_twice_in_the_header(tmp_path: Path, ending: str, mark: str) -> None:
    rawsets.write_lines(tmp_path / f"a.{ending}", [mark.join(("scan", "answer", " scan")), mark.join("abc")])
    with pytest.raises(DataError, match=rf"a.{ending}:1: the column 'scan' stands in the header twice"):
        load(tmp_path, f"a.{ending}", on_bad_row="skip")
    rawsets.write_lines(
        tmp_path / f"b.{ending}", [mark.join(("scan", "answer", "", "")), mark.join(("1.png", "a", "", ""))]
    )
    assert [e.answer for e in load(tmp_path, f"b.{ending}").examples] == ["a"]


def test_a_column_that_is_twice_in_a_parquet_file(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    made = arrow.Table.from_arrays([arrow.array(["x"])] * 3, names=["scan", "scan", "answer"])
    parquet.write_table(made, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: the column 'scan' is there twice"):
        load(tmp_path, "a.parquet")


@pytest.mark.parametrize("cell", ["", "  "])
@pytest.mark.parametrize("columns", [{"client": "site"}, {"keep": ["site"]}])
def test_an_empty_client_or_group_is_a_bad_row(tmp_path: Path, cell: str, columns: dict) -> None:
    content = f"scan,answer,site\n1.png,a,x\n2.png,a,{cell}\n3.png,a,y\n"
    refused(tmp_path, content, "csv", r"a.csv:3: row 3: 'site' is empty", columns={**COLUMNS, **columns})


def test_an_empty_answer_is_a_bad_row_and_an_empty_question_is_that_of_all_rows(tmp_path: Path) -> None:
    refused(tmp_path, "scan,answer\n1.png,a\n2.png, \n3.png,b\n", "csv", r"a.csv:3: row 3: 'answer' is empty")
    rawsets.write_lines(tmp_path / "b.csv", ["scan,question,answer,text", "1.png,,a,  ", "2.png,Where?,b,here"])
    one, two = load(tmp_path, "b.csv", columns={**COLUMNS, "text": "text"}).examples
    assert (one.question, two.question) == ("?", "Where?")
    assert (one.fields.keys(), two.fields["text"]) == ({"image"}, "here")


def row(number: int, **cells: Any) -> str:
    return json.dumps({"scan": f"{number}.png", "answer": "a", **cells})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(2, id=True), r"'id' is True, neither a number nor a text"),
        (row(2, id=1.5), r"'id' is 1\.5, neither"),
        (row(2, id=float("nan")), r"'id' is nan, neither"),
        (row(2, id=" "), r"'id' is ' ', neither"),
        (row(2, id="\ud83d"), r"'\\ud83d' is half of a character"),
        (row(2, answer="\udc00 x"), r"'\\udc00' is half of a character"),
        (row(2, answer=float("nan")), r"row 2: 'answer' is nan, not a text"),
        (row(2, answer=float("-inf")), r"row 2: 'answer' is -inf, not a text"),
        ('{"scan": "2.png", "answer": 1e400}', r"row 2: 'answer' is inf, not a text"),
        (row(2, choices=["a", None]), r"row 2: 'choices' is None, not a text"),
        (row(2, choices=["a", " "]), r"row 2: choices \('a', ''\); allowed: 2 to 26, each of them once, none empty"),
        (row(2, choices={"a": 1}), r"row 2: 'choices' is {'a': 1}, not a text"),
        ('{"scan": "2.png", "answer": ' + "1" * 5000 + "}", r"not JSON of a row: Exceeds the limit"),
        ('{"scan": ' + "[" * 100_000, r"not JSON of a row: .*recursion"),
    ],
    ids=lambda text: text[:40],
)
def test_json_values_that_are_no_text(tmp_path: Path, bad: str, message: str) -> None:
    refused(tmp_path, f"{row(1)}\n{bad}\n{row(3)}\n", "jsonl", rf"a.jsonl:2: {message}", validation_rate=1e-6)


def test_values_that_no_column_maps_may_be_anything(tmp_path: Path) -> None:
    rawsets.write_lines(tmp_path / "a.jsonl", [row(1, age=float("nan"), smile="\U0001f600")])
    assert len(load(tmp_path, "a.jsonl").examples) == 1


def test_whole_numbers_may_come_as_floats(tmp_path: Path) -> None:
    """pandas makes floats of a column of whole numbers with a gap, in Parquet as in csv."""
    cells = {
        "scan": ["1.png", "2.png", "3.png"],
        "id": [7.0, 8.0, 9.0],
        "answer": [1.0, 0.0, 1.0],
        "site": [1.0, 2.0, 1.0],
    }
    as_parquet(tmp_path / "a.parquet", cells)
    columns = {**COLUMNS, "client": "site"}
    for choices, want in ((["1", "0"], ["1", "0", "1"]), (["no", "yes"], ["yes", "no", "yes"])):
        examples = load(tmp_path, "a.parquet", columns=columns, choices=choices).examples
        assert [e.answer for e in examples] == want
        assert [(e.id, e.columns["client"]) for e in examples] == [(7, "1"), (8, "2"), (9, "1")]
        rawsets.write_lines(
            tmp_path / "a.csv", ["scan,answer", *(f"{i}.png,{v}" for i, v in enumerate(cells["answer"]))]
        )
        assert [e.answer for e in load(tmp_path, "a.csv", choices=choices).examples] == want


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "client_*.json"])
def test_a_split_without_rows_names_its_file(tmp_path: Path, name: str) -> None:
    if name == "a.parquet":
        as_parquet(tmp_path / name, {"scan": [], "answer": []})
    empty = {
        "a.csv": "scan,answer\n",
        "a.tsv": "scan\tanswer\n",
        "a.jsonl": "\n",
        "a.json": "[]",
        "client_*.json": "[]",
    }
    if name in empty:
        (tmp_path / name.replace("*", "1")).write_text(empty[name])
    for split in ("train", "test"):
        with pytest.raises(DataError, match=rf"{name[:6]}.*: no rows for the {split} split"):
            load(tmp_path, name, split, test=name)
    assert load(tmp_path, name, "validation").examples == ()


def test_names_with_brackets_are_names_before_they_are_patterns(tmp_path: Path) -> None:
    for name in ("scans [2024]/metadata.csv", "site[1].csv", "site1.csv", "site2.csv"):
        rawsets.write_lines(tmp_path / name, ["scan,file_name,answer", f"{name[:5]}.png,1.png,{name}"])
    (one,) = load(tmp_path, "scans [2024]", columns={}).examples
    assert one.fields["image"] == (tmp_path / "scans [2024]" / "1.png",)
    assert [e.answer for e in load(tmp_path, "site[1].csv").examples] == ["site[1].csv"]
    assert [e.answer for e in load(tmp_path, "site[0-9].csv").examples] == ["site1.csv", "site2.csv"]


@pytest.mark.parametrize("name", ["x" * 300 + ".csv", "x" * 300 + "*.csv", "a\0.csv", "a.csv/b.csv"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.csv").write_text("scan,answer\n")
    with pytest.raises(DataError, match=r"has none of|no file is called like"):
        load(tmp_path, name)


def test_patterns_that_are_none_and_folders_in_the_place_of_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'a\*\*.csv' is not a pattern of files below"):
        load(tmp_path, "a**.csv")
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(DataError, match=r"a.csv: cannot be read: Is a directory"):
        load(tmp_path, "a.csv")
    with pytest.raises(ConfigError, match=r"data.separator: got ''"):
        load(tmp_path, "a.csv", separator="")


def test_an_image_path_that_no_file_can_have_is_a_bad_row_with_a_short_message(tmp_path: Path) -> None:
    for cell in ("x" * 5000, "data:image/png;base64,iVBORw0KGgo=", "https://example.org/1.png"):
        content = f'scan,answer\n1.png,a\n"{cell}",a\n3.png,b\n'
        refused(tmp_path, content, "csv", r"a.csv:3: row 3: '.{9,60}'(\.\.\.)? (has .* characters|is an address)")


def test_files_of_one_name_in_two_folders_are_two_clients(tmp_path: Path) -> None:
    for ward in ("north", "south"):
        rawsets.write_lines(tmp_path / ward / "rows.csv", ["scan,answer", "1.png,a"])
    examples = load(tmp_path, "*/rows.csv", columns={**COLUMNS, "client": "file"}).examples
    assert [(e.id, e.columns["client"]) for e in examples] == [
        ("north/rows-2", "north/rows"),
        ("south/rows-2", "south/rows"),
    ]


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes on POSIX systems only")
def test_names_of_files_that_are_not_utf8(tmp_path: Path) -> None:
    for label, name in ((b"cat", b"1\xff.png"), (b"dog", b"2.png")):
        (tmp_path / "train" / label.decode()).mkdir(parents=True)
        Path(os.fsdecode(os.fsencode(tmp_path / "train") + b"/" + label + b"/" + name)).touch()
    with pytest.raises(DataError, match=r"the name of the file 'cat/1\\udcff.png' is not UTF-8; rename it"):
        load(tmp_path, "train", columns={})
