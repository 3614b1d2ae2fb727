"""Selection of a federation's best adapter on the validation rows."""

from __future__ import annotations

from fedmllm.algorithms.base import Aggregator
from fedmllm.core.errors import FedmllmError
from fedmllm.core.types import Params
from fedmllm.federation.rounds import Progress
from fedmllm.runs.checkpoint import Best, Checkpoint, read_checkpoint
from fedmllm.runs.evaluator import Evaluator
from fedmllm.runs.events import Validated


class Selection:
    """The best adapter so far by the data set's first metric. The test rows are never read."""

    def __init__(self, evaluator: Evaluator, aggregator: Aggregator, client: int | None) -> None:
        self._evaluator, self._aggregator, self._client = evaluator, aggregator, client
        self.best: Best | None = None
        self.params: Params | None = None

    def result(self, progress: Progress) -> Params:
        """The global model of a round as one adapter."""
        return self._aggregator.result(progress.params, progress.state)

    def restore(self, at: Checkpoint) -> None:
        """Return to the best adapter at the time of a checkpoint, read from its own checkpoint.

        Raises:
            FedmllmError: That checkpoint is missing or damaged.
        """
        self.best = at.run_state.best
        if self.best:
            folder = at.folder.with_name(f"round-{self.best.number:04d}")
            try:
                start, aggregator = self._evaluator.inputs.start, self._aggregator
                state = {**aggregator.init(start), **self._evaluator.inputs.experiment.privacy.init()}
                best = read_checkpoint(folder, start, state)
                self.params = aggregator.result(best.params, best.state)
            except FedmllmError as error:
                raise FedmllmError(f"{error}; {at.folder} names it as the best so far. Choose another --out") from None

    def evaluate(self, progress: Progress, number: int) -> Validated:
        """Evaluate the adapter of a round; among equal values the earlier one stays the best.

        Args:
            progress: The federation after the round.
            number: Of the round's checkpoint, over all of the run's federations.
        """
        inputs = self._evaluator.inputs
        name, visible = inputs.experiment.metrics()[0], inputs.experiment.evaluate.visible[0]
        result = self.result(progress)
        value = self._evaluator.metrics(self._evaluator.predict(result, inputs.validation, visible))[name]
        if value is not None and (self.best is None or value > self.best.value):
            self.best, self.params = Best(number=number, round=progress.round, value=value), result
        best_round = self.best.round if self.best else None
        return Validated(progress.round, name, value, visible, best_round, self._client)
