"""easy-VQA: its rows, columns and split, from a made-up folder and from the installed package."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from fedmllm.core.errors import DataError
from fedmllm.core.types import Prediction
from fedmllm.data.easy_vqa import EasyVqa, accuracy_colour, accuracy_shape
from support import rawsets


def test_questions_reveal_colour_and_shape_of_their_picture(tmp_path: Path) -> None:
    rawsets.easy_vqa(tmp_path)
    rows = EasyVqa(root=tmp_path).load("train").examples
    about = {int(row.columns["picture"]): (row.columns["colour"], row.columns["shape"]) for row in rows}
    assert about == {
        0: ("blue", "rectangle"),
        1: ("red", "circle"),
        2: ("teal", "triangle"),
        3: ("unknown", "unknown"),
        4: ("gray", "unknown"),
    }
    assert [row.columns["kind"] for row in rows] == ["colour", "yes-no", "shape", *["yes-no"] * 5]
    assert {row.choices for row in rows} == {()}
    assert [len(row.choices) for row in EasyVqa(root=tmp_path, choices=True).load("train").examples[:3]] == [8, 2, 3]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1}', r"a JSON list of rows is expected here, not"),
        ('[["is it?", "yes"]]', r"questions\.json\[0\]: \[question, answer, number of a picture\] is expected"),
        ('[["is it?", "yes", 0], ["is it?", "yes", true]]', r"questions\.json\[1\]: \[question, answer, number"),
        ('[["is it?", "perhaps", 0]]', r"questions\.json\[0\]: the answer is 'perhaps'; allowed: black, .*yes"),
        ("[", r"questions\.json: not JSON"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, problem: str) -> None:
    rawsets.write_json(tmp_path / "train" / "questions.json", []).write_text(text)
    with pytest.raises(DataError, match=problem):
        EasyVqa(root=tmp_path).load("train")


def test_bad_rows_can_be_skipped(tmp_path: Path) -> None:
    rows = [["is it?", "yes"], *rawsets.EASY_ROWS]
    rawsets.write_json(tmp_path / "train" / "questions.json", rows)
    found = EasyVqa(root=tmp_path, on_bad_row="skip").load("train")
    assert (len(found.examples), len(found.skipped)) == (8, 1)
    assert [e.id for e in found.examples] == list(range(1, 9))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmllm.data.easy_vqa.find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"data\.root: missing, and the package easy-vqa is not installed; pip install"):
        EasyVqa().load("train")


def test_the_published_set() -> None:
    """The counts of its README, and the accuracy of the most frequent answer to each question: no picture is needed."""
    pytest.importorskip("easy_vqa", reason="the package easy-vqa is not installed")
    train, test = (EasyVqa().load(split).examples for split in ("train", "test"))
    assert (len(train), len(test)) == (38575, 9673)
    assert [sum(e.columns["kind"] == "yes-no" for e in rows) for rows in (train, test)] == [28407, 7136]
    assert len({e.answer for e in train}) == 13
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        answers[row.question][row.answer] += 1
    guesses = [Prediction(row, (), answers[row.question].most_common(1)[0][0]) for row in test]
    assert sum(g.text == g.example.answer for g in guesses) / len(test) == pytest.approx(0.670, abs=5e-4)
    assert accuracy_colour(guesses) < 0.2 < accuracy_shape(guesses) < 0.45
    for row in (*train, *test):
        if (kind := row.columns["kind"]) in ("colour", "shape"):
            assert row.columns[kind] == row.answer
    assert sum(e.columns["colour"] == "unknown" for e in train) < 0.06 * len(train)
    path = test[0].fields["image"][0]
    assert path.is_file()
    assert json.loads((path.parents[1] / "questions.json").read_text())[0][2] == int(path.stem)


def test_whole_pictures_are_held_out() -> None:
    pytest.importorskip("easy_vqa", reason="the package easy-vqa is not installed")
    data = EasyVqa(validation_rate=0.1, num_train=500)
    kept, held = data.load("train").examples, data.load("validation").examples
    assert len(kept) == 500
    assert 0.08 < len(held) / 38575 < 0.12
    assert not {e.columns["picture"] for e in kept} & {e.columns["picture"] for e in held}


def test_a_spread_draw_has_a_question_of_every_picture_first(tmp_path: Path) -> None:
    rawsets.easy_vqa(tmp_path)
    whole = EasyVqa(root=tmp_path).load("train").examples
    drawn = EasyVqa(root=tmp_path, draw="spread").load("train").examples
    assert sorted(e.id for e in drawn) == [e.id for e in whole]
    assert len({e.columns["picture"] for e in drawn[:5]}) == 5  # of five pictures
    assert EasyVqa(root=tmp_path, draw="spread").load("train").examples == drawn
    orders = {
        tuple(e.id for e in EasyVqa(root=tmp_path, draw="spread", seed=s).load("train").examples) for s in range(5)
    }
    assert len(orders) > 1
    assert EasyVqa(root=tmp_path, draw="spread", num_train=3).load("train").examples == drawn[:3]


def test_the_spread_draw_of_the_published_set() -> None:
    pytest.importorskip("easy_vqa", reason="the package easy-vqa is not installed")
    first, spread = (EasyVqa(num_train=1500, draw=draw).load("train").examples for draw in ("first", "spread"))
    assert [len({e.columns["picture"] for e in rows}) for rows in (first, spread)] == [153, 1500]
    test = EasyVqa(draw="spread").load("test").examples[:500]  # as evaluate.limit takes them
    assert len({e.columns["picture"] for e in test}) == 500
    for rows in (spread, test):
        assert sum(e.columns["kind"] == "yes-no" for e in rows) / len(rows) == pytest.approx(0.737, abs=0.05)


def test_the_draw_does_not_change_existing_run_ids() -> None:
    def identity(**settings: object) -> dict[str, object]:
        return EasyVqa(num_train=1500, **settings).identity()  # type: ignore[arg-type]

    assert identity(draw="first", seed=0) == identity()
    assert set(identity()) == {"name", "root", "choices", "num_train", "validation_rate", "on_bad_row"}
    assert identity(draw="spread")["draw"] == "spread"
