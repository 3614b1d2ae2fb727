"""Server's half of secure aggregation.

Each round is one masked sum. Without shares it is over all sites of the cohort: if one is missing, its masks stay in the sum
and nothing can be read; the same sites are then asked again with new keys, `engine.attempts` times. A sum over fewer sites
would give away the missing ones' updates if these are only late. With shares the sites agree, signed, on who is in the sum,
and give what removes the masks of the others.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict

from fedmllm.config.engine import LEAST_SITES, SecureAggregation
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.spec import Spec, validate
from fedmllm.core.tensors import manifest_digest, unflatten
from fedmllm.core.types import ClientFailure, ClientUpdate, Params, Round, Sent
from fedmllm.flower.secure.attempt import common_digest, facts_of, mask_key
from fedmllm.flower.secure.fixed_point import WordForm, Words
from fedmllm.flower.secure.layout import unpack_sum, word_form
from fedmllm.flower.secure.masks import mask
from fedmllm.flower.secure.shares import join
from fedmllm.flower.secure.terms import HEX_SIGNATURE, KEY, OPEN, PREPARE, SIGN, Advert, Ask, Opened, Prepared, Terms
from fedmllm.flower.wire import ABOUT, REFUSED, SECURE, array_data, legible, masked_data

if TYPE_CHECKING:
    from fedmllm.flower.server.server_app import Sites

_S = TypeVar("_S")


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
        self._most = max(LEAST_SITES, sites.experiment.cohort_size or len(sites.names))  # the same words in all rounds
        self._adverts: dict[int, Advert] = {}
        self._serial = 0

    def round(self, at: Round, sents: Mapping[int, Sent]) -> list[ClientUpdate | ClientFailure]:
        """Ask the sites of the cohort until one attempt gives a sum.

        Args:
            at: The round.
            sents: What each client receives.

        Returns:
            One update, the mean over the sites of the sum, and a failure for each of the others.

        Raises:
            FedmllmError: No attempt gave a sum.
        """
        s, reasons = self._sites.settings, dict[int, str]()
        for attempt in range(1, s.attempts + 1):
            try:
                return self._attempt(at, sents)
            except _Missing as missing:
                reasons = missing.reasons
                self._adverts.clear()  # a site that was restarted has another key
            if attempt < s.attempts:
                time.sleep(s.retry_s)
        said = "; ".join(f"{self._sites.names[k]}: {reason}" for k, reason in sorted(reasons.items()))
        needs = f"{self._least(len(sents))} of {len(sents)} sites" if self._recovers else f"all {len(sents)} sites"
        raise FedmllmError(
            f"round {at.number}: no sum over {needs}, which engine.secure requires, after {s.attempts} attempts "
            f"({said}). --resume continues from round {at.number - 1}"
        )

    @property
    def _recovers(self) -> bool:
        return self._settings.drop_outs == "recover"

    def _least(self, num_sites: int) -> int:
        """Sites that a sum over a cohort needs."""
        if not self._recovers:
            return num_sites
        return max(self._settings.threshold(num_sites), min(self._sites.settings.min_sites, num_sites))

    def _attempt(self, at: Round, sents: Mapping[int, Sent]) -> list[ClientUpdate | ClientFailure]:
        lost = dict[int, str]()
        since = self._sites.connected(list(sents))
        self._note(lost, dict.fromkeys(set(sents) - set(since), "not connected"), len(sents))
        self._note(lost, self._learn_keys(at, since), len(sents))
        terms = self._terms([k for k in sorted(since) if k not in lost])
        own = {k: terms for k in sents if k not in lost}
        if self._recovers:
            own = self._prepare(at, since, own, lost, len(sents))
        like = next(iter(sents.values())).returned()
        requests = self._sites.requests(at, {k: sents[k] for k in own}, own)
        form = word_form(sum(t.numel() for t in like.values()), terms)
        total, replies = self._masked(at, like, form, since, requests, lost)
        self._note(lost, {}, len(sents))
        if self._recovers:
            content = next(iter(requests.values()))
            common = common_digest(str(content[ABOUT]["request"]), array_data(content))
            total = self._unmasked(
                at, since, next(iter(own.values())), common, sorted(own), sorted(replies), form, total
            )
        for k in lost:
            self._adverts.pop(k, None)  # a site that was restarted has another key
        update = self._read(at, total, like, form, replies, next(iter(own.values())))
        return [update, *(ClientFailure(k, reason) for k, reason in sorted(lost.items()))]

    def _note(self, lost: dict[int, str], more: Mapping[int, str], cohort: int) -> None:
        """Add the sites that are missing. Raises _Missing if the others are too few."""
        lost |= more
        if cohort - len(lost) < max(LEAST_SITES, self._least(cohort)):
            raise _Missing(lost)

    def _masked(
        self,
        at: Round,
        like: Params,
        form: WordForm,
        since: Mapping[int, str],
        requests: Mapping[int, RecordDict],
        lost: dict[int, str],
    ) -> tuple[Words, dict[int, Message]]:
        """The sum of the masked words, and the replies in ascending order; sites without one join `lost`."""
        total, replies = np.zeros(form.num_numbers + form.num_counts, dtype=np.uint64), dict[int, Message]()
        for client, reply in self._sites.exchange(at, since, requests):
            try:
                total += read_words(reply, form, like)
                replies[client] = cast("Message", reply)
            except FedmllmError as error:
                lost[client] = str(error)
        return total, {k: replies[k] for k in sorted(replies)}

    def _read(
        self, at: Round, total: Words, like: Params, form: WordForm, replies: Mapping[int, Message], terms: Terms
    ) -> ClientUpdate:
        clients = tuple(replies)
        try:
            summed = unpack_sum(total, form.num_numbers, len(clients), terms)
        except FedmllmError as error:
            raise _Missing(dict.fromkeys(clients, str(error))) from None
        if odd := [k for k in clients if not self._sites.keep_digest(k, at, replies[k])]:
            raise _Missing(dict.fromkeys(odd, "its reply cannot be read: the digest of its state is not one"))
        delta = unflatten(torch.from_numpy(summed.mean), like)
        sent_bytes = form.num_bytes * len(clients)
        return ClientUpdate(clients[0], delta, summed.weight, summed.metrics, clients=clients, sent_bytes=sent_bytes)

    # ---- keys

    def _learn_keys(self, at: Round, since: Mapping[int, str]) -> dict[int, str]:
        """Ask the sites whose key of this run is not known; return those that gave none, with the reason."""
        ask = Ask(op=KEY, run_id=self._run_id)
        found, reasons = self._all(at, since, {k: ask for k in since if k not in self._adverts}, parsed(Advert))
        names = self._sites.names
        reasons |= {k: f"it calls itself {legible(a.site)}" for k, a in found.items() if a.site != names[k]}
        self._adverts |= {k: advert for k, advert in found.items() if k not in reasons}
        return reasons

    def _prepare(
        self, at: Round, since: Mapping[int, str], own: Mapping[int, Terms], lost: dict[int, str], cohort: int
    ) -> dict[int, Terms]:
        """Exchange keys and shares of an attempt over the sites that are there; return each site's terms."""
        while True:
            terms = next(iter(own.values()))
            ask = Ask(op=PREPARE, run_id=self._run_id, round=at.number, terms=terms)
            found, reasons = self._all(at, since, dict.fromkeys(own, ask), parsed(Prepared))
            if not reasons:
                break
            self._note(lost, reasons, cohort)
            again = self._terms([k for k in sorted(own) if k not in lost])  # a new attempt: each has one set of sites
            own = {k: again for k in own if k not in lost}
        keys = tuple(found[k].mask_key for k in sorted(found))
        names = {k: self._sites.names[k] for k in found}
        shares = {k: {names[j]: p.shares[names[k]] for j, p in found.items() if names[k] in p.shares} for k in found}
        return {k: terms.model_copy(update={"mask_keys": keys, "shares": shares[k]}) for k in found}

    def _unmasked(
        self,
        at: Round,
        since: Mapping[int, str],
        terms: Terms,
        common: str,
        asked: list[int],
        there: list[int],
        form: WordForm,
        total: Words,
    ) -> Words:
        """The sum without the own masks of the sites in it and without the pairs' masks of those that are missing."""
        name = self._sites.names
        alive = tuple(sorted(name[k] for k in there))
        ask = Ask(op=SIGN, run_id=self._run_id, round=at.number, serial=terms.serial, alive=alive)
        signed, reasons = self._all(at, since, dict.fromkeys(there, ask), signature)
        if len(signed) < terms.threshold:
            raise _Missing(reasons)
        ask = ask.model_copy(update={"op": OPEN, "signatures": {name[k]: text for k, text in signed.items()}})
        opened, reasons = self._all(at, since, dict.fromkeys(signed, ask), parsed(Opened))
        numbers = {n: i for i, n in enumerate(sorted(name[k] for k in asked), start=1)}
        holders = {numbers[name[k]]: opened[k] for k in sorted(opened)[: terms.threshold]}
        if len(holders) < terms.threshold:
            raise _Missing(reasons)
        try:
            for site in alive:
                seed = join({x: int(o.seeds[site], 16) for x, o in holders.items()})
                total -= mask(seed, form)
            publics = {advert.site: advert.public for advert in terms.mask_keys}
            facts = facts_of(self._run_id, at.number, terms)
            for site in sorted(set(numbers) - set(alive)):
                private = X25519PrivateKey.from_private_bytes(
                    join({x: int(o.keys[site], 16) for x, o in holders.items()})
                )
                for other in alive:
                    theirs = mask(mask_key(facts, common, private, publics[other], site, other), form)
                    total = total - theirs if other < site else total + theirs
        except (KeyError, FedmllmError) as error:
            raise _Missing(dict.fromkeys(there, f"the shares do not open the sum: {error}")) from None
        return total

    def _all(
        self, at: Round, since: Mapping[int, str], asks: Mapping[int, Ask], read: Callable[[str], _S]
    ) -> tuple[dict[int, _S], dict[int, str]]:
        """Ask these sites at once -> (what each one answered, why the others did not)."""
        contents = {k: RecordDict({ABOUT: ConfigRecord({SECURE: a.model_dump_json()})}) for k, a in asks.items()}
        found, reasons = dict[int, _S](), dict[int, str]()
        for client, reply in self._sites.exchange(at, since, contents):
            try:
                found[client] = read(read_secure(reply))
            except (FedmllmError, ValueError, RecursionError) as error:
                reasons[client] = legible(error)
        return found, reasons

    def _terms(self, clients: list[int]) -> Terms:
        self._serial += 1
        weights = self._sites.clients.aggregator.weighted_by
        if not weights:  # refused when the experiment was parsed
            raise ConfigError(f"aggregator.name: {self._sites.clients.aggregator.name} needs each site's update")
        word_bits, bits = self._settings.words(self._most, weights)
        return Terms(
            version=2,
            serial=self._serial,
            adverts=tuple(self._adverts[k] for k in clients),
            weights=weights,
            word_bits=word_bits,
            bits=bits,
            rows=self._settings.rows,
            bound=self._settings.bound,
            max_norm=self._max_norm,
            threshold=self._settings.threshold(len(clients)),
        )


