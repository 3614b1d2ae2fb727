"""The loaders of the published sets, on the real VQA-RAD and on made-up files in their forms on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.images import open_image
from fedmllm.data.base import Dataset
from fedmllm.data.pictures import check_rows
from support import rawsets


def load(name: str, root: Path, split: str = "train", **settings):
    return rawsets.dataset(name, root, **settings).load(split)


# --- the real files -----------------------------------------------------------------------------------------------


def test_vqa_rad_has_1797_and_451_rows_and_its_images_are_sound(shared: Path) -> None:
    """Counts: SOURCE.md next to the files. 314 of the 315 images are used by a row."""
    root = shared / "data" / "vqa_rad"
    train, test = (load("vqa-rad", root, split).examples for split in ("train", "test"))
    assert (len(train), len(test)) == (1797, 451)
    images = {path for e in (*train, *test) for path in e.fields["image"]}
    assert len(list((root / "images").iterdir())) == 315
    assert {p.name for p in (root / "images").iterdir()} - {p.name for p in images} == {"synpic35356.jpg"}
    assert len({e.fields["image"] for e in train} & {e.fields["image"] for e in test}) == 202
    assert all(open_image(path).mode == "RGB" for path in (root / "images").iterdir())
    assert check_rows((*train, *test), frozenset({"image"}), "fail") == ((*train, *test), (), ())


def test_vqa_rad_closed_questions_with_other_answers_are_put_as_open_ones(shared: Path) -> None:
    """272 CLOSED test rows, 21 of which have another answer than yes or no (SOURCE.md)."""
    test = load("vqa-rad", shared / "data" / "vqa_rad", "test").examples
    closed = [e for e in test if e.columns["answer_type"] == "CLOSED"]
    assert len(closed) == 272
    assert sum(not e.choices for e in closed) == 21
    assert {e.answer for e in closed if e.choices} == {"yes", "no"}
    assert all(isinstance(e.answer, str) and e.answer == e.answer.strip() for e in test)


# --- forms on disk ------------------------------------------------------------------------------------------------


def test_vqa_rad_as_one_public_file(tmp_path: Path) -> None:
    phrases = ["freeform", "para", "test_freeform", "test_para", "frame"]
    rows = [rawsets.radiology_row(i, phrase_type=phrase) for i, phrase in enumerate(phrases)]
    rawsets.write_json(tmp_path / "VQA_RAD Dataset Public.json", rows)
    (tmp_path / "VQA_RAD Image Folder").mkdir()
    train, test = (load("vqa-rad", tmp_path, split).examples for split in ("train", "test"))
    assert [e.id for e in train] == [0, 1]
    assert [e.id for e in test] == [2, 3]
    assert train[0].fields["image"] == (tmp_path / "VQA_RAD Image Folder" / "synpic0.jpg",)


def test_hateful_memes_finds_the_image_by_img_whatever_the_id(tmp_path: Path) -> None:
    lines = ['{"id": 1235, "img": "img/01235.png", "label": 1, "text": "a"}']
    lines += ['{"id": "02345", "img": "img/02345.png", "label": "0", "text": "b"}']
    rawsets.write_lines(tmp_path / "train.jsonl", lines)
    one, two = load("hateful-memes", tmp_path).examples
    assert (one.id, one.fields["image"], one.answer) == (1235, (tmp_path / "img/01235.png",), "hateful")
    assert (two.id, two.fields["image"], two.answer) == ("02345", (tmp_path / "img/02345.png",), "not-hateful")


def test_crisismmd_reads_tweets_as_they_are(tmp_path: Path) -> None:
    tweets = [
        '"Stay safe', 'a "quoted" word', '"all ""of"" it"', "cafÃ© â\x80\x99 mojibake", "a\u2028line\x85separator",
        "see http://t.co/a now httpx https://t.co/b ",
    ]  # fmt: skip
    rows = [rawsets.crisis_row(i, "vehicle_damage", tweet) for i, tweet in enumerate(tweets)]
    lines = ["\t".join(rawsets.CRISIS_COLUMNS), *rows]
    want = ['"Stay safe', 'a "quoted" word', 'all "of" it', tweets[3], tweets[4], "see  now httpx".replace("httpx", "")]
    for end, start in (("\n", ""), ("\r\n", "\ufeff")):
        rawsets.write_lines(rawsets.crisis_path(tmp_path), lines, end, start)
        examples = load("crisismmd", tmp_path).examples
        assert [e.fields["text"] for e in examples] == [text.strip() for text in want]
        assert examples[0].where.endswith("train.tsv:2")
        assert examples[0].columns["event_name"] == "hurricane_toy"


def test_crisismmd_quoted_tweets_may_span_lines_and_stray_quotes_swallow_none(tmp_path: Path) -> None:
    header = "\t".join(rawsets.CRISIS_COLUMNS)
    spanning = rawsets.crisis_row(0, "vehicle_damage", '"two\nlines ""here"""')
    cut = 'hurricane_toy\t1\t1_0\t"never closed'
    lines = [header, spanning, rawsets.crisis_row(1, "vehicle_damage"), cut, rawsets.crisis_row(2, "vehicle_damage")]
    rawsets.write_lines(rawsets.crisis_path(tmp_path), lines)
    with pytest.raises(DataError, match=r"train.tsv:5: 4 columns; the header has 9"):
        load("crisismmd", tmp_path)
    rows = load("crisismmd", tmp_path, on_bad_row="skip")
    assert [e.id for e in rows.examples] == ["900_0", "901_0", "902_0"]
    assert rows.examples[0].fields["text"] == 'two\nlines "here"'
    assert [e.where.rpartition(":")[2] for e in rows.examples] == ["2", "4", "6"]
    assert len(rows.skipped) == 1


