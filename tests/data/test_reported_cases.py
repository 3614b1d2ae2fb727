"""Situations from public bug reports (../shared/cases/data), each with its right result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.images import open_image
from fedmllm.core.types import Example, Picture
from fedmllm.data.base import Rows
from fedmllm.data.cells import alike
from fedmllm.data.overlap import overlap
from fedmllm.data.pictures import check_rows
from fedmllm.data.prompts import Agnostic, FromFile, Plain
from fedmllm.runs.run import run
from support import rawsets
from support.tables import as_parquet
from support.tiny_families import write

IMAGE = frozenset({"image"})


@pytest.fixture
def case(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`case("05", "train", **settings of data)`: the rows of that case's experiment, loaded in a copy of its folder."""

    def load(number: str, split: str = "train", **settings: Any) -> Rows:
        (source,) = (shared / "cases" / "data").glob(f"{number}-*")
        folder = tmp_path / source.name
        if not folder.is_dir():
            shutil.copytree(source, folder)
        monkeypatch.chdir(folder)
        overrides = [f"data.{key}={json.dumps(value)}" for key, value in settings.items()]
        return Experiment.load("e.toml", overrides).data.load(split)

    return load


# --- pictures that a text asks for


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("images_key", r"images_key.json:2\[0\]: row '0': the text asks for 1 picture \(<image>\), the row's 'image' has 0; "
                       r"keys there: id, images, conversations"),
        ("img_tag", r"img_tag.json:2\[0\]: row '0': the text holds '<img>0.png</img>', which is not read; write <image>"),
        ("mark_without_image", r"row '0': the text asks for 1 picture .*'image' has 0; keys there: id, conversations"),
        ("video", r"video.json:2\[0\]: row '0': 'video' is not read"),
    ],
)  # fmt: skip
def test_a_conversation_that_asks_for_a_picture_that_it_does_not_have(case: Any, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        case("01", train=f"{name}.json")


def test_images_under_another_key_can_be_mapped(case: Any) -> None:
    rows = case("01", train="images_key.json", **{"columns.image": "images"})
    assert [(e.fields["image"][0].name, e.question) for e in rows.examples] == [(f"{i}.png", "What?") for i in range(4)]


def test_conversations_without_marks_and_without_an_image_column_are_an_error(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "cat"}]
    rawsets.write_json(tmp_path / "a.json", [{"id": 1, "images": ["0.png"], "conversations": turns}])
    with pytest.raises(
        DataError, match=r"row 1: 'images' is not read; pictures are those of image \(data.columns.image\)"
    ):
        rawsets.dataset("table", tmp_path, train="a.json").load("train")


def test_numbers_of_marks_and_pictures_that_differ(case: Any) -> None:
    with pytest.raises(DataError, match=r"row '1': the text asks for 2 pictures \(<image>\), the row's 'image' has 1"):
        case("02")
    with pytest.raises(DataError, match=r"none of 2 can be used"):
        case("02", on_bad_row="skip")


def test_marks_keep_picture_and_place(case: Any) -> None:
    one, two, named, middle = case("03").examples
    assert [[p.name for p in e.fields["image"]] for e in (one, two, named, middle)] == [
        ["0.png"], ["1.png"], ["0.png", "1.png"], ["0.png", "1.png"],
    ]  # fmt: skip
    assert (one.question, one.pieces, two.question) == ("First picture?", (), "Second picture?")
    assert named.pieces == ("Before ", " after ", " grown?")
    parts = Plain().render(middle, IMAGE).parts
    assert [p.path.name if isinstance(p, Picture) else p for p in parts] == [
        "Ref: ", "0.png", "\nQuery: ", "1.png", "\nSame?",
    ]  # fmt: skip
    assert Plain().render(middle, frozenset()).parts == ("Ref: \nQuery: \nSame?",)


