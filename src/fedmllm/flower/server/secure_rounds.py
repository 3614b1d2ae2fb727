"""Server's half of secure aggregation.

Each round is one masked sum over all sites of its cohort. All or nothing: if a site is missing, its masks stay in the sum and
nothing can be read. The same sites are then asked again with new keys, `engine.attempts` times; a sum over fewer sites would
give away the missing ones' updates if these are only late.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedmllm.config.engine import SecureAggregation
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.spec import validate
from fedmllm.core.tensors import manifest_digest, unflatten
from fedmllm.core.types import ClientFailure, ClientUpdate, Params, Round, Sent
from fedmllm.flower.secure.fixed_point import WORD_BYTES, Words, from_bytes
from fedmllm.flower.secure.layout import SUMMED_METRICS, unpack_sum
from fedmllm.flower.secure.terms import KEY, Advert, Terms
from fedmllm.flower.wire import ABOUT, REFUSED, SECURE, legible, masked_data

if TYPE_CHECKING:
    from fedmllm.flower.server.server_app import Sites


class SecureRounds:
    """The rounds of one run.

    Args:
        sites: The engine, which exchanges the messages.
        settings: `engine.secure`.
    """

    def __init__(self, sites: Sites, settings: SecureAggregation) -> None:
        self._sites, self._settings = sites, settings
        self._run_id = sites.experiment.run_id()
        self._max_norm = sites.experiment.update_filter.max_norm
        self._adverts: dict[int, Advert] = {}
        self._serial = 0

    def round(self, at: Round, sents: Mapping[int, Sent]) -> list[ClientUpdate | ClientFailure]:
        """Ask all sites of the cohort, until all of them have answered one attempt.

        Args:
            at: The round.
            sents: What each client receives.

        Returns:
            One update: the mean over the cohort.

        Raises:
            FedmllmError: No attempt had an answer of every site.
        """
        s, reasons = self._sites.settings, dict[int, str]()
        for attempt in range(1, s.attempts + 1):
            try:
                return [self._attempt(at, sents)]
            except _Missing as missing:
                reasons = missing.reasons
                self._adverts.clear()  # a site that was restarted has another key
            if attempt < s.attempts:
                time.sleep(s.retry_s)
        said = "; ".join(f"{self._sites.names[k]}: {reason}" for k, reason in sorted(reasons.items()))
        raise FedmllmError(
            f"round {at.number}: no sum over all {len(sents)} sites, which engine.secure requires, after {s.attempts} attempts "
            f"({said}). --resume continues from round {at.number - 1}"
        )

    def _attempt(self, at: Round, sents: Mapping[int, Sent]) -> ClientUpdate:
        since = self._sites.connected(list(sents))
        if away := set(sents) - set(since):
            raise _Missing(dict.fromkeys(away, "not connected"))
        self._learn_keys(at, since)
        terms = self._terms(sorted(sents))
        like = next(iter(sents.values())).returned()
        replies, reasons, received = dict[int, Message](), dict[int, str](), set[int]()
        num_params = sum(t.numel() for t in like.values())
        total = np.zeros(num_params + 1 + 2 * len(SUMMED_METRICS), dtype=np.uint64)
        for client, reply in self._sites.exchange(at, since, self._sites.requests(at, sents, terms)):
            try:
                total += read_words(reply, len(total), like)
                replies[client] = cast("Message", reply)
                received.add(client)
            except FedmllmError as error:
                reasons[client] = str(error)
        if reasons:
            raise _Missing(reasons)
        return self._opened(at, total, like, replies, terms)

    def _opened(
        self, at: Round, total: Words, like: Params, replies: Mapping[int, Message], terms: Terms
    ) -> ClientUpdate:
        clients = tuple(sorted(replies))
        try:
            summed = unpack_sum(total, sum(t.numel() for t in like.values()), len(clients), terms)
        except FedmllmError as error:
            raise _Missing(dict.fromkeys(clients, str(error))) from None
        if odd := [k for k in clients if not self._sites.keep_digest(k, at, replies[k])]:
            raise _Missing(dict.fromkeys(odd, "its reply cannot be read: the digest of its state is not one"))
        delta = unflatten(torch.from_numpy(summed.mean), like)
        sent_bytes = WORD_BYTES * len(total) * len(clients)
        return ClientUpdate(clients[0], delta, summed.weight, summed.metrics, clients=clients, sent_bytes=sent_bytes)

    def _learn_keys(self, at: Round, since: Mapping[int, str]) -> None:
        """Ask the sites whose key of this run is not known."""
        asked = {k: since[k] for k in since if k not in self._adverts}
        words = json.dumps({"op": KEY, "run_id": self._run_id})
        contents = {k: RecordDict({ABOUT: ConfigRecord({SECURE: words})}) for k in asked}
        reasons = {}
        for client, reply in self._sites.exchange(at, asked, contents):
            try:
                advert = validate(Advert, json.loads(read_secure(reply)), "its key")
                self._adverts[client] = cast("Advert", advert)
            except (FedmllmError, ValueError) as error:
                reasons[client] = legible(error)
        if reasons:
            raise _Missing(reasons)

    def _terms(self, cohort: list[int]) -> Terms:
        self._serial += 1
        weights = self._sites.clients.aggregator.weighted_by
        if not weights:  # refused when the experiment was parsed
            raise ConfigError(f"aggregator.name: {self._sites.clients.aggregator.name} needs each site's update")
        return Terms(
            serial=self._serial,
            adverts=tuple(self._adverts[k] for k in cohort),
            weights=weights,
            bits=self._settings.bits,
            bound=self._settings.bound,
            max_norm=self._max_norm,
        )


class _Missing(FedmllmError):
    """An attempt without a sum, with the reason of each site that is missing."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons = dict(reasons)


def about_of(reply: Message | str) -> ConfigRecord:
    """The words of a reply.

    Raises:
        FedmllmError: There is no reply, or it is a refusal.
    """
    if isinstance(reply, str):
        raise FedmllmError(reply)
    if reply.has_error():
        raise FedmllmError(f"Flower: {legible(reply.error.reason or 'error')} (code {reply.error.code})")
    about = reply.content.get(ABOUT)
    if not isinstance(about, ConfigRecord):
        raise FedmllmError("its reply cannot be read: it has no record")
    if REFUSED in about:
        raise FedmllmError(legible(about[REFUSED]))
    return about


def read_secure(reply: Message | str) -> str:
    """What a site says about its keys. Raises FedmllmError if there is no such reply."""
    about = about_of(reply)
    if SECURE not in about:
        raise FedmllmError("its reply cannot be read: it has no key")
    return str(about[SECURE])


def read_words(reply: Message | str, num_words: int, like: Params) -> Words:
    """The masked words of a reply.

    Args:
        reply: Of a site, or the reason why there is none.
        num_words: That it must have.
        like: Names and shapes of the delta.

    Raises:
        FedmllmError: There are no such words, with the reason.
    """
    about = about_of(reply)
    if about.get("manifest") != manifest_digest(like):
        raise FedmllmError("its manifest is another one: names or shapes differ")
    try:
        return from_bytes(masked_data(cast("Message", reply).content, num_words))
    except (KeyError, TypeError, AttributeError) as error:
        raise FedmllmError(f"its reply cannot be read: {type(error).__name__}: {error}") from None
