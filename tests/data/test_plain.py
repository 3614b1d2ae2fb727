"""CSV files that are read column by column, against the readers of single rows."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

from fedmllm.core.errors import DataError
from fedmllm.data.delimited import csv_blocks, csv_rows
from support import rawsets

COLUMNS = {"image": {"front": "front", "back": "back"}, "text": "report", "answer": "label", "client": "site"}
CELLS = {
    "front": ["a.png", "b.png", "", "NA", " c.png ", "../x.png", "https://x/y.png"],
    "back": ["a.png", "", "d.png"],
    "report": ["clear", "a, b", 'the "shadow"', "-", "\u200b", " \u00e9 ", "long " * 9],
    "label": ["no", "yes", "No", "0", "1", "", "maybe"],
    "site": ["north", "s\u00fcd", "7", "7.0", " "],
    "question": ["", "Is it?", "What is <image>?", "Why <image_0> and <image_1>?", "<video>"],
    "choices": ["", "", "no|yes", "yes|no", "one"],
    "machine": ["A", "B", "NaN"],
}


def rows(seed: int, good: bool) -> list[dict[str, str]]:
    """Rows whose first cells are good; with `good`, cells come from the first ones alone."""
    rng = random.Random(seed)
    found = []
    for number in range(40):
        row = {name: rng.choice(cells[:3] if good or rng.random() < 0.9 else cells) for name, cells in CELLS.items()}
        row["label"], row["site"] = rng.choice(["no", "yes"]), row["site"].strip() or "x"
        if good:
            row |= {"question": row["question"].replace("<image>", "it"), "choices": ""}
            row["machine"] = "A"
        found.append({"id": f"r{number if good or rng.random() < 0.999 else 0}", **row})
    return found


def loaded(root: Path, name: str, table: list[dict[str, str]], **settings: object) -> object:
    with (root / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    lines = ["", *(json.dumps(row) for row in table)]  # so that a row is on the same line
    rawsets.write_lines(root / f"{name}.jsonl", lines)
    results = []
    for form in ("csv", "jsonl"):
        data = rawsets.dataset(
            "table", root, train=f"{name}.{form}", columns={**COLUMNS, "keep": ["machine"]}, **settings
        )
        try:
            found = data.load("train")
            text = repr((found.examples, found.skipped, found.notes))
        except DataError as error:
            text = str(error)
        results.append(text.replace(f"{name}.{form}", "FILE"))
    assert results[0] == results[1]
    return results[0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_columns_give_the_rows_that_single_rows_give(tmp_path: Path, seed: int, on_bad_row: str) -> None:
    settings = {"question": "Is it broken?", "choices": ["no", "yes"], "on_bad_row": on_bad_row}
    good = loaded(tmp_path, "good", rows(seed, True), **settings)
    assert "Example(" in str(good)
    loaded(tmp_path, "mixed", rows(seed, False), **settings)
    loaded(tmp_path, "silent", rows(seed, True), on_bad_row=on_bad_row)  # open questions, and no question of its own


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n\n3,4\n",
        "a,b\r\n1,2\r\n3,4",
        "\ufeffa;b\n1;2,0\n",
        'a,b\n1,"x\n\ny"\n3,4\n',
        "a,b\n1,x\ty\n  ,\n",
        'a,b\n1,"say ""no"""\n',
        "a\n1\n\n2\n",
        "a,\n1,2\n",
    ],
)
def test_blocks_have_the_rows_of_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(text.encode())
    found = [
        (f"{path}:{number}", dict(zip(header, row, strict=True)))
        for header, numbers, block in csv_blocks(path, "", 1)
        for number, row in zip(numbers, block, strict=True)
    ]
    assert found == list(csv_rows(path))


@pytest.mark.parametrize(
    "data",
    [
        b'a,b\n1,"x\n',
        b"a,b\n\xff,2\n",
        b"sep=;\na;b\n",
        b'a,b\n1,"x\r\ny"\n',
        b"a,b\n1,2\r3\n",
        b'a,b\n1,2\n"z"w,2\n',
    ],
)
def test_files_that_need_a_closer_look(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(ValueError, match=r"."):
        list(csv_blocks(tmp_path / "x.csv", "", 4))


@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_a_file_whose_first_rows_are_all_bad(tmp_path: Path, on_bad_row: str) -> None:
    bad = dict.fromkeys(CELLS, "") | {"front": "../x\0.png", "report": "", "label": "yes", "site": "x"}
    assert "../x" in str(loaded(tmp_path, "bad", [{"id": f"r{i}", **bad} for i in range(3)], on_bad_row=on_bad_row))
