"""Predictions and metrics of an adapter.

Closed questions are scored by the likelihood of each option, open ones by greedy text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from fedmllm.backbones.base import Backbone
from fedmllm.config.train import Evaluate
from fedmllm.core.answers import parse_open
from fedmllm.core.errors import DataError, FedmllmError
from fedmllm.core.metrics import METRICS
from fedmllm.core.types import Conversation, Example, Prediction, Visible
from fedmllm.data.prompts import Prompt
from fedmllm.scenarios.modalities.completion import Completer

_T = TypeVar("_T")
_A = TypeVar("_A")


def predict(
    backbone: Backbone,
    prompt: Prompt,
    examples: Sequence[Example],
    visible: Visible,
    settings: Evaluate,
    completer: Completer | None = None,
) -> list[Prediction]:
    """One prediction a row, in the order of the rows; rows are batched with others of about their length.

    A completer fills or converts what the model sees of a row; options, answers and predictions stay those of the row. What
    it computes in batches is computed by its `warm` before.
    """
    if completer:
        completed = [completer(example, visible, training=False) for example in examples]
        conversations = [prompt.render(example, present) for example, present in completed]
    else:
        conversations = [prompt.render(example, visible) for example in examples]
    closed = [i for i, example in enumerate(examples) if example.choices]
    opened = [i for i, example in enumerate(examples) if not example.choices]
    made: dict[int, Prediction] = {}
    for batch in _batches(closed, conversations, settings.batch_size):
        options = [prompt.options(examples[i]) for i in batch]
        for i, scores in zip(batch, _named(backbone.score, examples, batch, conversations, options), strict=True):
            if any(map(math.isnan, scores)):
                raise DataError(
                    f"{examples[i].where}, id {examples[i].id}: the model's scores are NaN; has it diverged?"
                )
            made[i] = Prediction(examples[i], scores=tuple(scores), text=None)
    for batch in _batches(opened, conversations, settings.batch_size):
        texts = _named(backbone.generate, examples, batch, conversations, settings.max_new_tokens)
        for i, raw in zip(batch, texts, strict=True):
            made[i] = Prediction(examples[i], scores=(), text=parse_open(raw), raw=raw)
    return [made[i] for i in range(len(examples))]


def _batches(rows: Sequence[int], conversations: Sequence[Conversation], size: int) -> list[list[int]]:
    ordered = sorted(rows, key=lambda i: (len(conversations[i].pictures), len(conversations[i].text), i))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _named(
    answer: Callable[[Sequence[Conversation], _A], Sequence[_T]],
    examples: Sequence[Example],
    batch: Sequence[int],
    conversations: Sequence[Conversation],
    argument: _A,
) -> Sequence[_T]:
    try:
        return answer([conversations[i] for i in batch], argument)
    except FedmllmError as error:
        places = ", ".join(f"{examples[i].where} (id {examples[i].id})" for i in batch[:3])
        raise DataError(f"test rows {places}{', ...' if len(batch) > 3 else ''}: {error}") from error


def metrics_of(predictions: Sequence[Prediction], names: Sequence[str]) -> dict[str, float | None]:
    """Metric name -> value; None if the rows do not define it. Unparsable answers are reported as `unparsed`."""
    return {name: METRICS[name](predictions) for name in dict.fromkeys([*names, "unparsed"])}