def test_slake_keeps_one_language(tmp_path: Path) -> None:
    rawsets.slake(tmp_path)
    english, chinese = (load("slake", tmp_path, "test", language=language).examples for language in ("en", "zh"))
    assert [e.id for e in english] == [1, 3]
    assert [e.id for e in chinese] == [2]
    assert english[1].choices == ("yes", "no")
    assert english[0].fields["image"] == (tmp_path / "imgs/xmlab1/source.jpg",)
    assert english[0].columns["location"] == "Abdomen"


def test_slake_validation_under_both_names(tmp_path: Path) -> None:
    rawsets.slake(tmp_path)
    (tmp_path / "validate.json").rename(tmp_path / "validation.json")
    assert len(load("slake", tmp_path, "validation").examples) == 2


def test_flashcards_put_their_question_as_text_and_are_not_tested_on(tmp_path: Path) -> None:
    rawsets.flashcards(tmp_path, 3)
    example = load("flashcards", tmp_path).examples[2]
    assert (example.id, example.fields, example.answer) == ("flashcard-2", {"text": "What is 2?"}, "It is 2.")
    with pytest.raises(DataError, match="no test rows"):
        load("flashcards", tmp_path, "test")


def test_medical_trains_on_two_sets_and_is_tested_on_two(tmp_path: Path) -> None:
    rawsets.medical(tmp_path, 4, 3)
    train, test = (load("medical", tmp_path, split).examples for split in ("train", "test"))
    assert [e.id for e in train] == [0, 1, 2, 3, "flashcard-0", "flashcard-1", "flashcard-2"]
    assert [e.id for e in test] == [1000, 1001, "slake-1", "slake-3"]
    assert [e.columns["set"] for e in test] == ["vqa-rad", "vqa-rad", "slake", "slake"]
    assert len(load("medical", tmp_path, "test", tests=["vqa-rad"]).examples) == 2


def test_drivelm_shows_six_cameras_a_question(tmp_path: Path) -> None:
    rawsets.drivelm(tmp_path)
    data = rawsets.dataset("drivelm", tmp_path)
    train, test = data.load("train").examples, data.load("test").examples
    assert len(train) + len(test) == 90
    assert not {e.columns["scene"] for e in train} & {e.columns["scene"] for e in test}
    looking, moving, behaving = train[:3]
    assert tuple(looking.fields) == data.modalities() == rawsets.CAMERAS
    assert looking.fields["CAM_BACK"] == (tmp_path / "nuscenes/samples/CAM_BACK/n015__CAM_BACK__1.jpg",)
    assert (looking.choices, moving.choices, moving.answer) == ((), ("yes", "no"), "no")
    assert behaving.question == "Predict the behavior of the ego vehicle."
    assert behaving.choices == ("The ego vehicle is going straight.", "The ego vehicle is turning left.")
    assert behaving.answer == "The ego vehicle is turning left."
    assert len(data.model_copy(update={"tasks": ("behavior",)}).load("train").examples) == len(train) // 3


def test_drivelm_rows_may_lack_a_camera(tmp_path: Path) -> None:
    rawsets.drivelm(tmp_path, cameras=("CAM_FRONT",))
    assert all(tuple(e.fields) == ("CAM_FRONT",) for e in load("drivelm", tmp_path).examples)


def test_a_share_of_the_training_images_is_held_out_for_validation(tmp_path: Path) -> None:
    rawsets.vqa_rad(tmp_path, 300)
    whole = load("vqa-rad", tmp_path).examples
    kept, held = (load("vqa-rad", tmp_path, split, validation_rate=0.2).examples for split in ("train", "validation"))
    assert {e.id for e in kept} | {e.id for e in held} == {e.id for e in whole}
    assert 40 <= len(held) <= 80  # 60 expected, standard deviation 7
    assert not {e.fields["image"] for e in kept} & {e.fields["image"] for e in held}
    assert load("vqa-rad", tmp_path, "validation").examples == ()


@pytest.mark.parametrize("name", ["hateful-memes", "crisismmd", "vqa-rad", "slake", "flashcards", "medical", "drivelm"])
def test_a_folder_that_is_not_there_or_has_other_files_says_what_is_expected(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"no such folder; `fedmllm data where .*` lists the expected files"):
        load(name, tmp_path / "nowhere")
    for folder in ("", "vqa_rad", "flashcards"):
        (tmp_path / folder).mkdir(exist_ok=True)
    with pytest.raises(DataError, match=r"has none of .*; `fedmllm data where"):
        load(name, tmp_path)


def test_every_set_is_known_by_name_and_says_where_it_comes_from() -> None:
    names = {"hateful-memes", "crisismmd", "vqa-rad", "slake", "flashcards", "medical", "drivelm", "easy-vqa", "table"}
    assert names <= Dataset.members.keys()
    for name in names:
        source = Dataset.members[name].source
        assert source.get
        assert source.licence
        assert source.tree


def test_a_misspelt_set_and_key_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'crisismmd'"):
        Dataset.pick({"name": "crisis-mmd", "root": "x"}, "data")
    with pytest.raises(ConfigError, match=r"data\.roots: unknown key"):
        Dataset.pick({"name": "crisismmd", "root": "x", "roots": "x"}, "data")
