"""A site's half of secure aggregation.

The site trusts nothing that the server says about other sites: each key must be signed with the key that the site's own file
names for that site. The key of a run stays in memory. Which sites a round was summed over is stored, because two sums over
different sites differ by the updates of those that are in one only.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmllm.config.engine import LEAST_SITES
from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import write_atomically
from fedmllm.flower.request import Request
from fedmllm.flower.secure.fixed_point import Words
from fedmllm.flower.secure.layout import pack_words
from fedmllm.flower.secure.masks import add_masks, pair_key
from fedmllm.flower.secure.signing import canonical, is_signed, private_key, public_key, signature_of
from fedmllm.flower.secure.terms import Advert, Terms
from fedmllm.flower.site.config import Refused, Site

RUN_KEY, PAIR = "key of a run", "mask of a pair"
MOST_RUNS = 4  # whose keys are in memory


@dataclass
class RunKeys:
    """What a site keeps of one run, in memory."""

    private: X25519PrivateKey
    advert: Advert
    last_serial: int = 0
    pending: dict[int, dict[str, bytes]] = field(default_factory=dict)  # serial -> keys of the pairs, used once


class SecureMember:
    """A site in secure sums.

    Args:
        site: Its own file; `peers` are the sites that it trusts to be who they are.
        folder: Of the site's state.

    Raises:
        FedmllmError: The site's key or one of its peers' cannot be read, or one key has two names.
    """

    def __init__(self, site: Site, folder: Path) -> None:
        self._site, self._folder, self._lock = site, folder / "secure", threading.Lock()
        self._private = private_key(site.key)
        self._peers = {}
        for name, text in site.peers.items():
            try:
                self._peers[name] = public_key(text)
            except FedmllmError as error:
                raise FedmllmError(f"peers.{name}: {error}") from None
        self._peers.setdefault(site.name, self._private.public_key())
        points = {name: key.public_numbers() for name, key in self._peers.items()}
        if points[site.name] != self._private.public_key().public_numbers():
            raise FedmllmError(f"peers.{site.name}: not the public key of {site.key}")
        if len(set(points.values())) < len(points):
            raise FedmllmError("peers: one key has two names; each site has a key of its own")
        self._runs: OrderedDict[str, RunKeys] = OrderedDict()

    def advertise(self, run_id: str) -> Advert:
        """A new key of this site for a run; the one before is dropped.

        Args:
            run_id: Of the run.
        """
        private = X25519PrivateKey.generate()
        public = private.public_key().public_bytes_raw().hex()
        facts = {"run_id": run_id, "site": self._site.name, "public": public}
        advert = Advert(site=self._site.name, public=public, signature=signature_of(self._private, RUN_KEY, facts))
        with self._lock:
            self._runs[run_id] = RunKeys(private, advert)
            self._runs.move_to_end(run_id)
            while len(self._runs) > MOST_RUNS:
                self._runs.popitem(last=False)
        return advert

    def prepare(self, request: Request) -> None:
        """Check the terms of a request, before anything is trained, and derive the keys of its masks.

        Args:
            request: With `secure`.

        Raises:
            Refused: The site does not accept the terms.
        """
        terms = request.secure
        assert terms is not None
        with self._lock:
            run = self._runs.get(request.run_id)
            if run is None:
                raise self._refused("this site has no key of this run; it was restarted")
            if reasons := self._objections(request, terms, run):
                raise self._refused("; ".join(reasons))
            run.last_serial = terms.serial
            run.pending = {terms.serial: self._pair_keys(request, terms, run)}

    def mask(
        self, request: Request, delta: np.ndarray[Any, Any], num_examples: int, metrics: Mapping[str, float]
    ) -> Words:
        """This site's part of the sum. The keys of the masks are used up.

        Args:
            request: As `prepare` accepted it.
            delta: [P].
            num_examples: Rows of the site.
            metrics: Those that may leave it.

        Raises:
            Refused: The request was not prepared, or the update does not fit the terms.
        """
        terms = request.secure
        assert terms is not None
        with self._lock:
            run = self._runs.get(request.run_id)
            keys = run.pending.pop(terms.serial, None) if run else None
        if keys is None:
            raise self._refused(f"the keys of attempt {terms.serial} were used or dropped")
        try:
            words = pack_words(delta, num_examples, metrics, terms)
        except FedmllmError as error:
            raise self._refused(str(error)) from None
        with self._lock:
            if reason := self._other_sum(request, terms):
                raise self._refused(reason)
            self._commit(request, terms)  # before anything leaves
        return add_masks(words, self._site.name, keys)

    def _objections(self, request: Request, terms: Terms, run: RunKeys) -> list[str]:
        names, least = terms.names(), max(LEAST_SITES, self._site.allow.secure_sites)
        reasons = []
        if len(set(names)) != len(names) or len({a.public for a in terms.adverts}) != len(names):
            reasons.append("a site or a key of the secure sum comes twice")
        if len(set(names)) < least:
            reasons.append(f"a secure sum over {len(set(names))} sites; this site requires {least}")
        if run.advert not in terms.adverts:
            reasons.append("the secure sum is not over this site's key of the run")
        if terms.serial <= run.last_serial:
            reasons.append(f"attempt {terms.serial} comes after attempt {run.last_serial}; a key is used once")
        for advert in terms.adverts:
            facts = {"run_id": request.run_id, "site": advert.site, "public": advert.public}
            if advert.site not in self._peers:
                reasons.append(f"{advert.site[:100]} is not among the peers of this site's file")
            elif not is_signed(self._peers[advert.site], advert.signature, RUN_KEY, facts):
                reasons.append(f"the key of {advert.site} is not signed by that site for this run")
        if reason := self._other_sum(request, terms):
            reasons.append(reason)
        return reasons

    def _other_sum(self, request: Request, terms: Terms) -> str:
        """Why this sum and one that the site took part in would give away an update; "" = they would not."""
        before, names = self._summed(request.run_id).get(str(request.round), []), terms.names()
        if not before or before == names:
            return ""
        return (
            f"round {request.round} was summed over {', '.join(before)}; a sum over {', '.join(names)} would give away the "
            "difference"
        )

    def _pair_keys(self, request: Request, terms: Terms, run: RunKeys) -> dict[str, bytes]:
        """The key of each pair: of this run, round and attempt, and of all sites' keys."""
        adverts = [a.model_dump() for a in sorted(terms.adverts, key=lambda a: a.site)]
        attempt = {"run_id": request.run_id, "round": request.round, "serial": terms.serial, "adverts": adverts}
        keys = {}
        for advert in terms.adverts:
            if advert.site != self._site.name:
                pair = sorted([self._site.name, advert.site])
                context = canonical(PAIR, {**attempt, "pair": pair})
                try:
                    keys[advert.site] = pair_key(run.private, bytes.fromhex(advert.public), context)
                except FedmllmError as error:
                    raise self._refused(f"{advert.site}: {error}") from None
        return keys

    def _commit(self, request: Request, terms: Terms) -> None:
        summed = self._summed(request.run_id)
        if str(request.round) not in summed:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._file(request.run_id), json.dumps({**summed, str(request.round): terms.names()}))

    def _summed(self, run_id: str) -> dict[str, list[str]]:
        """Round -> the sites that it was summed over."""
        file = self._file(run_id)
        found: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return found

    def _file(self, run_id: str) -> Path:
        return self._folder / f"{run_id}.json"

    def _refused(self, reason: str) -> Refused:
        return Refused(self._site.refusal([reason]))
