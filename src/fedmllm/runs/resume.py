"""Continuation of a stopped run from its last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.runs import checkpoint
from fedmllm.runs.checkpoint import Checkpoint
from fedmllm.runs.fingerprint import differences
from fedmllm.runs.folder import RECORD, RunFolder
from fedmllm.runs.inputs import Inputs
from fedmllm.runs.record import read


@dataclass(frozen=True)
class Resume:
    """The point from which a run continues: its last checkpoint, or the beginning."""

    folder: RunFolder
    place: Path | None  # of the last checkpoint

    @classmethod
    def find(cls, folder: RunFolder, experiment: Experiment) -> Resume:
        """Find where the run in a folder stands. Nothing large is loaded.

        Raises:
            ConfigError: The run has other settings; the message names each of them.
            FedmllmError: A file of the run cannot be read, or does not say of which run it is.
        """
        place = checkpoint.newest(folder.checkpoints)
        before = checkpoint.read_run_state(place).settings if place else recorded_settings(folder)
        if before is not None and (odd := differences(before, experiment.identity())):
            raise ConfigError(
                f"{folder.path}: cannot be resumed with other settings: {'; '.join(odd)}. Choose another --out"
            )
        return cls(folder, place)

    def check(self, inputs: Inputs) -> Checkpoint | None:
        """Read the checkpoint and compare it with what the run is about.

        Returns:
            The checkpoint; None if the run begins at the beginning.

        Raises:
            ConfigError: The rows, their partition or the base model differ.
            FedmllmError: The checkpoint is damaged.
        """
        if not self.place:
            return None
        of_all = checkpoint.read_run_state(self.place).client is None
        state = inputs.experiment.initial_state(inputs.start) if of_all else {}  # one client alone: FedAvg
        at = checkpoint.read(self.place, inputs.start, state)
        if odd := differences(at.run_state.digests, inputs.digests):
            raise ConfigError(
                f"{self.folder.path}: cannot be resumed: the digest of its {'; of its '.join(odd)}. Choose another --out"
            )
        return at


def recorded_settings(folder: RunFolder) -> dict[str, Any] | None:
    """Return the identity of the run in a folder by its record's first line; None if no run began there."""
    first = next(read(folder.record), {})
    if not first and folder.is_finished:
        raise FedmllmError(f"{folder.summary}: {RECORD} does not say what it is of; choose another --out")
    if first.get("event") != "experiment":
        return None
    settings = first.get("settings")
    if not isinstance(settings, dict):
        raise FedmllmError(f"{folder.record}:1: no settings in it, so it cannot be continued; choose another --out")
    return Experiment.parse(settings, str(folder.record)).identity()
