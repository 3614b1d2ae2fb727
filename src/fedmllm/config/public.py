"""Settings of public rows."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeInt, SerializeAsAny, field_validator, model_validator

from fedmllm.core.errors import ConfigError
from fedmllm.core.spec import Spec
from fedmllm.core.types import Example
from fedmllm.data.base import Dataset
from fedmllm.data.pictures import check_rows


class Public(Spec):
    """Complete rows that all may read: for a completion, a relation, or as one more client."""

    rows: NonNegativeInt = 0
    """Number of public rows, the first complete ones; 0 = none."""
    data: SerializeAsAny[Dataset] | None = None
    """The set that they are from; left out = that of the experiment."""
    split: Literal["train", "validation"] = "validation"
    """The split that they are from; of the experiment's own set it is "validation", whose rows no client holds."""
    client: bool = False
    """Add a client that holds the public rows. The control of every method that reads them."""

    @field_validator("data", mode="before")
    @classmethod
    def _pick(cls, table: Any) -> Any:
        return None if table is None else Dataset.pick(table, "public.data")

    @model_validator(mode="after")
    def _rows_are_not_the_clients_own(self) -> Public:
        if not self.rows and (self.data is not None or self.client or self.split != "validation"):
            raise ValueError("rows: got 0; data, split and client have no effect without public rows")
        if self.data is None and self.split == "train":
            raise ValueError("split: got \"train\" of the experiment's own set, whose rows are the clients'; set data")
        return self

    def load(self, own: Dataset) -> tuple[Example, ...]:
        """Read the public rows.

        Args:
            own: The experiment's data set.

        Returns:
            Complete rows, in the order of the file.

        Raises:
            ConfigError: The set has other modalities than the experiment's, or fewer complete rows.
            DataError: A row cannot be used.
        """
        data = self.data or own
        modalities = frozenset(own.modalities())
        if frozenset(data.modalities()) != modalities:
            raise ConfigError(
                f"public.data: {data.name} has {', '.join(data.modalities())}; the experiment's rows have "
                f"{', '.join(own.modalities())}"
            )
        complete = [row for row in data.load(self.split).examples if modalities <= row.fields.keys()]
        if len(complete) < self.rows:
            raise ConfigError(
                f"public.rows: got {self.rows}; {data.name} has {len(complete)} complete rows in its {self.split} split"
            )
        usable, _, _ = check_rows(tuple(complete[: self.rows]), modalities, "fail")
        return usable
