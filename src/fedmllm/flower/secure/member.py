"""A site's half of secure aggregation.

The site trusts nothing that the server says about other sites: each key must be signed with the key that the site's own file
names for that site. Keys stay in memory. What a round was summed over is stored: two sums over different sites differ by the
updates of those that are in one only, and two over the same sites, asked in two ways, can be solved for single updates.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmllm.config.engine import LEAST_SITES, least_holders
from fedmllm.core.errors import ConfigError, FedmllmError, Reason
from fedmllm.core.spec import Spec, validate
from fedmllm.core.storage import write_atomically
from fedmllm.flower.request import Request
from fedmllm.flower.secure.attempt import Asked, Attempt, facts_of, mask_key
from fedmllm.flower.secure.layout import pack_words, word_form
from fedmllm.flower.secure.masks import add_masks, mask
from fedmllm.flower.secure.signing import is_signed, signature_of, site_private_key, site_public_key
from fedmllm.flower.secure.terms import Advert, Ask, Opened, Prepared, Terms
from fedmllm.flower.site.config import Refused, Site

RUN_KEY, ATTEMPT_KEY, ALIVE = "key of a run", "key of an attempt", "sites of a sum"
_T = TypeVar("_T")
MOST_RUNS = 4  # whose keys are in memory


class _Sum(Spec):
    """A sum that this site took part in."""

    sites: list[str]
    """Sorted."""
    asked: str
    """Digest of the request."""


class _Sums(Spec):
    """The sums of a run, as they are stored."""

    settings: str = ""
    """Digest of what is the same in all rounds."""
    rounds: dict[int, _Sum] = {}  # noqa: RUF012
    """By the number of the round."""


@dataclass
class RunKeys:
    """State of one run at a site, in memory."""

    private: X25519PrivateKey
    advert: Advert
    last_serial: int = 0
    attempt: Attempt | None = None  # the last one; its keys are used once


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
        self._private = site_private_key(site.key)
        self._peers = {}
        for name, text in site.peers.items():
            try:
                self._peers[name] = site_public_key(text)
            except FedmllmError as error:
                raise FedmllmError(f"peers.{name}: {error}") from None
        self._peers.setdefault(site.name, self._private.public_key())
        points = {name: key.public_numbers() for name, key in self._peers.items()}
        if points[site.name] != self._private.public_key().public_numbers():
            raise FedmllmError(f"peers.{site.name}: not the public key of {site.key}")
        if len(set(points.values())) < len(points):
            raise FedmllmError("peers: one key has two names; each site has a key of its own")
        self._runs: OrderedDict[str, RunKeys] = OrderedDict()

    def respond(self, ask: Ask) -> str:
        """Answer a request about keys and shares.

        Args:
            ask: From the server.

        Returns:
            JSON: an `Advert`, `Prepared` or `Opened`, or a signature in quotes.

        Raises:
            Refused: The site does not do that, with the reason.
        """
        if ask.op == "key":
            return self.advertise(ask.run_id).model_dump_json()
        if ask.op == "prepare":
            return self._guarded(lambda: self.share(ask)).model_dump_json()
        if ask.op == "sign":
            return json.dumps(self.sign(ask))
        return self.open(ask).model_dump_json()

    def advertise(self, run_id: str) -> Advert:
        """A new key of this site for a run; the one before is dropped.

        Args:
            run_id: Of the run.
        """
        private = X25519PrivateKey.generate()
        advert = self._advert(RUN_KEY, private.public_key().public_bytes_raw().hex(), {"run_id": run_id})
        with self._lock:
            self._runs[run_id] = RunKeys(private, advert)
            self._runs.move_to_end(run_id)
            while len(self._runs) > MOST_RUNS:
                self._runs.popitem(last=False)
        return advert

    def share(self, ask: Ask) -> Prepared:
        """Make the secrets of an attempt, and shares of them for all its sites.

        Args:
            ask: With the terms of the attempt.

        Raises:
            Refused: The site does not accept the terms.
        """
        if ask.terms is None or not ask.terms.threshold:
            raise self._refused("shares are for an attempt with a threshold")
        with self._lock:
            run = self._run(ask.run_id)
            attempt = self._begin(run, ask.run_id, ask.round, ask.terms)
            shares = attempt.shares_for(run.private, self._site.name, _publics(ask.terms))
            return Prepared(mask_key=self._advert(ATTEMPT_KEY, attempt.public(), attempt.facts), shares=shares)

    def prepare(self, request: Request, asked: Asked) -> None:
        """Check the terms of a request before anything is trained. The first one accepted fixes the settings of its run.

        Args:
            request: With `secure`.
            asked: Its digests.

        Raises:
            Refused: The site does not accept the terms.
        """
        terms = request.secure
        assert terms is not None
        with self._lock:
            run = self._run(request.run_id)
            if not terms.threshold:
                started = self._begin(run, request.run_id, request.round, terms)
                self._accept(request.run_id, request.round, started, asked)
                return
            attempt = run.attempt
            if attempt is None or attempt.facts != facts_of(request.run_id, request.round, terms) or attempt.received:
                raise self._refused(f"attempt {terms.serial} was not prepared as it is asked for, or it was used")
            if reasons := self._site.refuse_weights(terms):  # those of the shares may have been others
                raise self._refused("; ".join(reasons))
            known = {advert.site: advert for advert in terms.mask_keys}
            if sorted(known) != attempt.names or len(terms.mask_keys) != len(known):
                raise self._refused("the keys of the attempt are not those of its sites")
            if known[self._site.name].public != attempt.public():
                raise self._refused("the key of this site is not its own")
            for advert in terms.mask_keys:
                if not self._is_of(advert, ATTEMPT_KEY, attempt.facts):
                    raise self._refused(f"the key of {advert.site} is not signed by that site for this attempt")
            self._accept(request.run_id, request.round, attempt, asked)
            self._guarded(lambda: attempt.receive(run.private, self._site.name, _publics(terms), terms.shares))

    def mask(
        self,
        request: Request,
        common: str,
        delta: np.ndarray[Any, Any],
        num_examples: int,
        metrics: Mapping[str, float],
    ) -> bytes:
        """This site's part of the sum, as it travels. The keys of the masks are used up.

        Args:
            request: As `prepare` accepted it.
            common: `common_digest` of the request.
            delta: [P].
            num_examples: Rows of the site.
            metrics: Those that may leave it.

        Raises:
            Refused: The request was not prepared, or the update does not fit the terms.
        """
        terms = request.secure
        assert terms is not None
        facts = facts_of(request.run_id, request.round, terms)
        words = self._guarded(lambda: pack_words(delta, num_examples, metrics, terms))
        with self._lock:
            run = self._runs.get(request.run_id)
            attempt = run.attempt if run else None
            if run is None or attempt is None or attempt.masked or attempt.facts != facts:
                raise self._refused(f"the keys of attempt {terms.serial} were used or dropped")
            attempt.masked = True
            if not terms.threshold:
                self._commit(request.run_id, request.round, attempt.names, attempt.asked)  # before anything leaves
        own = attempt.private if terms.threshold else run.private
        peers = {a.site: a.public for a in (terms.mask_keys or terms.adverts) if a.site != self._site.name}
        keys = self._guarded(
            lambda: {
                peer: mask_key(facts, common, own, public, self._site.name, peer) for peer, public in peers.items()
            }
        )
        form = word_form(len(delta), terms)
        masked = add_masks(words, self._site.name, keys, form)
        if terms.threshold:
            masked += mask(attempt.seed, form)
        return form.to_bytes(masked)

    def sign(self, ask: Ask) -> str:
        """Sign which sites' updates are in the sum: one set for an attempt.

        Args:
            ask: With `serial` and `alive`.

        Returns:
            The signature.

        Raises:
            Refused: Another set was signed, or this one is too small, or without this site.
        """
        with self._lock:
            attempt, alive = self._masked(ask), list(ask.alive)
            least = max(LEAST_SITES, attempt.threshold, self._site.allow.secure_sites)
            if attempt.alive not in (None, alive):
                raise self._refused(f"this site signed another set of sites for attempt {ask.serial}")
            if alive != sorted(set(alive)) or not set(alive) <= set(attempt.names) or self._site.name not in alive:
                raise self._refused("a sum over other sites than those that were asked, or without this one")
            if len(alive) < least:
                raise self._refused(f"a secure sum over {len(alive)} sites; this attempt requires {least}")
            if reason := self._other_sum(ask.run_id, ask.round, alive):
                raise self._refused(reason)
            attempt.alive = alive
        return signature_of(self._private, ALIVE, {**attempt.facts, "alive": alive})

    def open(self, ask: Ask) -> Opened:
        """Give the shares that open a sum: of the own masks of the sites in it, and of the keys of those that are missing.

        Args:
            ask: With `serial`, `alive` and the signatures of that set.

        Raises:
            Refused: The site did not sign this set, or too few others did.
        """
        with self._lock:
            attempt, alive = self._masked(ask), list(ask.alive)
            if attempt.alive != alive:
                raise self._refused("shares for a set of sites that this site did not sign")
            facts = {**attempt.facts, "alive": alive}
            valid = [n for n in alive if is_signed(self._peers[n], ask.signatures.get(n, ""), ALIVE, facts)]
            if len(valid) < attempt.threshold:
                raise self._refused(f"{len(valid)} sites signed the set of sites; {attempt.threshold} are required")
            if reason := self._other_sum(ask.run_id, ask.round, alive):
                raise self._refused(reason)
            self._commit(ask.run_id, ask.round, alive, attempt.asked)
            return Opened(
                seeds={n: f"{attempt.received[n][0]:x}" for n in alive},
                keys={n: f"{attempt.received[n][1]:x}" for n in attempt.names if n not in alive},
            )

    def _run(self, run_id: str) -> RunKeys:
        run = self._runs.get(run_id)
        if run is None:
            raise self._refused("this site has no key of this run; it was restarted")
        return run

    def _masked(self, ask: Ask) -> Attempt:
        """The attempt that a request is about, if this site's update was sent in it."""
        attempt = self._run(ask.run_id).attempt
        here = attempt and (attempt.facts["serial"], attempt.facts["round"]) == (ask.serial, ask.round)
        if attempt is None or not here or not attempt.masked or not attempt.threshold:
            raise self._refused(f"attempt {ask.serial} at round {ask.round} has no update of this site")
        return attempt

    def _begin(self, run: RunKeys, run_id: str, round_: int, terms: Terms) -> Attempt:
        """Check the terms, and start an attempt that no other one shares a key with."""
        if reasons := self._objections(run_id, round_, terms, run):
            raise self._refused("; ".join(reasons))
        run.last_serial = terms.serial
        run.attempt = Attempt(facts_of(run_id, round_, terms), terms.names(), terms.threshold)
        return run.attempt

    def _advert(self, what: str, public: str, facts: Mapping[str, Any]) -> Advert:
        name = self._site.name
        signature = signature_of(self._private, what, {**facts, "site": name, "public": public})
        return Advert(site=name, public=public, signature=signature)

    def _is_of(self, advert: Advert, what: str, facts: Mapping[str, Any]) -> bool:
        key = self._peers.get(advert.site)
        stated = {**facts, "site": advert.site, "public": advert.public}
        return key is not None and is_signed(key, advert.signature, what, stated)

    def _guarded(self, function: Callable[[], _T]) -> _T:
        """The function's result; its error as a refusal."""
        try:
            return function()
        except Refused:
            raise
        except FedmllmError as error:
            raise self._refused(Reason.of(error)) from None

    def _objections(self, run_id: str, round_: int, terms: Terms, run: RunKeys) -> list[str]:
        names, least = terms.names(), max(LEAST_SITES, self._site.allow.secure_sites)
        reasons = self._site.refuse_weights(terms)
        if len(set(names)) != len(names) or len({a.public for a in terms.adverts}) != len(names):
            reasons.append("a site or a key of the secure sum comes twice")
        if len(set(names)) < least:
            reasons.append(f"a secure sum over {len(set(names))} sites; this site requires {least}")
        if terms.threshold and not least_holders(len(names)) <= terms.threshold <= len(names):
            allowed = f"{least_holders(len(names))} to {len(names)}"
            reasons.append(f"{terms.threshold} of {len(names)} sites could open a sum; this site requires {allowed}")
        if run.advert not in terms.adverts:
            reasons.append("the secure sum is not over this site's key of the run")
        if terms.serial <= run.last_serial:
            reasons.append(f"attempt {terms.serial} comes after attempt {run.last_serial}; a key is used once")
        for advert in terms.adverts:
            if advert.site not in self._peers:
                reasons.append(f"{advert.site[:100]} is not among the peers of this site's file")
            elif not self._is_of(advert, RUN_KEY, {"run_id": run_id}):
                reasons.append(f"the key of {advert.site} is not signed by that site for this run")
        if not terms.threshold and (reason := self._other_sum(run_id, round_, names)):
            reasons.append(reason)
        return reasons

    def _other_sum(self, run_id: str, round_: int, names: list[str]) -> str:
        """Why this sum and one that the site took part in would give away an update; "" = they would not."""
        before = self._known(run_id).rounds.get(round_)
        if before is None or before.sites == names:
            return ""
        was, now = ", ".join(before.sites), ", ".join(names)
        return f"round {round_} was summed over {was}; a sum over {now} would give away the difference"

    def _accept(self, run_id: str, round_: int, attempt: Attempt, asked: Asked) -> None:
        """Refuse a request unlike those before it: another one in a round that was summed, or other settings in the run."""
        known = self._known(run_id)
        if known.settings not in ("", asked.run):
            raise self._refused(
                f"run {run_id} was asked for with other settings; sums of one run with two settings can be solved for an update"
            )
        before = known.rounds.get(round_)
        if before is not None and before.asked != asked.round:
            raise self._refused(
                f"round {round_} was summed after another request; two sums over the same sites can be solved for an update"
            )
        if not known.settings:
            self._store(run_id, known.model_copy(update={"settings": asked.run}))
        attempt.asked = asked

    def _commit(self, run_id: str, round_: int, names: list[str], asked: Asked | None) -> None:
        if asked is None:
            raise self._refused(f"round {round_} was not prepared")
        if reason := self._other_sum(run_id, round_, names):
            raise self._refused(reason)
        known = self._known(run_id)
        if round_ not in known.rounds:
            rounds = {**known.rounds, round_: _Sum(sites=names, asked=asked.round)}
            self._store(run_id, known.model_copy(update={"rounds": rounds}))
        elif known.rounds[round_].asked != asked.round:  # summed by an attempt that began before this one
            raise self._refused(f"round {round_} was summed after another request")

    def _known(self, run_id: str) -> _Sums:
        """Return the sums that the site took part in. Raises Refused if they cannot be read."""
        file = self._file(run_id)
        if not file.exists():
            return _Sums()
        try:
            return cast("_Sums", validate(_Sums, json.loads(file.read_text(encoding="utf-8")), "sums"))
        except (ConfigError, OSError, ValueError) as error:
            print(f"site {self._site.name}: {file}: {error}", file=sys.stderr, flush=True)
            raise self._refused(f"what run {run_id} was summed over cannot be read here") from None

    def _store(self, run_id: str, sums: _Sums) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(self._file(run_id), sums.model_dump_json())

    def _file(self, run_id: str) -> Path:
        return self._folder / f"{run_id}.json"

    def _refused(self, reason: str) -> Refused:
        return Refused(self._site.refusal([reason]))


def _publics(terms: Terms) -> dict[str, str]:
    return {advert.site: advert.public for advert in terms.adverts}
