"""The loaders of the published sets on made-up files with every fault that was seen or feared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedmllm.core.errors import DataError
from fedmllm.scenarios.assign import assign
from fedmllm.scenarios.masks import Missing
from fedmllm.scenarios.published import Published
from support import rawsets


def load(name: str, root: Path, split: str = "train", **settings):
    return rawsets.dataset(name, root, **settings).load(split)


def bad_hateful_memes(tmp_path: Path, **changes) -> None:
    rawsets.hateful_memes(tmp_path, 3)
    good = (tmp_path / "train.jsonl").read_text().splitlines()
    row = {k: v for k, v in {**json.loads(good[1]), **changes}.items() if v is not None}
    rawsets.write_lines(tmp_path / "train.jsonl", [good[0], json.dumps(row), good[2]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 2}, r"train.jsonl:2: row 1: 'label' is 2; allowed: 0, 1"),
        ({"label": None}, r"train.jsonl:2: row 1: no 'label'; the row has: id, img, text"),
        ({"id": 0}, r"train.jsonl:2: id 0 is already that of .*train.jsonl:1"),
        ({"id": None}, r"train.jsonl:2: no 'id'"),
        ({"id": [1]}, r"train.jsonl:2: 'id' is \[1\], neither a number nor a text"),
        ({"img": "../secret.png"}, r"train.jsonl:2: row 1: image '../secret.png' lies outside of .*; refused"),
        ({"img": "img/../../secret.png"}, r"train.jsonl:2: row 1: image .* lies outside"),
        ({"img": "/etc/passwd"}, r"train.jsonl:2: row 1: image '/etc/passwd' lies outside"),
        ({"img": ""}, r"train.jsonl:2: row 1: '' is not an image path"),
        ({"img": "a\0b"}, r"train.jsonl:2: row 1: 'a\\x00b' is not an image path"),
        ({"text": ["a"]}, r"train.jsonl:2: row 1: 'text' is \['a'\], not a text"),
    ],
)
def test_a_bad_row_fails_with_its_place_or_is_skipped_and_counted(tmp_path: Path, changes, message) -> None:
    bad_hateful_memes(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        load("hateful-memes", tmp_path)
    rows = load("hateful-memes", tmp_path, on_bad_row="skip")
    assert [e.id for e in rows.examples] == [0, 2]
    assert len(rows.skipped) == 1
    assert "train.jsonl:2" in rows.skipped[0]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"id": 1,', r"train.jsonl:2: not JSON: .* in column"),
        (b"[1, 2]", r"train.jsonl:2: a JSON object is expected, not \[1, 2\]"),
        (b'{"id": 1, "text": "caf\xe9"}', r"train.jsonl:2: not UTF-8: byte 0xe9 in column 23"),
    ],
)
def test_a_line_that_cannot_be_read(tmp_path: Path, raw: bytes, message: str) -> None:
    rawsets.hateful_memes(tmp_path, 2)
    first, second = (tmp_path / "train.jsonl").read_bytes().splitlines()
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + first + b"\r\n" + raw + b"\r\n\r\n" + second + b"\r\n")
    with pytest.raises(DataError, match=message):
        load("hateful-memes", tmp_path)
    rows = load("hateful-memes", tmp_path, on_bad_row="skip")
    assert [e.id for e in rows.examples] == [0, 1]
    assert len(rows.skipped) == 1


def test_if_no_row_can_be_used_skipping_fails_too(tmp_path: Path) -> None:
    rawsets.hateful_memes(tmp_path, 3, label=7)
    with pytest.raises(DataError, match=r"train.jsonl:1: .*none of 3 can be used"):
        load("hateful-memes", tmp_path, on_bad_row="skip")


def test_crisismmd_without_its_label_column(tmp_path: Path) -> None:
    columns = [name for name in rawsets.CRISIS_COLUMNS if name != "label_image"]
    rawsets.write_lines(rawsets.crisis_path(tmp_path), ["\t".join(columns), "\t".join("x" for _ in columns)])
    with pytest.raises(DataError, match=r"train.tsv:2: row 'x': no 'label_image'; the row has: event_name, "):
        load("crisismmd", tmp_path)


def test_crisismmd_with_an_unknown_label(tmp_path: Path) -> None:
    lines = ["\t".join(rawsets.CRISIS_COLUMNS), rawsets.crisis_row(0, "alien_damage")]
    rawsets.write_lines(rawsets.crisis_path(tmp_path), lines)
    with pytest.raises(DataError, match=r"tsv:2: row '900_0': 'label_image' is 'alien_damage'; allowed: affected"):
        load("crisismmd", tmp_path)


def test_an_empty_tsv(tmp_path: Path) -> None:
    rawsets.write_lines(rawsets.crisis_path(tmp_path), [])
    with pytest.raises(DataError, match=r"train.tsv:1: empty; a header line"):
        load("crisismmd", tmp_path)


def test_radiology_answers_that_are_numbers_and_types_with_blanks(tmp_path: Path) -> None:
    rows = [
        rawsets.radiology_row(0, answer=4, answer_type="OPEN "),
        rawsets.radiology_row(1, answer=" YES", answer_type="CLOSED "),
        rawsets.radiology_row(2, answer="both", answer_type="closed"),
    ]
    rawsets.write_json(tmp_path / "trainset.json", rows)
    four, yes, both = load("vqa-rad", tmp_path).examples
    assert (four.answer, four.columns["answer_type"]) == ("4", "OPEN")
    assert (yes.answer, yes.choices, yes.columns["answer_type"]) == ("yes", ("yes", "no"), "CLOSED")
    assert (both.answer, both.choices, both.columns["answer_type"]) == ("both", (), "CLOSED")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', r"trainset.json:1: a JSON list of rows is expected"),
        ('[\n{"qid": 1},\n{"qid"', r"trainset.json:3\[1\]: not JSON"),
        ('[\n{"qid": 1} {"qid": 2}]', r"trainset.json:2\[0\]: not JSON: ',' or '\]' is missing after this row"),
        ('[\n{"phrase_type": "para", "qid": null}]', r"trainset.json:2\[0\]: no 'qid'"),
        ('[\n{"phrase_type": "para", "qid": 5, "image_name": "a.jpg"}]', r"json:2\[0\]: row 5: no 'answer_type'"),
    ],
)
def test_a_broken_json_list_names_line_and_index(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "trainset.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load("vqa-rad", tmp_path)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"QA": {}}, r"nus.json: s0/f: a keyframe with 'QA' and 'image_paths' is expected"),
        ({"QA": {}, "image_paths": {"CAM_ROOF": "a.jpg"}}, r"s0/f: unknown camera 'CAM_ROOF'; allowed: CAM_FRONT"),
        ({"QA": {}, "image_paths": {"CAM_FRONT": "../../a.jpg"}}, r"s0/f: image '../../a.jpg' lies outside"),
        ({"QA": {"perception": ["x"]}, "image_paths": {}}, r"s0/f/perception\[0\]: an object with Q and A"),
        ({"QA": {"perception": [{"Q": "x"}]}, "image_paths": {}}, r"s0/f/perception\[0\]: no 'A'"),
    ],
)
def test_broken_keyframes(tmp_path: Path, frame, message: str) -> None:
    scenes = {f"s{i}": {"key_frames": {"f": frame}} for i in range(3)}
    rawsets.write_json(tmp_path / "v1_1_train_nus.json", scenes)
    with pytest.raises(DataError, match=message):
        load("drivelm", tmp_path, test_rate=1e-6)


@pytest.mark.parametrize("asked", ["none", {"0": {"Q": "?", "A": "x"}}, 5, True])
def test_drivelm_where_a_list_of_questions_is_none(tmp_path: Path, asked) -> None:
    good = {"prediction": [{"Q": "?", "A": "x"}]}
    frames = {f"f{i}": {"QA": {"perception": asked, **good}, "image_paths": {}} for i in range(2)}
    rawsets.write_json(tmp_path / "v1_1_train_nus.json", {"s": {"key_frames": frames}})
    with pytest.raises(DataError, match=r"nus.json: s/f0: QA.perception is .*, not a list"):
        load("drivelm", tmp_path, test_rate=1e-6)
    rows = load("drivelm", tmp_path, test_rate=1e-6, on_bad_row="skip")
    assert [e.id for e in rows.examples] == ["s/f0/prediction/0", "s/f1/prediction/0"]
    assert len(rows.skipped) == 2


@pytest.mark.parametrize(
    ("scenes", "message"),
    [
        ([], r"nus.json:1: an object of scenes is expected"),
        ({"\ud83d": {}}, r"nus.json: '\\ud83d' is half of a character"),
        ({"s": None}, r"nus.json: s/: no 'key_frames' in this scene"),
        ({"s": {"key_frames": []}}, r"nus.json: s/: no 'key_frames' in this scene"),
        ({"s": {"key_frames": {"f": None}}}, r"nus.json: s/f: a keyframe with 'QA' and 'image_paths'"),
        ({"s": {"key_frames": {"f": {"QA": {"planning": [{"Q": None}]}, "image_paths": {}}}}}, r"planning\[0\]: no 'Q'"),
        ({"s": {"key_frames": {"f": {"QA": {}, "image_paths": {"CAM_FRONT": 5}}}}}, r"s/f: 5 is not an image path"),
        ({}, r"nus.json: no rows for the train split"),
    ],
    ids=str,
)  # fmt: skip
def test_drivelm_with_values_of_other_types(tmp_path: Path, scenes, message: str) -> None:
    rawsets.write_json(tmp_path / "v1_1_train_nus.json", scenes)
    with pytest.raises(DataError, match=message):
        load("drivelm", tmp_path, test_rate=1e-6)


def test_drivelm_answers_that_are_numbers(tmp_path: Path) -> None:
    frame = {"QA": {"perception": [{"Q": "How many cars?", "A": 3}]}, "image_paths": {}}
    rawsets.write_json(tmp_path / "v1_1_train_nus.json", {"s": {"key_frames": {"f": frame}}})
    assert [e.answer for e in load("drivelm", tmp_path, test_rate=1e-6).examples] == ["3"]


def test_tweets_and_memes_without_words_are_rows_whose_text_is_empty(tmp_path: Path) -> None:
    """The published partition counts every row of the files, and its masks ask no row for its words."""
    rawsets.crisismmd(tmp_path / "crisismmd", 700)
    rawsets.hateful_memes(tmp_path / "hateful-memes", 850)
    for name, path, words, without in (
        ("crisismmd", rawsets.crisis_path(tmp_path / "crisismmd"), "so much water https://t.co/x", "https://t.co/x"),
        ("hateful-memes", tmp_path / "hateful-memes" / "train.jsonl", "some words 1", ""),
    ):
        data, shards = rawsets.dataset(name, tmp_path / name), []
        for _ in range(2):
            examples = data.load("train").examples
            shards.append(assign(examples, data.modalities(), Published(), Missing(rate=0.5), 0))
            path.write_text(path.read_text().replace(words, without))
        assert any(e.fields["text"] == "" for e in examples)
        assert shards[0] == shards[1]


@pytest.mark.parametrize("name", ["hateful-memes", "crisismmd", "vqa-rad", "slake", "flashcards"])
def test_a_split_without_rows_names_its_file(tmp_path: Path, name: str) -> None:
    files = {
        "hateful-memes": ("train.jsonl", ""),
        "crisismmd": ("task_humanitarian_text_img_train.tsv", "\t".join(rawsets.CRISIS_COLUMNS)),
        "vqa-rad": ("trainset.json", json.dumps([rawsets.radiology_row(1, phrase_type="frame")])),
        "slake": ("train.json", json.dumps([rawsets.slake_row(1, q_lang="zh")])),
        "flashcards": ("medical_meadow_wikidoc_medical_flashcards.json", "[]"),
    }
    file, content = files[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=rf"{file}: no rows for the train split"):
        load(name, tmp_path)


@pytest.mark.parametrize("number", [True, 1.5, None, " "])
def test_ids_that_are_none(tmp_path: Path, number) -> None:
    rawsets.write_json(tmp_path / "trainset.json", [rawsets.radiology_row(number)])
    rawsets.write_json(tmp_path / "train.json", [rawsets.slake_row(number)])
    rawsets.write_lines(tmp_path / "train.jsonl", [json.dumps({"id": number, "img": "a.png", "label": 0, "text": "x"})])
    for name in ("vqa-rad", "slake", "hateful-memes"):
        with pytest.raises(DataError, match=r"train.*1.*: ('q?id' is (True|1.5|' '), neither|no 'q?id')"):
            load(name, tmp_path)