def test_interleaved_pictures_in_every_wording() -> None:
    paths = (Path("a.png"), Path("b.png"))
    row = Example(1, {"image": paths}, "Is  like ?", ("no", "yes"), "no", "w", {}, ("Is ", " like ", "?"))
    for prompt in (Plain(), Agnostic(), FromFile(wording="Look. {images}\n{question}\n{options}")):
        parts = prompt.render(row, IMAGE).parts
        assert [p.path for p in parts if isinstance(p, Picture)] == list(paths)
        start = parts.index(Picture(paths[0]))
        assert str(parts[start - 1]).endswith("Is ")
        assert parts[start + 1 : start + 3] == (" like ", Picture(paths[1]))
        assert "(B) yes" in str(parts[-1])
    assert Agnostic().render(row, IMAGE).text.count("without considering the modality") == 2


def test_a_turn_without_marks_gets_the_pictures_before_it(tmp_path: Path) -> None:
    texts = ["<image>\nFirst?", "a", "<image>\nSecond?", "b", "Which is larger?", "c"]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    rawsets.write_json(tmp_path / "a.json", [{"image": ["1.png", "2.png"], "conversations": turns}])
    rows = rawsets.dataset("table", tmp_path, train="a.json").load("train").examples
    assert [[p.name for p in e.fields["image"]] for e in rows] == [["1.png"], ["2.png"], ["1.png", "2.png"]]


@pytest.mark.parametrize(
    ("cell", "text", "names"),
    [
        (["0.png", "1.png"], "<image_02> then <image_01>", ["1.png", "0.png"]),
        ({"image_0": "0.png"}, "<image_0> and <image_0>", ["0.png", "0.png"]),
        (["0.png", "1.png"], "<image_1> only", None),
        (["0.png"], "<image> and <image_1>", None),
        ([], "<image> here", None),
        (["0.png"], "play <audio>", None),
    ],
)
def test_marks_of_questions_in_other_forms(tmp_path: Path, cell: Any, text: str, names: list[str] | None) -> None:
    rawsets.write_lines(tmp_path / "a.jsonl", [json.dumps({"scan": cell, "question": text, "answer": "x"})])
    data = rawsets.dataset("table", tmp_path, train="a.jsonl", columns={"image": "scan"})
    if names is None:
        with pytest.raises(DataError, match=r"a.jsonl:1: row 1: the text (asks for|holds)"):
            data.load("train")
    else:
        assert [p.name for p in data.load("train").examples[0].fields["image"]] == names


@pytest.mark.parametrize(
    "text",
    ["<img>", '<img src="0.png">', "![scan](0.png)", "< image >", "<image/>", "<image_soft_token>", "<|vision_start|>",
     "<|image_pad|>", "<IMG_CONTEXT>", "<|image|>"],
)  # fmt: skip
def test_pictures_in_the_spelling_of_others_are_bad_rows(tmp_path: Path, text: str) -> None:
    """They were read as text: a picture in the middle went to the front, and without an image column it was lost."""
    turns = [{"from": "human", "value": f"Is {text} normal?"}, {"from": "gpt", "value": "no"}]
    rawsets.write_json(tmp_path / "a.json", [{"image": "0.png", "conversations": turns}])
    with pytest.raises(DataError, match=r"a.json:1\[0\]: the text holds '.*', which is not read; write <image>"):
        rawsets.dataset("table", tmp_path, train="a.json").load("train")


@pytest.mark.parametrize(
    ("row", "turn", "message"),
    [
        ({"image": "0.png", "images": ["1.png"]}, {}, "'images' is not read; pictures are those of image"),
        ({"images": ["1.png"]}, {}, "'images' is not read; pictures are those of image"),
        ({"image": "0.png"}, {"image": "1.png"}, "a turn has 'image', which is not read"),
        ({"image": "0.png"}, {"video": "1.mp4"}, "a turn has 'video', which is not read"),
    ],
)
def test_pictures_in_two_places_of_a_conversation_are_bad_rows(
    tmp_path: Path, row: Any, turn: Any, message: str
) -> None:
    turns = [{"from": "human", "value": "What?", **turn}, {"from": "gpt", "value": "a"}]
    good = {"image": "2.png", "conversations": [{"from": "human", "value": "What?"}, turns[1]]}
    rawsets.write_json(tmp_path / "a.json", [good, {**row, "conversations": turns}])
    rows = rawsets.dataset("table", tmp_path, train="a.json", on_bad_row="skip").load("train")
    assert len(rows.examples) == 1
    assert message in rows.skipped[0]


