"""Checkpoints during a run: after which rounds, and with which state."""

from __future__ import annotations

from collections.abc import Sequence

from fedmllm.config.experiment import Experiment
from fedmllm.federation.rounds import Progress
from fedmllm.runs.adapter import adapter_config_json
from fedmllm.runs.checkpoint import Best, Checkpoints, RunState
from fedmllm.runs.costs import Totals
from fedmllm.runs.evaluator import Scores
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.inputs import Inputs, device, versions
from fedmllm.runs.predictions import PredictionFile
from fedmllm.runs.record import Record


class Checkpointer:
    """Writes the checkpoints of a run."""

    def __init__(self, inputs: Inputs, folder: RunFolder, record: Record, predictions: PredictionFile) -> None:
        self._inputs, self._folder, self._record, self._predictions = inputs, folder, record, predictions
        self._identity = inputs.experiment.identity()
        self._checkpoints: Checkpoints | None = None

    def save(
        self,
        progress: Progress,
        client: int | None,
        best: Best | None,
        totals: Totals,
        results: Sequence[Scores],
        wall_s: float,
    ) -> None:
        """Save the state after a round; the file system's work is done by a thread.

        Args:
            progress: The federation after the round.
            client: Whose training alone it is, for method "local".
            best: The best adapter before this round was evaluated.
            totals: Costs of the run up to and with this round.
            results: Of the clients that are finished, for method "local".
            wall_s: Seconds of the run so far.

        Raises:
            FedmllmError: The checkpoint before could not be written.
        """
        if not self._checkpoints:
            config = adapter_config_json(self._inputs.backbone, self._folder.checkpoints)
            keep = self._inputs.experiment.checkpoint.keep
            self._checkpoints = Checkpoints(self._folder.checkpoints, keep, config, self._sync)
        run_state = RunState(
            round=progress.round,
            client=client,
            totals=totals,
            results=tuple(results),
            best=best,
            wall_s=wall_s,
            record_bytes=self._record.num_bytes(),
            prediction_bytes=self._predictions.num_bytes(),
            settings=self._identity,
            digests=self._inputs.digests,
            versions=versions(),
            device=device(self._inputs),
        )
        self._checkpoints.save(run_state, progress.params, progress.state)

    def _sync(self) -> None:
        self._predictions.sync()
        self._record.sync()

    def wait(self) -> None:
        """Wait until every checkpoint is on the disk."""
        if self._checkpoints:
            self._checkpoints.wait()

    def close(self) -> None:
        """End the thread; the checkpoint that it is writing is finished first."""
        if self._checkpoints:
            self._checkpoints.close()


def is_due(experiment: Experiment, round_: int, num_rounds: int) -> bool:
    """Return whether a checkpoint follows a round: by `checkpoint.every`, before every validation, and after the last round."""
    evaluate = experiment.evaluate
    validated = evaluate.select == "validation" and round_ % evaluate.every == 0
    return validated or round_ % experiment.checkpoint.every == 0 or round_ == num_rounds
