"""Continuation of a stopped run from its last checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
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
    extends: bool = False  # the run had fewer rounds, which may be done

    @classmethod
    def find(cls, folder: RunFolder, experiment: Experiment) -> Resume:
        """Find where the run in a folder stands. Nothing large is loaded.

        Raises:
            ConfigError: The run has other settings; the message names each of them.
            FedmllmError: A file of the run cannot be read, or does not say of which run it is.
        """
        place = checkpoint.newest(folder.checkpoints)
        before = checkpoint.read_run_state(place).settings if place else recorded_settings(folder)
        odd = differences(before, experiment.identity()) if before is not None else []
        if place and before and is_longer(before, experiment):
            refuse_extension(folder, experiment)
            return cls(folder, place, extends=True)
        if odd:
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
        state = inputs.initial_state() if of_all else {}  # one client alone: FedAvg
        at = checkpoint.read_checkpoint(self.place, inputs.start, state)
        if odd := differences(at.run_state.digests, inputs.digests):
            raise ConfigError(
                f"{self.folder.path}: cannot be resumed: the digest of its {'; of its '.join(odd)}. Choose another --out"
            )
        return at


def is_longer(before: Mapping[str, Any], experiment: Experiment) -> bool:
    """True if an experiment is that of a run with more rounds, and nothing else differs."""
    now = experiment.identity()
    rounds = before.get("num_rounds")
    return (
        isinstance(rounds, int)
        and rounds < now["num_rounds"]
        and not differences({**before, "num_rounds": 0}, {**now, "num_rounds": 0})
    )


def refuse_extension(folder: RunFolder, experiment: Experiment) -> None:
    """Raise ConfigError if the first rounds of a longer run are not those of the shorter one."""
    if experiment.method != "federated":
        raise ConfigError(
            f"{folder.path}: num_rounds: only method 'federated' takes more rounds, got {experiment.method!r}, whose "
            "training budget depends on them. Choose another --out"
        )
    if experiment.privacy.name != "none":
        raise ConfigError(
            f"{folder.path}: num_rounds: cannot be raised with privacy {experiment.privacy.name!r}, whose guarantee is for a "
            "fixed number of rounds. Choose another --out"
        )
    if experiment.train.round_schedule != "constant":
        raise ConfigError(
            f"{folder.path}: num_rounds: cannot be raised with train.round_schedule = {experiment.train.round_schedule!r}: "
            "learning rates depend on the number of rounds, and the last ones are near 0. Allowed: a run with "
            f'round_schedule = "constant". To train on with new rates, start a new run from {folder.adapter()}: '
            "backbone.adapter"
        )


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
