"""Which of the asked clients finish a round, and how much of it they get done. Loads no torch.

Sites of a real federation drop out and lag; a benchmark in which everybody always answers does not say what that costs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedmllm.core.rng import stream
from fedmllm.core.spec import Named

Rate = Annotated[float, Field(ge=0, le=1)]


class Availability(Named):
    """How reliable the clients are. Every (round, client) has a stream of its own, so neither cohort nor engine matters."""

    @abstractmethod
    def share(self, seed: int, round_: int, client: int) -> float:
        """Share of its steps in the round that the client gets done if asked, 0..1; 0 = it drops out."""


class Always(Availability):
    """Everybody who is asked answers in full."""

    name: Literal["always"] = "always"

    def share(self, seed: int, round_: int, client: int) -> float:
        return 1.0


class Unreliable(Availability):
    """An asked client drops out with `drop_rate`; else, with `straggle_rate`, it only gets `straggle_share` of its steps done.

    A client that drops out has received the adapter and sends nothing. A straggler sends what it has when the round ends,
    as in FedProx (Li et al., arXiv:1812.06127, section 5.2): its first steps at the rates that all of its steps would have.
    """

    name: Literal["unreliable"] = "unreliable"
    drop_rate: Rate = 0.0
    straggle_rate: Rate = 0.0
    straggle_share: float = Field(0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _someone_answers(self) -> Unreliable:
        if self.drop_rate == 1:
            raise ValueError("drop_rate = 1 leaves nobody to learn from; give less than 1")
        return self

    def share(self, seed: int, round_: int, client: int) -> float:
        drops, straggles = stream(seed, "availability", round_, client).random(2)
        if drops < self.drop_rate:
            return 0.0
        return self.straggle_share if straggles < self.straggle_rate else 1.0
