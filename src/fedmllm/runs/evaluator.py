"""Evaluation of adapters during a run: metrics on test and validation rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from fedmllm.core.types import Example, Params, visible_of
from fedmllm.federation.evaluation import judge, predict
from fedmllm.runs.events import Evaluated, Event
from fedmllm.runs.inputs import Inputs
from fedmllm.runs.record import finite

Scores = dict[str, dict[str, float | None]]  # visible modalities -> metric -> value


class Evaluator:
    """Evaluates adapters on the rows of a run and emits the results."""

    def __init__(self, inputs: Inputs, emit: Callable[[Event], None]) -> None:
        self.inputs, self._emit = inputs, emit

    def test(self, params: Params, round_: int | None = None, client: int | None = None) -> Scores:
        """Evaluate an adapter on the test rows, once for each entry of `evaluate.visible`.

        Args:
            params: The adapter.
            round_: The round after which it is evaluated, for the record.
            client: The client it belongs to, for method "local".

        Returns:
            Visible modalities -> metric -> value.
        """
        found: Scores = {}
        for visible in self.inputs.experiment.evaluate.visible:
            began = time.perf_counter()
            found[visible] = metrics = self.metrics(params, self.inputs.test, visible)
            wall_s = time.perf_counter() - began
            self._emit(Evaluated(visible, metrics, len(self.inputs.test), wall_s, round_, client))
        return found

    def metrics(self, params: Params, rows: Sequence[Example], visible: str) -> dict[str, float | None]:
        """Return metric -> value of an adapter on some rows."""
        e, backbone = self.inputs.experiment, self.inputs.backbone
        backbone.set_lora(params)
        predictions = predict(backbone, e.prompt, rows, visible_of(visible, e.data.modalities()), e.evaluate)
        return {name: finite(value) for name, value in judge(predictions, e.metrics()).items()}
