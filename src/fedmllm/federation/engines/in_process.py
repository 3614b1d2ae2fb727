"""One client after another in this process: the engine that the others are measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedmllm.config.engine import Engine
from fedmllm.core.types import ClientUpdate, Params
from fedmllm.federation.client import Clients


class InProcess:
    """Engine: (params, round, cohort) -> the cohort's updates, in ascending client order."""

    def __init__(self, settings: Engine, clients: Clients) -> None:
        self._clients = clients

    def __call__(self, params: Params, round_: int, cohort: Sequence[int]) -> Iterator[ClientUpdate]:
        for client in sorted(cohort):
            yield self._clients.update(client, round_, params)
