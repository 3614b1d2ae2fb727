"""Baselines without a model: the most frequent training answers."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

from fedmllm.core.types import Example, Prediction

_K = TypeVar("_K")
# Logarithm of the frequency of a choice that never occurs: finite, so that differences of scores are numbers.
NEVER = -50.0


def majority_predictions(train: Sequence[Example], test: Sequence[Example]) -> list[Prediction]:
    """Per set of choices (open questions are one more set) the most frequent training answer, the first of equals.

    A test row whose set of choices never occurs in training gets its first choice, or no answer if it is open.
    """
    counts = _counted((example.choices, example.answer) for example in train)
    predictions = []
    for example in test:
        common = counts[example.choices].most_common(1)
        answer = common[0][0] if common else None
        if example.choices:
            best = answer or example.choices[0]
            scores = tuple(0.0 if choice == best else -1.0 for choice in example.choices)
            predictions.append(Prediction(example, scores, None))
        else:
            predictions.append(Prediction(example, (), answer, answer or ""))
    return predictions


def question_prior_predictions(train: Sequence[Example], test: Sequence[Example]) -> list[Prediction]:
    """Per question text the most frequent training answer, the first of equals. Capitals do not distinguish texts.

    A question with choices has the logarithms of their frequencies among the training answers to its text as scores, so that
    rankings such as AUC are defined. A text that is not among the training rows, or whose answers there are none of the row's
    choices, is answered from all training rows with the same choices, as by the majority.

    Args:
        train: Rows of all clients.
        test: Rows to answer.

    Returns:
        One prediction per test row. Without any row to count, choices have equal scores, and an open question has no answer.
    """
    by_text = _counted((example.question.lower(), example.answer) for example in train)
    by_choices = _counted((example.choices, example.answer) for example in train)
    predictions = []
    for example in test:
        tables = by_text[example.question.lower()], by_choices[example.choices]
        if example.choices:
            usable = (table for table in tables if any(table[choice] for choice in example.choices))
            predictions.append(Prediction(example, _log_frequencies(example.choices, next(usable, Counter())), None))
        else:
            answer = next((table.most_common(1)[0][0] for table in tables if table), None)
            predictions.append(Prediction(example, (), answer, answer or ""))
    return predictions


def _counted(pairs: Iterable[tuple[_K, str]]) -> defaultdict[_K, Counter[str]]:
    """Key -> how often each answer occurs."""
    counts: defaultdict[_K, Counter[str]] = defaultdict(Counter)
    for key, answer in pairs:
        counts[key][answer] += 1
    return counts


def _log_frequencies(choices: Sequence[str], counts: Counter[str]) -> tuple[float, ...]:
    """Logarithm of each choice's share of the rows; all equal if there are none."""
    total = sum(counts[choice] for choice in choices)
    return tuple(math.log(counts[choice] / total) if counts[choice] else NEVER for choice in choices)