def test_a_question_for_all_rows_holds_no_mark(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.question: holds <image>; leave it out"):
        rawsets.dataset("table", tmp_path, train="a.csv", columns={"image": "scan"}, question="<image>\nWhat?")


# --- image folders


def test_choices_are_the_same_in_all_folders(case: Any) -> None:
    for split in ("train", "test"):
        rows = case("05", split)
        assert {e.choices for e in rows.examples} == {("cat", "dog", "fox")}
        assert {e.answer for e in rows.examples if "fox" in str(e.id)} == {"fox"}
    assert {e.choices for e in case("05", "test", choices=[]).examples} == {
        ("cat", "dog", "fox")
    }  # of the training folders
    with pytest.raises(DataError, match=r"the answer 'fox' is none of the choices 'cat', 'dog'"):
        case("05", choices=["cat", "dog"])


def test_labels_in_two_unicode_forms_are_one(tmp_path: Path) -> None:
    for path in ("a/caf\u00e9/1.png", "a/bar/2.png", "b/cafe\u0301/3.png"):
        rawsets.write_lines(tmp_path / path, [])
    rows = rawsets.dataset("table", tmp_path, train="?", form="imagefolder", question="?").load("train")
    assert {e.choices for e in rows.examples} == {("bar", "caf\u00e9")}


def test_hidden_files_are_left_out_counted_and_named(case: Any) -> None:
    rows = case("06")
    assert [(e.id, e.answer) for e in rows.examples] == [("cat/1.png", "cat"), ("dog/1.png", "dog")]
    assert {e.choices for e in rows.examples} == {("cat", "dog")}
    (note,) = rows.notes
    assert note.startswith(
        "train: 4 files left out (hidden): .ipynb_checkpoints/1-checkpoint.png, __MACOSX/cat/._1.png"
    )


def test_images_of_every_type_and_other_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("cat/1.avif", "cat/2.jp2", "dog/3.jfif", "dog/a.dcm", "4.png"):
        rawsets.write_lines(tmp_path / "train" / name, [])
    data = rawsets.dataset("table", tmp_path, train="train", question="?", on_bad_row="skip")
    rows = data.load("train")
    assert [e.id for e in rows.examples] == ["cat/1.avif", "cat/2.jp2", "dog/3.jfif"]
    assert rows.skipped[0].endswith("4.png: an image without a label: it lies in no subfolder")
    assert "1 file left out (neither images nor metadata): dog/a.dcm" in rows.notes[0]


def test_metadata_in_subfolders_and_in_other_case_is_read(case: Any) -> None:
    rows = case("07")
    assert [(e.answer, str(e.fields["image"][0])) for e in rows.examples] == [
        ("yes", "train/siteA/1.png"), ("no", "train/siteB/1.png"),
    ]  # fmt: skip
    assert [e.answer for e in case("07", train="other").examples] == ["A", "B"]
    with pytest.raises(DataError, match=r"parent/metadata.csv: is not read, since it lies above parent/train"):
        case("07", train="parent/train")


def test_folder_names_are_no_answers_if_an_answer_column_or_two_metadata_files_are_given(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        rawsets.write_lines(tmp_path / "train" / name, [])
    data = rawsets.dataset("table", tmp_path, train="train", question="?", columns={"answer": "label"})
    with pytest.raises(
        DataError,
        match=r"train: .* has none of metadata.jsonl, .* no column 'label' .* file_name and label, or a subfolder",
    ):
        data.load("train")
    rawsets.write_lines(tmp_path / "train" / "metadata.csv", ["file_name,label", "cat/1.png,A"])
    rows = data.load("train")
    assert ([e.answer for e in rows.examples], len(rows.notes)) == (["A"], 1)
    assert "1 images are in no metadata file: dog/1.png" in rows.notes[0]
    rawsets.write_lines(tmp_path / "train" / "dog" / "metadata.tsv", ["file_name\tlabel", "1.png\tB"])
    with pytest.raises(
        DataError, match=r"dog/metadata.tsv: metadata is not read in this form; allowed: metadata.jsonl"
    ):
        data.load("train")
    (tmp_path / "train" / "dog" / "metadata.tsv").unlink()
    rawsets.write_lines(tmp_path / "train" / "metadata.jsonl", ["{}"])
    with pytest.raises(DataError, match=r"metadata.csv: stands next to metadata.jsonl; keep one"):
        data.load("train")


# --- answers


def test_numbers_as_choices_have_one_meaning_per_column(case: Any) -> None:
    assert [e.answer for e in case("10").examples[:5]] == ["1", "2", "3", "4", "5"]
    assert [e.answer for e in case("10", choices=["0", "1", "2", "3", "4"]).examples[:5]] == ["0", "1", "2", "3", "4"]
    with pytest.raises(DataError, match=r"row '0': the answer '0' is none of the choices"):
        case("10", answers="words")


@pytest.mark.parametrize(
    ("choices", "train", "test", "want"),
    [
        (["1", "2", "3"], ["0", "1", "2"], ["1"], "2"),  # numbers in training: numbers in the test, too
        (["1", "2", "3"], ["1", "2", "3"], ["1"], "1"),
        (["2", "4", "6"], ["1"], ["1"], "4"),
        (["no", "yes"], ["1", "0"], ["1"], "yes"),
        (["no", "yes"], ["1", "no"], ["1"], None),
        (["1", "2", "3"], ["0", "3"], ["0"], None),
    ],
)
def test_readings_of_an_answer_column(
    tmp_path: Path, choices: list[str], train: list[str], test: list[str], want: str | None
) -> None:
    for name, answers in (("train", train), ("test", test)):
        rawsets.write_lines(tmp_path / f"{name}.csv", ["scan,answer", *(f"1.png,{a}" for a in answers)])
    columns = {"image": "scan"}
    data = rawsets.dataset(
        "table", tmp_path, train="train.csv", test="test.csv", question="?", columns=columns, choices=choices
    )
    if want is None:
        with pytest.raises(DataError, match=r"by its number only, but .* by its words only; .*data.answers"):
            data.load("train")
    else:
        assert [e.answer for e in data.load("test").examples] == [want]


def test_alike_choices_are_refused(tmp_path: Path) -> None:
    rawsets.write_lines(tmp_path / "a.csv", ["scan,choices,answer", "1.png,caf\u00e9|cafe\u0301,x"])
    with pytest.raises(DataError, match=r"row 2: choices .*; allowed: 2 to 26, each of them once"):
        rawsets.dataset("table", tmp_path, train="a.csv", question="?", columns={"image": "scan"}).load("train")


@pytest.mark.parametrize(
    ("options", "answer", "want"),
    [
        ("B. left A. right", "A", (("right", "left"), "right")),
        ("A. lane B. then stop B. right", "A", None),
        ("A. left C. right", "A", None),
        ("A. left B. left", "B", None),
        ("A. vitamin A. B. iron", "A", None),
    ],
)
def test_options_of_drivelm(
    tmp_path: Path, options: str, answer: str, want: tuple[tuple[str, ...], str] | None
) -> None:
    question = f"Where? Please select the correct answer from the following options: {options}"
    frame = {"QA": {"behavior": [{"Q": question, "A": answer}]}, "image_paths": {}}
    rawsets.write_json(tmp_path / "v1_1_train_nus.json", {"s": {"key_frames": {"f": frame}}})
    data = rawsets.dataset("drivelm", tmp_path, test_rate=1e-6)
    if want is None:
        with pytest.raises(DataError, match=r"behavior\[0\]: options .*; expected: A, B, ..., each once"):
            data.load("train")
    else:
        (row,) = data.load("train").examples
        assert (row.choices, row.answer) == want


def test_empty_answers_are_bad_rows_in_every_set(case: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t.json:2\[0\]: row '0': 'answer' is empty"):
        case("14")
    rawsets.write_json(tmp_path / "trainset.json", [rawsets.radiology_row(1, answer=" ")])
    rawsets.write_json(tmp_path / "train.json", [rawsets.slake_row(1, answer="")])
    cards = [{"instruction": "", "input": "What?", "output": "\n"}]
    rawsets.write_json(tmp_path / "medical_meadow_wikidoc_medical_flashcards.json", cards)
    frame = {"QA": {"planning": [{"Q": "What?", "A": ""}]}, "image_paths": {}}
    rawsets.write_json(tmp_path / "v1_1_train_nus.json", {"s": {"key_frames": {"f": frame}}})
    for name, settings in (("vqa-rad", {}), ("slake", {}), ("flashcards", {}), ("drivelm", {"test_rate": 1e-6})):
        with pytest.raises(DataError, match=r"'(answer|output|A)' is empty"):
            rawsets.dataset(name, tmp_path, **settings).load("train")


def test_choices_that_look_equal_are_refused() -> None:
    assert not alike(("New York", "York", "yes", "Yes"))
    for other in ("New\u00a0York", "New\u200b York", "\ufeffNew York"):
        assert alike(("New York", other))


def test_ids_that_look_equal_are_one(tmp_path: Path) -> None:
    settings = {"question": "?", "columns": {"text": "note"}}
    for first, second in ((1, "1"), ("a", "a "), ("\u00e9", "e\u0301")):
        rows = [{"id": number, "note": "x", "answer": "yes"} for number in (first, second)]
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(DataError, match=r"t.jsonl:2: id .* is already that of .*t.jsonl:1"):
            rawsets.dataset("table", tmp_path, train="t.jsonl", **settings).load("train")
        for name, row in zip(("s1", "s2"), rows, strict=True):
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        loaded = rawsets.dataset("table", tmp_path, train="s*.jsonl", **settings).load("train")
        assert [str(row.id)[:3] for row in loaded.examples] == ["s1-", "s2-"]


def test_blank_questions_are_bad_rows(tmp_path: Path) -> None:
    rawsets.write_json(tmp_path / "trainset.json", [rawsets.radiology_row(1, question=" ")])
    rawsets.write_json(tmp_path / "train.json", [rawsets.slake_row(1, question="\u200b")])
    cards = [{"instruction": "", "input": "\n", "output": "x"}]
    rawsets.write_json(tmp_path / "medical_meadow_wikidoc_medical_flashcards.json", cards)
    for name in ("vqa-rad", "slake", "flashcards"):
        with pytest.raises(DataError, match=r"'(question|input)' is empty"):
            rawsets.dataset(name, tmp_path).load("train")


def test_rows_of_an_unknown_kind_are_bad_and_not_left_out(tmp_path: Path) -> None:
    rawsets.write_json(tmp_path / "trainset.json", [rawsets.radiology_row(1, phrase_type="free form")])
    rawsets.write_json(tmp_path / "train.json", [rawsets.slake_row(1, q_lang="fr")])
    for name, word in (
        ("vqa-rad", "'phrase_type' is 'free form'; allowed: freeform, "),
        ("slake", "'q_lang' is 'fr'; allowed: en"),
    ):
        with pytest.raises(DataError, match=word):
            rawsets.dataset(name, tmp_path).load("train")
    rawsets.write_json(tmp_path / "trainset.json", [rawsets.radiology_row(1, phrase_type="Freeform")])
    rawsets.write_json(tmp_path / "train.json", [rawsets.slake_row(1, q_lang="EN")])
    assert [len(rawsets.dataset(name, tmp_path).load("train").examples) for name in ("vqa-rad", "slake")] == [1, 1]


def test_a_letter_without_options_is_a_bad_row(tmp_path: Path) -> None:
    frame = {"QA": {"planning": [{"Q": "Which? Options: A. left B. right", "A": "B"}]}, "image_paths": {}}
    rawsets.write_json(tmp_path / "v1_1_train_nus.json", {"s": {"key_frames": {"f": frame}}})
    with pytest.raises(DataError, match=r"the answer 'B' is an option's letter; options come after 'Please select"):
        rawsets.dataset("drivelm", tmp_path, test_rate=1e-6).load("train")


def test_a_picture_by_another_path_is_the_same_in_training_and_test(tmp_path: Path) -> None:
    for name, path in (("train", "p.png"), ("test", "x/../p.png")):
        (tmp_path / f"{name}.csv").write_text(f"scan,answer\n{path},yes\n")
    files = {"train": "train.csv", "test": "test.csv"}
    data = rawsets.dataset("table", tmp_path, question="?", columns={"image": "scan"}, **files)
    notes = overlap(data.load("train").examples, data.load("test").examples)
    assert any("have a picture that is also in a training row" in note for note in notes)


@pytest.mark.parametrize("nothing", ["\u200b", " \ufeff", "\u00a0", "\u3000\u200d\u2060"])
def test_what_cannot_be_seen_is_empty_in_every_set(nothing: str, tmp_path: Path) -> None:
    rows = [
        {"id": 1, "image": "1.png", "note": nothing, "answer": "yes"},
        {"id": 2, "image": "2.png", "answer": nothing},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"image": "image", "text": "note"}
    table = rawsets.dataset("table", tmp_path, train="t.jsonl", question="?", columns=columns, on_bad_row="skip")
    loaded = table.load("train")
    assert [list(row.fields) for row in loaded.examples] == [["image"]]  # the text is missing
    assert len(loaded.skipped) == 1
    assert "'answer' is empty" in loaded.skipped[0]
    rawsets.write_json(tmp_path / "trainset.json", [rawsets.radiology_row(1, answer=nothing)])
    frame = {"QA": {"planning": [{"Q": "What?", "A": nothing}]}, "image_paths": {}}
    rawsets.write_json(tmp_path / "v1_1_train_nus.json", {"s": {"key_frames": {"f": frame}}})
    for name, settings in (("vqa-rad", {}), ("drivelm", {"test_rate": 1e-6})):
        with pytest.raises(DataError, match=r"'(answer|A)' is empty"):
            rawsets.dataset(name, tmp_path, **settings).load("train")


def test_a_client_or_patient_is_one_however_its_number_is_written(tmp_path: Path) -> None:
    """A column of whole numbers with a gap is one of floats, and pandas writes it so."""
    head = "id,note,answer,site,patient\n"
    (tmp_path / "a.csv").write_text(head + "1,x,yes,1,7\n2,y,no,2,8\n")
    (tmp_path / "b.csv").write_text(head + "3,x,yes,1.0,7.0\n4,y,no,,\n5,z,no,2.00,1.5\n")
    settings = {
        "question": "?",
        "columns": {"text": "note", "client": "site"},
        "group": "patient",
        "on_bad_row": "skip",
    }
    rows = rawsets.dataset("table", tmp_path, train="*.csv", **settings).load("train")
    assert [row.columns["client"] for row in rows.examples] == ["1", "2", "1", "2"]
    assert [row.columns["patient"] for row in rows.examples] == ["7", "8", "7", "1.5"]


def test_names_that_differ_in_case_alone_are_noted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("note,answer,site\nx,yes,North\ny,no,north\nz,no, North \n")
    rows = rawsets.dataset("table", tmp_path, train="a.csv", question="?", columns={"text": "note", "client": "site"})
    assert "column 'site': 'North' and 'north' differ in case alone and count as two" in rows.load("train").notes


# --- cells in messages


@pytest.mark.parametrize("name", ["list_struct.parquet", "path_dict.jsonl", "base64.jsonl"])
def test_no_message_holds_a_picture(case: Any, name: str) -> None:
    with pytest.raises(DataError) as caught:
        case("09", train=name)
    assert len(str(caught.value)) < 400
    assert "\\x" not in str(caught.value)


def test_binary_columns_at_any_depth_are_refused(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    kinds = [arrow.binary(), arrow.binary(1), arrow.large_binary(), arrow.binary_view(), arrow.list_(arrow.binary())]
    for kind in [*kinds, arrow.map_(arrow.string(), arrow.binary()), arrow.dictionary(arrow.int8(), arrow.binary())]:
        as_parquet(tmp_path / "a.parquet", {"scan": arrow.nulls(1, kind), "answer": ["x"]})
        with pytest.raises(DataError, match=r"column 'scan' holds .*; write the pictures to files"):
            rawsets.dataset("table", tmp_path, train="a.parquet", question="?", columns={"image": "scan"}).load("train")


def test_long_cells_are_cut_in_every_message(tmp_path: Path) -> None:
    long = "x" * 100_000
    frame = {"QA": {"planning": [{"Q": "?", "A": {"a": long}}]}, "image_paths": {}}
    bad = {
        "trainset.json": [rawsets.radiology_row(long, image_name="../" + long)],
        "train.json": [rawsets.slake_row(1, img_name=long)],
        "v1_1_train_nus.json": {"s": {"key_frames": {"f": frame}}},
    }
    for file, content in bad.items():
        rawsets.write_json(tmp_path / file, content)
    rawsets.write_lines(tmp_path / "train.jsonl", [json.dumps({"id": 1, "img": "a.png", "label": long, "text": "x"})])
    for name, settings in (("vqa-rad", {}), ("slake", {}), ("drivelm", {"test_rate": 1e-6}), ("hateful-memes", {})):
        with pytest.raises(DataError) as caught:
            rawsets.dataset(name, tmp_path, **settings).load("train")
        assert len(str(caught.value)) < 600, name


# --- pixels


def test_broken_exif_is_read_and_turned(case: Any) -> None:
    rows = case("11")
    assert len(check_rows(rows.examples, IMAGE, "fail").examples) == 4
    with Image.open("0.jpg") as raw:
        turned = raw.size[::-1] if raw.getexif().get(274, 1) in (5, 6, 7, 8) else raw.size
    assert open_image(Path("0.jpg")).size == turned
    for path in sorted(Path().glob("crash_*")):
        try:
            assert open_image(path, "rows.csv:2").mode == "RGB"
        except DataError as error:
            assert str(error).startswith(f"rows.csv:2: image {path} cannot be read: ")  # noqa: PT017


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_has_the_pixels_of_a_turned_png(tmp_path: Path, orientation: int) -> None:
    """An uncompressed TIFF with orientation 5 to 8 came out scrambled: Pillow took its turned width for that of its rows."""
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = Image.Exif()
    exif[274] = orientation
    for name in ("a.tif", "a.png"):
        image.save(tmp_path / name, exif=exif)
    tiff, png = (np.asarray(open_image(tmp_path / name)) for name in ("a.tif", "a.png"))
    assert tiff.shape == ((2, 3, 3) if orientation < 5 else (3, 2, 3))
    assert (tiff == png).all()


def test_a_picture_that_is_broken_in_its_middle_is_found_before_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((200, 200), 90).save(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    row = Example(7, {"image": (path,)}, "?", (), "a", "rows.csv:2")
    with pytest.raises(DataError, match=r"rows.csv:2: row 7: image .*a.png cannot be read"):
        check_rows([row], IMAGE, "fail")


def test_wide_pictures_are_scaled_by_the_stated_rule(shared: Path) -> None:
    (folder,) = (shared / "cases" / "data").glob("12-*")
    for path in [*folder.glob("*.tif"), *folder.glob("*.png")]:
        with Image.open(path) as raw:
            values = np.asarray(raw).astype(np.float64)
        grey = np.asarray(open_image(path))[..., 0].astype(np.float64)
        if values.min() < 0 or path.name.startswith("float"):  # from the smallest to the largest value
            want = (values - values.min()) / (values.max() - values.min()) * 255
        else:  # as many bits less as the largest value has above 8
            want = values // 2 ** max(0, int(values.max()).bit_length() - 8)
        assert np.abs(grey - want).max() <= 0.5 + 1e-6, path.name
        assert len(np.unique(grey)) >= 100, path.name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[40000, 40100]], np.uint16), r"has values from 40000 to 40100, which all become one grey level"),
        (np.array([[0.5, np.nan]], np.float32), r"has NaN or infinite values"),
    ],
)
def test_values_that_cannot_be_scaled_are_named(tmp_path: Path, values: np.ndarray, message: str) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"^x: image .*a.tif {message}"):
        open_image(tmp_path / "a.tif", "x")


def test_files_with_several_frames_are_named(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    row = Example(7, {"image": (tmp_path / "a.gif",)}, "?", (), "a", "rows.csv:2")
    assert check_rows([row], IMAGE, "fail").notes == (
        "1 picture with several frames or pages, of which the first is used: a.gif (2)",
    )
    assert open_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


# --- placeholders


def test_a_placeholder_in_an_answer_is_text(case: Any, tmp_path: Path) -> None:
    """It ended the run with "tokens: 34, features: 2048": it became a second picture without pixels."""
    case("04")
    model = write("llava", tmp_path / "model")
    done = run(Experiment.load("e.toml", [f"backbone.path={model}"]), tmp_path / "out")
    assert {row["metric"] for row in done.rows} >= {"accuracy", "token_f1"}
