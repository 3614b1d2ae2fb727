"""Clients trained one after another in this process: the reference engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedmllm.config.engine import Engine
from fedmllm.core.types import ClientUpdate, Round, Sent
from fedmllm.federation.client import Clients


class InProcessEngine:
    """Engine: (round, what each client receives) -> their updates, in ascending client order."""

    def __init__(self, settings: Engine, clients: Clients) -> None:
        self._clients = clients

    def __call__(self, at: Round, sents: Mapping[int, Sent]) -> Iterator[ClientUpdate]:
        for client in sorted(sents):
            yield self._clients.update(client, at, sents[client])
