"""Statements that a site signs with its registered P-384 key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedmllm.core.errors import FedmllmError

PROTOCOL = "fedmllm secure aggregation 2"
HASH = ec.ECDSA(hashes.SHA384())


def canonical(what: str, facts: dict[str, Any]) -> bytes:
    """The bytes of a statement: equal facts give equal bytes, and no statement is valid as one of another kind."""
    return json.dumps({"protocol": PROTOCOL, "what": what, **facts}, sort_keys=True).encode()


def site_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A site's private key.

    Raises:
        FedmllmError: The file is not a P-384 key as `fedmllm site new` makes it.
    """
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FedmllmError(f"{path}: not a private key as `fedmllm site new` makes it: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FedmllmError(f"{path}: not a P-384 key; `fedmllm site key` makes one")
    return key


def site_public_key(text: str) -> ec.EllipticCurvePublicKey:
    """A site's public key.

    Args:
        text: The content of its `site.key.pub`.

    Raises:
        FedmllmError: It is not a P-384 key.
    """
    try:
        key = serialization.load_ssh_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FedmllmError(f"not a public key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FedmllmError("not a P-384 key as `fedmllm site new` makes it")
    return key


def signature_of(key: ec.EllipticCurvePrivateKey, what: str, facts: dict[str, Any]) -> str:
    """The signature of a statement, in hexadecimal digits."""
    return key.sign(canonical(what, facts), HASH).hex()


def is_signed(key: ec.EllipticCurvePublicKey, signature: str, what: str, facts: dict[str, Any]) -> bool:
    """Return whether a signature is that of this statement by this key."""
    try:
        key.verify(bytes.fromhex(signature), canonical(what, facts), HASH)
    except (InvalidSignature, ValueError):
        return False
    return True
