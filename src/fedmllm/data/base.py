"""Interface of data sets: `Dataset`, and the `Rows` of a loaded split."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from fedmllm.core.spec import Named
from fedmllm.core.types import Example, Modality, Visible

Split = Literal["train", "validation", "test"]
OnBadRow = Literal["fail", "skip"]


@dataclass(frozen=True)
class Rows:
    """A loaded split.

    Attributes:
        examples: The usable rows, in file order.
        skipped: One message per bad row that was left out, as its DataError reads.
        notes: Findings that a user should know but that stop nothing: files left out, words that may mean a missing value.
    """

    examples: Sequence[Example]
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Origin, licence and layout of a set. Nothing is downloaded.

    Attributes:
        title: Name of the set.
        get: Address, and what to do there.
        licence: Terms of use.
        tree: The files under `root`.
        paper: Identifier of the publication.
    """

    title: str
    get: str
    licence: str
    tree: str
    paper: str = ""


class Dataset(Named):
    """A data set: location of its rows, and how they are read.

    `columns` of each row hold at least "set", the name of the set that it comes from.
    """

    source: ClassVar[Source | None] = None  # None: embedded

    on_bad_row: OnBadRow = "fail"
    """Stop at the first row that cannot be used, or leave such rows out, counted and named."""

    @abstractmethod
    def load(self, split: Split) -> Rows:
        """Read the rows of a split. Opens no image.

        Args:
            split: Which rows.

        Returns:
            The usable rows; with `on_bad_row = "skip"` also one message per bad row.

        Raises:
            DataError: A file or a row cannot be used; names file, line and id.
        """

    @abstractmethod
    def modalities(self) -> tuple[Modality, ...]:
        """Modalities that a row of this set may have, in the order of flags and prompts.

        Returns:
            Names such as "image" and "text".
        """

    @abstractmethod
    def metrics(self) -> Sequence[str]:
        """Names of the metrics that the set is evaluated by; the first is the headline.

        Returns:
            At least one name, unless the set has no test rows.
        """

    def picture_modalities(self) -> frozenset[Modality] | None:
        """Modalities whose content is pictures; all others are texts.

        Returns:
            Names from `modalities()`; None = not known before the rows are read. By default "image" of image and text.
        """
        names = frozenset(self.modalities())
        return names & {"image"} if names <= {"image", "text"} else None

    def ceilings(self, visible: Visible) -> Mapping[str, float]:
        """Metric -> the best expected value that any model can reach on rows of which it sees `visible`.

        Empty if the law of the labels is not known, as for every real set.

        Args:
            visible: Modalities that the model sees.

        Returns:
            Name of a metric -> its ceiling, in the unit of the metric.
        """
        return {}

    def client_column(self) -> str:
        """The column that names each row's client, if the rows come from a real federation; else "".

        Returns:
            A key of `Example.columns`, or "".
        """
        return ""

    def group_column(self) -> str:
        """The column of groups, such as patients, that must not be in two splits; else "".

        Returns:
            A key of `Example.columns`, or "".
        """
        return ""

    def table_settings(self) -> dict[str, Any]:
        """Settings of the data set `table` that read further rows of this kind, for predictions.

        Returns:
            Keys of `table`, at least `columns`. By default each modality is a column of its name: "text" a text, any other one
            pictures.
        """
        images = [m for m in self.modalities() if m != "text"]
        columns: dict[str, Any] = (
            {"image": "image" if images == ["image"] else {m: m for m in images}} if images else {}
        )
        return {"columns": columns | ({"text": "text"} if "text" in self.modalities() else {})}

    def folders(self) -> tuple[Path, ...]:
        """The folders that hold the images; () if the set is embedded.

        Returns:
            Paths, each of which may be missing.
        """
        return ()


def hint(name: str) -> str:
    """The end of an error message about a folder that does not look as expected."""
    return f"`fedmllm data where {name}` lists the expected files"
