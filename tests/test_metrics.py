"""Metrics by hand and, where scikit-learn has no say, against independent sums."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis.strategies import text

from fedmllm.core.answers import normalized, parse_open, same_answer, word_f1
from fedmllm.core.metrics import METRICS, chosen, probabilities
from fedmllm.core.types import Example, Prediction


def closed(
    answer: str, scores: tuple[float, ...], choices: tuple[str, ...] = ("no", "yes"), **columns: str
) -> Prediction:
    return Prediction(Example("1", {}, "q", choices, answer, "here:1", columns), scores, None)


def opened(answer: str, raw: str, **columns: str) -> Prediction:
    return Prediction(Example("1", {}, "q", (), answer, "here:1", columns), (), parse_open(raw), raw)


def test_probabilities_are_a_softmax_that_does_not_overflow() -> None:
    assert probabilities(closed("no", (-1000.0, -1000.0))) == [0.5, 0.5]
    assert probabilities(closed("no", (0.0, math.log(3)))) == pytest.approx([0.25, 0.75])


def test_auc_by_hand() -> None:
    # positives at 0.9 and 0.4, negatives at 0.6 and 0.1: 3 of the 4 pairs are in order
    rows = [closed(a, (0.0, math.log(p / (1 - p)))) for a, p in (("yes", 0.9), ("yes", 0.4), ("no", 0.6), ("no", 0.1))]
    assert METRICS["auc"](rows) == 0.75
    assert METRICS["auc_hard"](rows) == 0.5  # hard labels: 1, 0, 1, 0: sensitivity 0.5, specificity 0.5
    assert METRICS["accuracy"](rows) == 0.5


def test_auc_needs_both_classes_and_two_choices() -> None:
    assert METRICS["auc"]([closed("yes", (0.0, 1.0))]) is None
    assert METRICS["auc"]([closed("a", (0.0, 1.0, 2.0), ("a", "b", "c"))]) is None
    assert METRICS["auc"]([]) is None


def test_macro_f1_by_hand() -> None:
    abc = ("a", "b", "c")
    rows = [
        closed("a", (2, 1, 0), abc),
        closed("a", (0, 1, 0), abc),
        closed("b", (0, 1, 0), abc),
        closed("c", (0, 2, 1), abc),
    ]
    # a: p 1, r 1/2, f 2/3; b: p 1/3, r 1, f 1/2; c: f 0
    assert METRICS["macro_f1"](rows) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_equal_scores_choose_the_first() -> None:
    assert chosen(closed("yes", (0.5, 0.5))) == "no"


@pytest.mark.parametrize(
    ("raw", "parsed"),
    [
        ("The left lung.", "The left lung."),
        (" a\n", "a"),
        ("+", "+"),
        ("The", "The"),
        ("", None),
        ("\n\n", None),
        ("...", None),
        ("yes\nno", None),
    ],
)
def test_open_answers_are_parsed_strictly(raw: str, parsed: str | None) -> None:
    assert parse_open(raw) == parsed


def test_exact_match_and_token_f1() -> None:
    rows = [opened("the left lung", "Left lung!"), opened("left lung", "right lung"), opened("liver", "")]
    assert METRICS["accuracy"](rows) == pytest.approx(1 / 3)
    assert METRICS["token_f1"](rows) == pytest.approx((1 + 0.5 + 0) / 3)
    assert METRICS["unparsed"](rows) == 1
    assert normalized("The  Left-lung.") == "left lung"


def test_open_and_closed_follow_the_column_where_there_is_one() -> None:
    rows = [
        closed("yes", (0, 1), answer_type="CLOSED"),
        opened("axial", "axial", answer_type="CLOSED"),
        opened("x", "y"),
    ]
    assert METRICS["accuracy_closed"](rows) == 1.0
    assert METRICS["accuracy_open"](rows) == 0.0


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_survives_no_rows_and_rows_of_the_other_kind(name: str) -> None:
    for rows in ([], [opened("a", "b")], [closed("yes", (0.0, 1.0))]):
        value = METRICS[name](rows)
        assert value is None or value >= 0


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        ("A", "A"),
        ("+", "+"),
        ("The", "The"),
        ("?", "?"),
        ("l1\nl2", "l1\nl2"),
        ("是", "是。"),
        ("はい", "はい。"),
        ("نعم", "نعم؟"),
        ("café", "cafe\u0301"),
        ("patient's", "patient\u2019s"),
        ("５", "5"),
        ("左肺", "左 肺"),
        ("-5", "\u22125"),
        ("1,000", "1000"),
        ("1,5", "1.5"),
        ("50 %", "50%"),
        ("O+", "O +"),
        ("HER2-", "HER2 \u2212"),
        ("10\u00b2", "10^2"),
        ("5 cm\u00b2", "5 cm2"),
        ("5\u00bd", "5 1/2"),
        ("yes", "\u200byes"),
        ("fibro\u00adsis", "fibrosis"),
        ("left lung", "The left lung."),
        ("left-lung", "Left lung!"),
        ("vitamin A deficiency", "vitamin a deficiency"),
        ("Straße", "STRASSE"),
        ("a lesion", "lesion"),
    ],
)
def test_answers_that_mean_the_same_are_right(gold: str, said: str) -> None:
    rows = [Prediction(Example("1", {}, "q", (), gold, "w"), (), parse_open(said), said)]
    assert METRICS["accuracy"](rows) == METRICS["token_f1"](rows) == 1.0
    assert METRICS["unparsed"](rows) == 0


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        ("hepatitis A", "hepatitis"),
        ("B", "A B"),
        ("vitamin A deficiency", "vitamin deficiency"),
        ("type a", "type"),
        ("O+", "O-"),
        ("O-", "O"),
        ("HER2 -", "HER2"),
        ("HER2 -", "HER2 +"),
        ("10\u00b2", "102"),
        ("5\u00bd", "51/2"),
        ("-5", "5"),
        ("\u22125", "5"),
        (">5", "<5"),
        ("≤5", "≥5"),
        ("±5", "5"),
        ("1.5", "1 5"),
        ("1.5", "15"),
        ("3/4", "3 4"),
        ("3-5", "35"),
        ("5 %", "5"),
        ("yes", ""),
        ("yes", "..."),
        ("A", "B"),
        ("a", "the"),
    ],
)
def test_answers_of_another_meaning_are_wrong_in_both_directions(gold: str, said: str) -> None:
    for one, two in ((gold, said), (said, gold)):
        rows = [Prediction(Example("1", {}, "q", (), one, "w"), (), parse_open(two), two)]
        assert METRICS["accuracy"](rows) == 0.0


def test_characters_of_scripts_without_blanks_are_words() -> None:
    assert word_f1("左肺", "左侧肺") == pytest.approx(2 * 2 / (2 + 3))
    assert word_f1("ปอดซ้าย", "ปอดขวา") > 0
    assert word_f1("폐 왼쪽", "폐 오른쪽") == pytest.approx(0.5)  # Korean has blanks


@given(text())
def test_an_answer_equals_itself_and_its_composed_and_decomposed_forms(answer: str) -> None:
    assert same_answer(answer, answer)
    assert word_f1(answer, answer) == 1.0
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, answer)
        assert same_answer(answer, other) or not normalized(answer)
