"""Evaluation of adapters during a run: metrics on test and validation rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from fedmllm.backbones.frozen import installed
from fedmllm.core.types import Example, Params, Prediction, visible_of
from fedmllm.federation.evaluation import metrics_of, predict
from fedmllm.runs.events import Evaluated, Sink
from fedmllm.runs.grading import judge_of
from fedmllm.runs.inputs import Inputs
from fedmllm.runs.own_rows import as_scores, own_metrics
from fedmllm.runs.predictions import PredictionFile
from fedmllm.runs.record import finite

Scores = dict[str, dict[str, float | None]]  # visible modalities -> metric -> value


class Evaluator:
    """Evaluates adapters on the rows of a run, emits the metrics and keeps the predictions for the test rows."""

    def __init__(self, inputs: Inputs, emit: Sink, kept: PredictionFile) -> None:
        self.inputs, self._emit, self._kept = inputs, emit, kept
        self._judge = judge_of(inputs.experiment.evaluate.grader, kept.path.parent)

    def test(
        self,
        params: Params | Callable[[str], Params],
        round_: int | None = None,
        client: int | None = None,
        node: str = "",
    ) -> Scores:
        """Evaluate an adapter on the test rows, once for each entry of `evaluate.visible`.

        Args:
            params: The adapter, or a function of the visible modalities that gives it.
            round_: The round after which it is evaluated, for the record.
            client: The client it belongs to, for method "local".
            node: Which of a graph's adapters it is, if it is not the result; its predictions are not kept.

        Returns:
            Visible modalities -> metric -> value, and the values on clients' own test rows (`as_scores`).
        """
        found: Scores = {}
        for visible in self.inputs.experiment.evaluate.visible:
            began = time.perf_counter()
            adapter = params(visible) if callable(params) else params
            predictions = self._judge(self.predict(adapter, self.inputs.test, visible))
            metrics = self.metrics(predictions)
            own = own_metrics(self.inputs.own_rows, predictions, self.metrics, client)
            found[visible] = metrics | as_scores(own)
            wall_s = time.perf_counter() - began
            if not node:
                self._kept.write(predictions, visible, round_, client)
            self._emit(
                Evaluated(visible, metrics, len(self.inputs.test), wall_s, round_, client, node, own=own or None)
            )
        return found

    def predict(self, params: Params, rows: Sequence[Example], visible: str) -> list[Prediction]:
        """Return the predictions of an adapter for some rows."""
        e, backbone = self.inputs.experiment, self.inputs.backbone
        present, completer = visible_of(visible, e.data.modalities()), self.inputs.completer
        if completer:  # before an adapter is installed that a frozen answer must not depend on
            completer.warm([(row, present) for row in rows], training=False)
        with installed(backbone, params):
            return predict(backbone, e.prompt, rows, present, e.evaluate, completer)

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float | None]:
        """Return metric -> value; None if the rows do not define it."""
        names = self.inputs.experiment.metrics()
        return {name: finite(value) for name, value in metrics_of(predictions, names).items()}

    def baseline(self, predictions: Sequence[Prediction], one_hot: bool = False) -> Scores:
        """Evaluate predictions made without a model, and without any modality.

        Args:
            predictions: One per test row.
            one_hot: The scores only mark the answer (method "majority").

        Returns:
            As `test`.
        """
        predictions = self._judge(predictions)
        metrics = self.metrics(predictions)
        self._kept.write(predictions, "none", one_hot=one_hot)
        self._emit(Evaluated("none", metrics, len(predictions), wall_s=0.0))
        return {"none": metrics}
