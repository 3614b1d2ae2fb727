"""Importance of each modality for a client, by occlusion."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedmllm.backbones.base import Backbone
from fedmllm.backbones.frozen import installed
from fedmllm.core.types import Example, Modality, Params
from fedmllm.data.prompts import Prompt
from fedmllm.scenarios.modalities.dropout import coalitions, shapley

BATCH_ROWS = 16  # rows that are scored at once


def importance(
    backbone: Backbone, prompt: Prompt, rows: Sequence[Example], modalities: Sequence[Modality], adapter: Params
) -> dict[Modality, float]:
    """Mean Shapley values of the modalities over some rows, in nats.

    v(S) is the log probability of the row's answer among its choices, or of the whole text of an open answer, if the model sees
    the modalities S.

    Args:
        backbone: The model.
        prompt: How rows are worded.
        rows: Complete rows.
        modalities: Of the data set.
        adapter: With which the model answers.

    Returns:
        Modality -> value; {} without rows.
    """
    if not rows:
        return {}
    with installed(backbone, adapter):
        values = {}
        for visible in coalitions(modalities):
            total = 0.0
            for start in range(0, len(rows), BATCH_ROWS):
                batch = rows[start : start + BATCH_ROWS]
                options = [prompt.options(row) or (prompt.target(row),) for row in batch]
                found = backbone.score([prompt.render(row, visible) for row in batch], options)
                total += sum(_log_probability(row, scores) for row, scores in zip(batch, found, strict=True))
            values[visible] = total / len(rows)
    return shapley(values, modalities)


def _log_probability(row: Example, scores: Sequence[float]) -> float:
    if not row.choices:
        return scores[0]
    largest = max(scores)
    return scores[row.choices.index(row.answer)] - largest - math.log(sum(math.exp(s - largest) for s in scores))