def parsed(kind: type[_S]) -> Callable[[str], _S]:
    """A reader of a site's JSON."""
    return lambda text: cast("_S", validate(cast("type[Spec]", kind), json.loads(text), "its reply"))


def signature(text: str) -> str:
    """A site's signature. Raises FedmllmError if it is not a text of hexadecimal digits."""
    found = json.loads(text)
    if not isinstance(found, str) or not re.fullmatch(HEX_SIGNATURE, found):
        raise FedmllmError("its reply cannot be read: it is not a signature")
    return found


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
    """Return a site's statement about its keys. Raises FedmllmError if there is no such reply."""
    about = about_of(reply)
    if SECURE not in about:
        raise FedmllmError("its reply cannot be read: it has no key")
    return str(about[SECURE])


def read_words(reply: Message | str, form: WordForm, like: Params) -> Words:
    """The masked words of a reply.

    Args:
        reply: Of a site, or the reason why there is none.
        form: That they must have.
        like: Names and shapes of the delta.

    Raises:
        FedmllmError: There are no such words, with the reason.
    """
    about = about_of(reply)
    if about.get("manifest") != manifest_digest(like):
        raise FedmllmError("its manifest is another one: names or shapes differ")
    try:
        return form.from_bytes(masked_data(cast("Message", reply).content, form.num_bytes))
    except (KeyError, TypeError, AttributeError) as error:
        raise FedmllmError(f"its reply cannot be read: {type(error).__name__}: {error}") from None
