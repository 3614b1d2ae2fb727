"""Data sets: one file each. A Dataset is a Spec that loads Examples. Loads no torch, opens no image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from fedmllm.core.spec import Named
from fedmllm.core.types import Example, Modality, Visible

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Rows:
    """A loaded split: the usable rows in file order, and what was left out and why."""

    examples: tuple[Example, ...]
    skipped: tuple[str, ...] = ()  # one message a bad row, as DataError would have said it


@dataclass(frozen=True)
class Source:
    """Where a user gets a set, on what terms, and what its folder looks like. Nothing is ever downloaded for them."""

    title: str
    get: str  # address, and what to do there
    licence: str
    tree: str  # the files under `root`
    paper: str = ""


class Dataset(Named):
    """Where the rows are and how they are read.

    Each row's `columns` hold at least "set", the name of the set that it comes from.
    """

    source: ClassVar[Source | None] = None  # None: embedded, there is nothing to get

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

    def ceilings(self, visible: Visible) -> Mapping[str, float]:
        """Metric -> the best expected value that any model can reach on rows of which it sees `visible`.

        Empty if the law of the labels is not known, as for every real set.
        """
        return {}

    def client_column(self) -> str:
        """The column that names each row's client, where the rows come from a real federation; else ""."""
        return ""

    def folders(self) -> tuple[Path, ...]:
        """The folders that pictures lie in; () where the set is embedded."""
        return ()


def hint(name: str) -> str:
    """How an error message tells a user what the folder should look like."""
    return f"`fedmllm data where {name}` shows the expected files"
