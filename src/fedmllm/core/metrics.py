"""Metrics: functions of predictions, picked by name; None if not defined."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fedmllm.core.answers import same_answer, word_f1
from fedmllm.core.errors import ConfigError
from fedmllm.core.plugins import PluginSource, defines_again, source_of_object
from fedmllm.core.types import Prediction

Metric = Callable[[Sequence[Prediction]], float | None]
METRICS: dict[str, Metric] = {}
PLUGIN_METRICS: dict[str, PluginSource] = {}  # origin of the metrics that are not shipped with the package


def metric(f: Metric) -> Metric:
    """Add a function to the metrics, under its own name.

    Args:
        f: Predictions -> value, or None if the rows do not define it.

    Returns:
        The function itself, so that this is a decorator.

    Raises:
        ConfigError: Another function has that name.
    """
    name, old, source = f.__name__, METRICS.get(f.__name__), source_of_object(f)
    if old and not defines_again(old, PLUGIN_METRICS.get(name), f, source):
        raise ConfigError(f"metric {name!r} is defined twice: in {old.__module__} and in {f.__module__}; rename one")
    METRICS[name] = f
    if source:
        PLUGIN_METRICS[name] = source
    return f


def probabilities(prediction: Prediction) -> list[float]:
    """softmax over the choices' log-likelihoods."""
    top = max(prediction.scores)
    weights = [math.exp(s - top) for s in prediction.scores]
    return [w / sum(weights) for w in weights]


def chosen(prediction: Prediction) -> str | None:
    """The most likely choice (the first of equals), or the parsed open answer; None = could not be parsed."""
    if prediction.scores:
        return prediction.example.choices[prediction.scores.index(max(prediction.scores))]
    return prediction.text


def is_right(prediction: Prediction) -> bool:
    """Return whether the answer is right: the choice, or an open answer that `same_answer` accepts.

    A generation that is identical to the answer is right even if it could not be parsed, such as one of two lines.
    """
    if prediction.scores:
        return chosen(prediction) == prediction.example.answer
    return same_answer(open_text(prediction), prediction.example.answer)


def open_text(prediction: Prediction) -> str:
    """Return the parsed answer of an open question; the generation if it is identical to the right one; else ""."""
    if prediction.text is None and prediction.raw.strip() == prediction.example.answer.strip():
        return prediction.raw
    return prediction.text or ""


@metric
def accuracy(predictions: Sequence[Prediction]) -> float | None:
    """Share of rows answered right; an unparsed answer is wrong."""
    return sum(map(is_right, predictions)) / len(predictions) if predictions else None


def _of_type(predictions: Sequence[Prediction], answer_type: str) -> list[Prediction]:
    """Rows of that `answer_type` column where the set has one, else open = without choices."""

    def kind(p: Prediction) -> str:
        return p.example.columns.get("answer_type", "CLOSED" if p.example.choices else "OPEN").upper()

    return [p for p in predictions if kind(p) == answer_type]


@metric
def accuracy_open(predictions: Sequence[Prediction]) -> float | None:
    """Accuracy over the rows of answer_type OPEN."""
    return accuracy(_of_type(predictions, "OPEN"))


@metric
def accuracy_closed(predictions: Sequence[Prediction]) -> float | None:
    """Accuracy over the rows of answer_type CLOSED."""
    return accuracy(_of_type(predictions, "CLOSED"))


@metric
def token_f1(predictions: Sequence[Prediction]) -> float | None:
    """Mean over the open questions of the F1 of normalized words (SQuAD, arXiv:1606.05250); unparsed counts 0."""
    opened = [p for p in predictions if not p.example.choices]
    return sum(word_f1(open_text(p), p.example.answer) for p in opened) / len(opened) if opened else None


@metric
def unparsed(predictions: Sequence[Prediction]) -> float | None:
    """Number of open answers that could not be parsed."""
    return float(sum(1 for p in predictions if not p.scores and not open_text(p)))


@metric
def graded(predictions: Sequence[Prediction]) -> float | None:
    """Mean grade of the open answers by the LLM judge of `evaluate.grader`, 0..1; None if no answer has a grade."""
    grades = [p.grade for p in predictions if p.grade is not None]
    return sum(grades) / len(grades) if grades else None


@metric
def ungraded(predictions: Sequence[Prediction]) -> float | None:
    """Number of open answers for which the LLM judge's reply was not a grade."""
    return float(sum(1 for p in predictions if not p.scores and p.grade is None))


def _two_way(predictions: Sequence[Prediction]) -> tuple[list[bool], list[Prediction]] | None:
    """(is the second choice right, rows) of a two-way set that shows both classes; None otherwise."""
    rows = [p for p in predictions if len(p.scores) == 2]
    truth = [p.example.answer == p.example.choices[1] for p in rows]
    return (truth, rows) if len(rows) == len(predictions) and len(set(truth)) == 2 else None


@metric
def auc(predictions: Sequence[Prediction]) -> float | None:
    """Area under the ROC curve of p(second choice)."""
    from sklearn.metrics import roc_auc_score

    if (two := _two_way(predictions)) is None:
        return None
    return float(roc_auc_score(two[0], [p.scores[1] - p.scores[0] for p in two[1]]))


@metric
def auc_hard(predictions: Sequence[Prediction]) -> float | None:
    """As published (fault 5.9): the ROC curve of the hard label, (sensitivity + specificity) / 2. To compare, not to use."""
    from sklearn.metrics import roc_auc_score

    if (two := _two_way(predictions)) is None:
        return None
    return float(roc_auc_score(two[0], [chosen(p) == p.example.choices[1] for p in two[1]]))


@metric
def macro_f1(predictions: Sequence[Prediction]) -> float | None:
    """Unweighted mean over the classes that stand in truth or prediction of their F1 (closed rows)."""
    from sklearn.metrics import f1_score

    rows = [p for p in predictions if p.scores]
    if not rows:
        return None
    return float(f1_score([p.example.answer for p in rows], [str(chosen(p)) for p in rows], average="macro"))
