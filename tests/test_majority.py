"""The baselines without a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError
from fedmllm.core.metrics import METRICS, chosen, probabilities
from fedmllm.core.types import Example
from fedmllm.federation.baselines import majority_predictions, question_prior_predictions
from fedmllm.runs.predictions import read_predictions
from fedmllm.runs.run import run
from fedmllm.runs.suites.suite import Suite
from support import rawsets


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


def asked(question: str, answer: str, *choices: str) -> Example:
    return Example(f"{question} {answer}", {}, question, choices, answer, "here:1")


def test_question_prior_answers_by_the_text_of_the_question() -> None:
    train = [
        asked("Is it red?", "no"),
        asked("is it red?", "yes"),
        asked("IS IT RED?", "yes"),
        asked("what is it?", "circle"),
        asked("and what colour?", "no"),
        asked("and what colour?", "no"),
    ]
    test = [asked("is it red?", "yes"), asked("what is it?", "circle"), asked("how many?", "1")]
    predictions = question_prior_predictions(train, test)
    assert [chosen(p) for p in predictions] == ["yes", "circle", "no"]  # a new text: the most frequent answer of all
    assert METRICS["accuracy"](predictions) == 2 / 3
    assert chosen(question_prior_predictions([], test)[0]) is None


def test_question_prior_scores_choices_by_their_frequency() -> None:
    two = ("no", "yes")
    train = [
        *[asked("is it red?", answer, *two) for answer in ("no", "no", "yes")],
        *[asked("is it blue?", answer, *two) for answer in ("yes", "no", "yes", "yes")],
        asked("is it green?", "no", *two),
    ]
    test = [asked("is it red?", "no", *two), asked("is it blue?", "yes", *two), asked("is it green?", "no", *two)]
    test += [asked("is it teal?", "yes", *two), asked("is it red?", "b", "a", "b")]
    predictions = question_prior_predictions(train, test)
    shares = [probabilities(p) for p in predictions]
    assert shares[0] == pytest.approx([2 / 3, 1 / 3])
    assert shares[1] == pytest.approx([1 / 4, 3 / 4])
    assert shares[2] == pytest.approx([1, 0], abs=1e-9)
    assert shares[3] == pytest.approx([1 / 2, 1 / 2])  # a new text: all rows with these choices
    assert shares[4] == pytest.approx([1 / 2, 1 / 2])  # nothing to count
    assert METRICS["auc"](predictions[:4]) == 1.0  # the blue and the teal row are above the others


def test_the_method_question_prior(tmp_path: Path) -> None:
    rawsets.easy_vqa(tmp_path)
    for folder in (tmp_path / "train/images", tmp_path / "test/images"):
        folder.mkdir()
        for number in range(5):
            Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    table = {
        "data": {"name": "easy-vqa", "root": str(tmp_path)},
        "partition": {"name": "iid", "num_clients": 2},
        "method": "question-prior",
        "cohort_size": 1,
    }
    result = run(Experiment.parse(table), tmp_path / "run")
    values = {row["metric"]: row["value"] for row in result}
    assert values["accuracy"] == 1.0  # the test questions are four of the training questions
    assert {(row["method"], row["visible"]) for row in result} == {("question-prior", "none")}
    (kept,) = read_predictions(tmp_path / "run/predictions.jsonl.gz")
    assert [p.text for p in kept.predictions] == [row[1] for row in rawsets.EASY_ROWS[:4]]
    with pytest.raises(ConfigError, match='no effect with method = "question-prior", which uses no model'):
        Experiment.parse({**table, "backbone": {"name": "tiny", "adapter": "runs/a"}})


def test_the_real_suites_have_both_priors_and_a_server_optimizer() -> None:
    for path in (Path(__file__).parents[1] / "experiments/real").glob("*.toml"):
        cells = Suite.load(path).cells
        methods = {cell.experiment.method_name() for cell in cells}
        assert {"majority", "question-prior", "zero-shot", "local", "fedavg", "fedadam", "centralised"} <= methods, path
        assert len({cell.labels["seeds"] for cell in cells}) >= 3
