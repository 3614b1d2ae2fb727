"""Control scenario: another scenario's complete rows alone."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import SerializeAsAny, field_validator

from fedmllm.core.types import Modality
from fedmllm.scenarios.masks import ClientRows, Masks, Missing, Scenario


class CompleteOnly(Scenario):
    """The rows that `of` leaves complete; a client keeps no other row.

    What a method gains from incomplete rows is the difference between `of` and this control: "missing" with rate 0.5
    leaves about a quarter of the rows complete, so most of its cost may be that of fewer rows.
    """

    drops_incomplete: ClassVar[bool] = True

    name: Literal["complete-only"] = "complete-only"
    of: SerializeAsAny[Scenario] = Missing()
    """Scenario whose complete rows are kept."""

    @field_validator("of", mode="before")
    @classmethod
    def _pick(cls, table: Any) -> Any:
        return Scenario.pick(table, "scenario.of")

    def check(self, modalities: tuple[Modality, ...], num_clients: int) -> None:
        self.of.check(modalities, num_clients)

    def hide(self, rows: ClientRows, modalities: tuple[Modality, ...], seed: int) -> Masks:
        return self.of.hide(rows, modalities, seed)

    def hide_as_published(self, rows: ClientRows) -> Masks:
        return self.of.hide_as_published(rows)
