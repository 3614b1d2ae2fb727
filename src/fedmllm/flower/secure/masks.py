"""Masks that cancel in the sum over all sites.

Bonawitz et al., Practical Secure Aggregation, CCS 2017, section 4. For each pair the site whose name sorts first adds the
pair's mask, the other one subtracts it. A mask is the ChaCha20 keystream (RFC 8439) of a key that serves one attempt at one
round, so its nonce is zero.
"""

from __future__ import annotations

from collections.abc import Mapping

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmllm.core.errors import FedmllmError
from fedmllm.flower.secure.fixed_point import WordForm, Words

_KEY_BYTES = 32


def keystream(key: bytes, num_bytes: int) -> bytes:
    """The ChaCha20 keystream of a key, nonce 0 and counter 0.

    Args:
        key: 32 bytes that are never used for another keystream.
        num_bytes: Its length.
    """
    return Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(num_bytes))


def mask(key: bytes, form: WordForm) -> Words:
    """The mask of a key: its keystream, read as words of this form.

    Args:
        key: As that of `keystream`.
        form: Of the words that are masked.

    Returns:
        Uniform words, [W].
    """
    return form.from_bytes(keystream(key, form.num_bytes))


def pair_key(own: X25519PrivateKey, peer: bytes, context: bytes) -> bytes:
    """The key that two sites share for one purpose: HKDF-SHA256 (RFC 5869) of their X25519 secret (RFC 7748).

    Args:
        own: Private key of this site.
        peer: Public key of the other one, 32 bytes.
        context: What the key is for; equal at both sites, and different for every key.

    Raises:
        FedmllmError: The other key is not a usable point.
    """
    try:
        secret = own.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError as error:  # of small order, or of another length
        raise FedmllmError(f"a peer's key is not a usable X25519 key: {error}") from None
    return HKDF(hashes.SHA256(), _KEY_BYTES, salt=None, info=context).derive(secret)


def add_masks(words: Words, site: str, keys: Mapping[str, bytes], form: WordForm) -> Words:
    """Words with the masks of all pairs of this site.

    Args:
        words: [W]; not changed.
        site: This site's name.
        keys: By the names of the other sites, the key of each pair.
        form: Of the words.
    """
    masked = words.copy()
    for peer, key in keys.items():
        if site < peer:
            masked += mask(key, form)
        else:
            masked -= mask(key, form)
    return masked
