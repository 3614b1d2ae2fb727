"""Baseline without a model: the most frequent training answer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from fedmllm.core.types import Example, Prediction


def majority_predictions(train: Sequence[Example], test: Sequence[Example]) -> list[Prediction]:
    """Per set of choices (open questions are one more set) the most frequent training answer, the first of equals.

    A test row whose set of choices never occurs in training gets its first choice, or no answer if it is open.
    """
    counts: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for example in train:
        counts[example.choices][example.answer] += 1
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
