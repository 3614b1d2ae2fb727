"""The server half of a federated algorithm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from fedmllm.core.spec import Named
from fedmllm.core.types import ClientUpdate, Params, State

Beta = Annotated[float, Field(ge=0, lt=1)]


class Aggregator(Named):
    """params and state before the round, the clients' updates -> params and state after it."""

    def least_updates(self) -> int:
        """How many updates a round must have for the formula to mean something."""
        return 1

    def init(self, params: Params) -> State:
        return {}

    def broadcast(self, state: State) -> Params:
        """What an asked client receives besides the adapter; {} = nothing."""
        return {}

    @abstractmethod
    def apply(self, params: Params, state: State, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        """One round. `updates` come in ascending client order and may be a stream: they are read once.

        Raises FedmllmError when there is nothing to average.
        """
