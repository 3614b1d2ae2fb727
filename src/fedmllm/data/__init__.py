"""Data sets: one file each. A Dataset is a Spec that loads Examples. Loads no torch, opens no image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedmllm.types import Example, Modality, Named

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Rows:
    """A loaded split: the usable rows in file order, and what was left out and why."""

    examples: tuple[Example, ...]
    skipped: tuple[str, ...] = ()  # one message a bad row, as DataError would have said it


class Dataset(Named):
    """Where the rows are and how they are read."""

    on_bad_row: Literal["fail", "skip"] = "fail"

    @abstractmethod
    def load(self, split: Split) -> Rows:
        """The rows of a split. Raises DataError naming file, line and id; with on_bad_row = "skip" they are counted."""

    @abstractmethod
    def modalities(self) -> tuple[Modality, ...]:
        """What a row of this set may show, in the order of flags and prompts."""

    @abstractmethod
    def metrics(self) -> Sequence[str]:
        """Names of the metrics that the set is judged by; the first is the headline."""
