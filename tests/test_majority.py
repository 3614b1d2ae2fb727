"""The baseline without a model."""

from __future__ import annotations

from fedmllm.core.metrics import METRICS, chosen
from fedmllm.core.types import Example
from fedmllm.federation.baselines import majority_predictions


def row(answer: str, *choices: str) -> Example:
    return Example(answer, {}, "q", choices, answer, "here:1")


def test_majority_answers_by_kind_of_question() -> None:
    train = [
        row("yes", "no", "yes"),
        row("yes", "no", "yes"),
        row("no", "no", "yes"),
        row("axial"),
        row("axial"),
        row("mri"),
    ]
    test = [row("no", "no", "yes"), row("yes", "no", "yes"), row("mri"), row("axial"), row("b", "a", "b")]
    predictions = majority_predictions(train, test)
    assert [chosen(p) for p in predictions] == ["yes", "yes", "axial", "axial", "a"]
    assert METRICS["accuracy"](predictions) == 2 / 5
    assert chosen(majority_predictions([], [row("axial")])[0]) is None
