"""Availability of clients: dropouts and stragglers.

Sites of a real federation drop out and lag; a benchmark with clients that always respond hides the cost of that.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedmllm.core.rng import stream
from fedmllm.core.spec import Named

Rate = Annotated[float, Field(ge=0, le=1)]


class Availability(Named):
    """Reliability of the clients. Every (round, client) has its own random stream, so neither cohort nor engine matters."""

    @abstractmethod
    def share(self, seed: int, round_: int, client: int) -> float:
        """Share of its local steps that a sampled client completes.

        Args:
            seed: Seed of the experiment.
            round_: Round, from 1.
            client: Number of the client.

        Returns:
            0 to 1; 0 = the client drops out.
        """


class Always(Availability):
    """Every sampled client completes the round."""

    name: Literal["always"] = "always"

    def share(self, seed: int, round_: int, client: int) -> float:
        return 1.0


class Unreliable(Availability):
    """A sampled client drops out with `drop_rate`; otherwise, with `straggle_rate`, it completes `straggle_share` of its steps.

    A client that drops out has received the adapter and sends nothing. A straggler sends its state at the end of the round,
    as in FedProx (Li et al., arXiv:1812.06127, section 5.2): its first steps at the rates that all of its steps would have.
    """

    name: Literal["unreliable"] = "unreliable"
    drop_rate: Rate = 0.0
    """Probability that a sampled client drops out of a round."""
    straggle_rate: Rate = 0.0
    """Probability that a client which does not drop out is a straggler."""
    straggle_share: float = Field(0.5, gt=0, le=1)
    """Share of its steps that a straggler completes."""

    @model_validator(mode="after")
    def _someone_answers(self) -> Unreliable:
        if self.drop_rate == 1:
            raise ValueError("drop_rate = 1 leaves no client to learn from; give less than 1")
        return self

    def share(self, seed: int, round_: int, client: int) -> float:
        drops, straggles = stream(seed, "availability", round_, client).random(2)
        if drops < self.drop_rate:
            return 0.0
        return self.straggle_share if straggles < self.straggle_rate else 1.0
