"""An attempt at a secure sum that survives missing sites.

Bonawitz et al., CCS 2017, figure 4, with keys of one attempt: a site's update has the pairs' masks and a mask of its own.
Shares of the seed of the own mask and of the key behind the pairs' masks go to all sites, encrypted. If the site's update is in
the sum, the others give their shares of the seed; if it is missing, those of the key. Who has both can read the update, so a
site signs one set of sites, and gives its shares only with the signatures of more than two thirds over that very set.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedmllm.core.errors import FedmllmError
from fedmllm.flower.secure.masks import pair_key
from fedmllm.flower.secure.shares import SECRET_BYTES, split
from fedmllm.flower.secure.signing import canonical
from fedmllm.flower.secure.terms import Terms

_NONCE = bytes(12)  # a key encrypts one message
_OF_AN_ATTEMPT = ("serial", "adverts", "threshold", "mask_keys", "shares")
_OF_A_ROUND = ("round", "cohort", "header", "kept")
_SHARE_BYTES = 66  # of a number below 2^521


@dataclass(frozen=True)
class Asked:
    """Digests of what a site was asked, as far as its update depends on it. They never leave the site."""

    run: str  # of what stays the same in all rounds of a run
    round: str  # of everything

    @classmethod
    def of(cls, request: str, adapter: bytes) -> Asked:
        """Digests of a request.

        Args:
            request: As it travels, JSON.
            adapter: Raw float32.
        """
        table = json.loads(request)
        # Keys, shares and who has to open the sum differ between attempts at a round; no update depends on them.
        table["secure"] = {k: v for k, v in table["secure"].items() if k not in _OF_AN_ATTEMPT}
        settings = {k: v for k, v in table.items() if k not in _OF_A_ROUND}
        whole = {"request": table, "adapter": hashlib.sha256(adapter).hexdigest()}
        digests = (hashlib.sha256(canonical("asked", facts)).hexdigest() for facts in (settings, whole))
        return cls(*digests)


@dataclass
class Attempt:
    """State of one attempt at a site, in memory."""

    facts: dict[str, Any]  # run, round, serial and the sites' keys of the run: what every key and signature is bound to
    names: list[str]
    threshold: int
    private: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    seed: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET_BYTES))
    received: dict[str, tuple[int, int]] = field(default_factory=dict)  # site -> its shares for this one: seed, key
    asked: Asked | None = None  # what was accepted for training
    masked: bool = False
    alive: list[str] | None = None  # the one set that this site has signed

    def public(self) -> str:
        """The key of the attempt that the other sites get."""
        return self.private.public_key().public_bytes_raw().hex()

    def shares_for(self, run_key: X25519PrivateKey, site: str, publics: Mapping[str, str]) -> dict[str, str]:
        """The encrypted shares for each site, this one included.

        Args:
            run_key: This site's key of the run.
            site: Its name.
            publics: Keys of the run by site.
        """
        seeds = split(self.seed, self.threshold, len(self.names))
        keys = split(self.private.private_bytes_raw(), self.threshold, len(self.names))
        found = {}
        for name, seed, key in zip(self.names, seeds, keys, strict=True):
            plain = seed.to_bytes(_SHARE_BYTES, "big") + key.to_bytes(_SHARE_BYTES, "big")
            cipher = ChaCha20Poly1305(self._share_key(run_key, publics[name], site, name))
            found[name] = cipher.encrypt(_NONCE, plain, None).hex()
        return found

    def receive(
        self, run_key: X25519PrivateKey, site: str, publics: Mapping[str, str], encrypted: Mapping[str, str]
    ) -> None:
        """Decrypt the shares for this site.

        Args:
            run_key: This site's key of the run.
            site: Its name.
            publics: Keys of the run by site.
            encrypted: By the site that made them.

        Raises:
            FedmllmError: A site's shares are missing, or are not of that site for this attempt.
        """
        for name in self.names:
            try:
                cipher = ChaCha20Poly1305(self._share_key(run_key, publics[name], name, site))
                plain = cipher.decrypt(_NONCE, bytes.fromhex(encrypted[name]), None)
            except (KeyError, ValueError, InvalidTag):
                raise FedmllmError(f"the shares of {name} are missing or not of this attempt") from None
            self.received[name] = (
                int.from_bytes(plain[:_SHARE_BYTES], "big"),
                int.from_bytes(plain[_SHARE_BYTES:], "big"),
            )

    def _share_key(self, own: X25519PrivateKey, peer: str, sender: str, receiver: str) -> bytes:
        context = canonical("shares", {**self.facts, "from": sender, "to": receiver})
        return pair_key(own, bytes.fromhex(peer), context)


def facts_of(run_id: str, round_: int, terms: Terms) -> dict[str, Any]:
    """Return the facts that the keys and signatures of an attempt are bound to: equal at all sites and at the server."""
    adverts = [a.model_dump() for a in sorted(terms.adverts, key=lambda a: a.site)]
    return {"run_id": run_id, "round": round_, "serial": terms.serial, "threshold": terms.threshold, "adverts": adverts}


def common_digest(request: str, adapter: bytes) -> str:
    """Digest of what all sites of a sum are asked alike: settings, terms and the adapter to start from.

    Masks depend on it. A server that asks one site for a usual update and the others for updates of almost zero, by a learning
    rate or by the number of bits, gets noise instead of the one site's update.

    Args:
        request: As it travels, JSON.
        adapter: Raw float32.

    Returns:
        Hexadecimal digits of a SHA-256.
    """
    table = {k: v for k, v in json.loads(request).items() if k not in ("site", "client", "kept")}
    table["secure"] = {k: v for k, v in table["secure"].items() if k != "shares"}
    facts = {"request": table, "adapter": hashlib.sha256(adapter).hexdigest()}
    return hashlib.sha256(canonical("request", facts)).hexdigest()


def mask_key(facts: Mapping[str, Any], common: str, own: X25519PrivateKey, peer: str, site: str, other: str) -> bytes:
    """The key of a pair's mask.

    Args:
        facts: `facts_of` the attempt.
        common: `common_digest` of the request.
        own: Private key of one of the two.
        peer: Public key of the other one.
        site: One of the two.
        other: The other one.
    """
    context = canonical("mask of a pair", {**facts, "common": common, "pair": sorted([site, other])})
    return pair_key(own, bytes.fromhex(peer), context)
