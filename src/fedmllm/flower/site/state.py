"""An algorithm's state at a site, kept from round to round.

It is, for example, SCAFFOLD's control variate. It stays in the site's own folder,
`STATE/clients/RUN_ID/client-K/round-N.safetensors`. A request names the rounds whose updates the server counted, with the
digest that the site reported then; files of other rounds are removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedmllm.core.errors import FedmllmError, Reason
from fedmllm.core.tensors import params_digest
from fedmllm.core.types import Params
from fedmllm.federation.client_state import ClientStateStore

ANY_ROUND = 10**9


class LostState(FedmllmError):
    """The state that a site has to continue from is not there; the reason has the path for this machine's log alone."""


class SiteState:
    """The state of one client in one run.

    Args:
        folder: Of all runs at this site.
        run_id: Of the run; `Request` admits only hexadecimal digits.
        client: The site's number in that run.
    """

    def __init__(self, folder: Path, run_id: str, client: int) -> None:
        self._folder, self._client = folder / run_id, client

    def read(self, kept: Mapping[int, str]) -> Params:
        """The state after the last round that counted; {} if none did. Files of rounds that did not count are removed.

        Args:
            kept: Rounds that counted, with the digest of the state.

        Raises:
            LostState: The state of that round is missing here, damaged, or another run has replaced it. A site does not start
                from 0 instead: the server's own state holds a term for what the site kept (SCAFFOLD's c is the mean of the
                sites' c_i), which would then stay in it for the rest of the run.
        """
        if not kept and not self._folder.is_dir():
            return {}
        store = self._store()
        for round_ in store.rounds(self._client):
            if round_ not in kept:
                store.discard(round_, [self._client])
        if not kept:
            return {}
        last = max(kept)
        try:
            state = store.read(self._client, last + 1) if last in store.rounds(self._client) else {}
        except FedmllmError as error:
            raise LostState(Reason(f"the state of round {last} is damaged", str(error))) from None
        if not state:
            raise LostState(Reason(f"the state of round {last} is missing", str(self._folder)))
        if params_digest(state) != kept[last]:
            raise LostState(Reason(f"the state of round {last} belongs to another run", str(self._folder)))
        return state

    def write(self, round_: int, state: Params) -> str:
        """Store the state of a round.

        Returns:
            Its digest; "" if there is nothing to keep.
        """
        if not state:
            return ""
        store = self._store()
        store.write(self._client, round_, state)
        return (
            params_digest(state) if round_ in store.rounds(self._client) else ""
        )  # values that are not finite are not kept

    def _store(self) -> ClientStateStore:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return ClientStateStore(self._folder, ANY_ROUND)
