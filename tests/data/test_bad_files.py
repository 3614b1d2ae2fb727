"""Parquet files, conversations and image folders that are broken or unusual."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedmllm.core.errors import DataError
from support import rawsets
from support.tables import as_parquet, load, refused


def test_a_parquet_file_with_a_corrupt_body(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "a.parquet", {"scan": [f"{i}.png" for i in range(9000)], "answer": ["a"] * 9000})
    content = bytearray(path.read_bytes())
    content[100:2000] = bytes(1900)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.parquet\[0\]: cannot be read from here on: "):
        load(tmp_path, "a.parquet", on_bad_row="skip")


def test_parquet_values_that_python_has_not_are_bad_rows(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    ends = arrow.array([0, 1, 2, 3], arrow.int32()).buffers()[1]
    latin = arrow.Array.from_buffers(arrow.utf8(), 3, [None, ends, arrow.py_buffer(b"a\xffc")])
    as_parquet(tmp_path / "b.parquet", {"scan": ["1.png", "2.png", "3.png"], "answer": latin})
    content = (tmp_path / "b.parquet").read_bytes()
    refused(tmp_path, content, "parquet", r"a.parquet\[1\]: cannot be read: 'utf-8' codec can't decode byte 0xff")


@pytest.mark.parametrize("fault", ["", "PAR1", "cut"])
def test_no_parquet_file(tmp_path: Path, fault: str) -> None:
    path = as_parquet(tmp_path / "a.parquet", {"scan": ["1.png"], "answer": ["a"]})
    path.write_bytes(path.read_bytes()[:-30] if fault == "cut" else fault.encode())
    with pytest.raises(DataError, match=r"a.parquet: not a Parquet file"):
        load(tmp_path, "a.parquet")


def turns(*texts: Any) -> list[Any]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"conversations": "x"}, r"'conversations' is 'x', not a list of turns"),
        ({"conversations": {"a": 1}}, r"'conversations' is {'a': 1}, not a list of turns"),
        ({"conversations": turns(["x"], "a")}, r"a turn is {role, content} with a role of user, .*; got {'from': 'human'"),
        ({"conversations": [{"role": ["user"], "content": "x"}]}, r"a turn is {role, content}"),
        ({"conversations": turns(None, "a")}, r"a turn is"),
        ({"conversations": turns("?", "a"), "image": 5}, r"row 1: 5 is not an image path"),
        ({"conversations": turns("?", "a"), "image": [["b.png"]]}, r"row 1: \['b.png'\] is not an image path"),
        ({"conversations": turns("?", "a"), "image": "../b.png"}, r"row 1: image '../b.png' lies outside"),
        ({"conversations": turns("?", "a"), "id": {"a": 1}}, r"'id' is {'a': 1}, neither a number nor a text"),
        ({"question": 1, "choices": 5, "answer": "x"}, r"row 1: choices \('5',\); allowed"),
        ({"question": ["?"], "choices": [], "answer": "x"}, r"row 1: 'question' is \['\?'\], not a text"),
        ([], r"a JSON object is expected, not \[\]"),
    ],
    ids=str,
)  # fmt: skip
def test_conversations_with_values_of_other_types(tmp_path: Path, bad: Any, message: str) -> None:
    good = [{"image": f"{i}.png", "conversations": turns("?", "a")} for i in (1, 3)]
    content = json.dumps([good[0], bad, good[1]])
    refused(tmp_path, content, "json", rf"a.json:1\[1\]: {message}", columns={}, question="")


def test_turns_of_a_conversation_without_id_are_called_after_its_place(tmp_path: Path) -> None:
    rawsets.write_json(
        tmp_path / "a.json",
        [{"image": None, "conversations": turns("1?", "a", "2?", "b")}, {"conversations": turns("3?", "c")}],
    )
    examples = load(tmp_path, "a.json", columns={}).examples
    assert [(e.id, e.answer) for e in examples] == [(0, "a"), ("0#2", "b"), (1, "c")]


def test_a_json_list_names_the_line_that_is_not_utf8_and_may_have_a_mark_and_crlf(tmp_path: Path) -> None:
    lines = [b"[", json.dumps({"image": None, "conversations": turns("?", "a")}).encode(), b"]"]
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    assert [e.where.rpartition("/")[2] for e in load(tmp_path, "a.json", columns={}).examples] == ["a.json:2[0]"]
    (tmp_path / "a.json").write_bytes(b"\r\n".join([*lines[:2], b', {"id": "caf\xe9"}', *lines[2:]]))
    with pytest.raises(DataError, match=r"a.json:3: not UTF-8: byte 0xe9 in column 14"):
        load(tmp_path, "a.json", columns={})


def test_rows_after_the_end_of_a_json_list_are_not_lost_in_silence(tmp_path: Path) -> None:
    one = json.dumps([{"conversations": turns("?", "a")}])
    (tmp_path / "a.json").write_text(f"{one}\n{one}\n")
    with pytest.raises(DataError, match=r"a.json:2: nothing is expected after the end of the list, not "):
        load(tmp_path, "a.json", columns={})


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_metadata_of_an_imagefolder_may_not_leave_it(tmp_path: Path, ending: str) -> None:
    names, path = ["1.png", "../secret.png"], tmp_path / "train" / f"metadata.{ending}"
    path.parent.mkdir()
    if ending == "parquet":
        as_parquet(path, {"file_name": names, "answer": ["a", "b"]})
    elif ending == "csv":
        rawsets.write_lines(path, ["file_name,answer", *(f"{name},a" for name in names)])
    else:
        rawsets.write_lines(path, [json.dumps({"file_name": name, "answer": "a"}) for name in names])
    with pytest.raises(DataError, match=rf"metadata.{ending}.*image '../secret.png' lies outside of .*train; refused"):
        load(tmp_path, "train", columns={})
    assert len(load(tmp_path, "train", columns={}, on_bad_row="skip").examples) == 1
