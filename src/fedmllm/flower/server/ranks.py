"""Ranks of real sites, which have limits of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Message, RecordDict

from fedmllm.core.types import Round
from fedmllm.flower.wire import ABOUT, LARGEST_RANK

if TYPE_CHECKING:
    from fedmllm.flower.server.server_app import Sites


class SiteRanks:
    """The rank of each site: the least of what the experiment assigns and what the site allows.

    A site is asked before the first round that it takes part in, and once per start of the run. One that is not connected, or
    whose release does not know the question, has the assigned rank, which it refuses if that is too large.

    Args:
        sites: The engine, which exchanges the messages.
        full: Rank of the global adapter.
    """

    def __init__(self, sites: Sites, full: int) -> None:
        self._sites, self._full = sites, full
        self._largest: dict[int, int] = {}  # 0 = any, or no usable answer
        self._waits = True  # for sites that are not connected: once, since the round waits for them, too

    def largest(self, client: int) -> int:
        """The largest rank that a site has stated; 0 = any, or not known."""
        return self._largest.get(client, 0)

    def __call__(self, at: Round) -> tuple[int, ...]:
        """Return the ranks of all sites in a round.

        Args:
            at: The round with the assigned ranks.

        Returns:
            One rank per site, or `at.ranks` if no site has a lower limit.
        """
        if unknown := [k for k in at.cohort if k not in self._largest]:
            since = self._sites.connected(unknown, wait=self._waits)
            question = RecordDict({ABOUT: ConfigRecord({LARGEST_RANK: 0})})
            for client, reply in self._sites.exchange(at, since, dict.fromkeys(since, question)):
                if not isinstance(reply, str):
                    self._largest[client] = stated_limit(reply)
            self._waits = False
        clients = range(len(self._sites.names))
        assigned = [at.rank(k) or self._full for k in clients]
        ranks = [min(rank, self.largest(k) or rank) for k, rank in zip(clients, assigned, strict=True)]
        return at.ranks if ranks == assigned else tuple(ranks)


def stated_limit(reply: Message) -> int:
    """The largest rank in a site's reply; 0 = any, or the reply has none. Nothing in it can raise."""
    try:
        rank = reply.content[ABOUT][LARGEST_RANK]
    except Exception:  # a refusal, or arbitrary input from the network
        return 0
    return rank if isinstance(rank, int) and rank > 0 else 0
