"""Shamir's shares of a 32-byte secret.

Shamir, How to share a secret, CACM 1979: a polynomial of degree `threshold - 1` modulo a prime with the secret at 0. Any
`threshold` shares give the secret, fewer say nothing about it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from fedmllm.core.errors import FedmllmError

PRIME = 2**521 - 1  # one number holds a secret
SECRET_BYTES = 32


def split(secret: bytes, threshold: int, num_shares: int) -> list[int]:
    """The shares 1 to `num_shares` of a secret.

    Args:
        secret: 32 bytes.
        threshold: Shares that give the secret.
        num_shares: At least `threshold`.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= num_shares:
        raise FedmllmError(f"a secret of {len(secret)} bytes and {threshold} of {num_shares} shares cannot be split")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value(coefficients, x) for x in range(1, num_shares + 1)]


def join(shares: Mapping[int, int]) -> bytes:
    """The secret.

    Args:
        shares: By their numbers, exactly as many as the threshold.

    Raises:
        FedmllmError: These are not shares of one secret, or too few.
    """
    secret = 0
    for x, y in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        secret = (secret + y * above * pow(below, -1, PRIME)) % PRIME
    if secret >= 2 ** (8 * SECRET_BYTES):  # of wrong shares it is a number of 521 bits
        raise FedmllmError("the shares are not of one secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def _value(coefficients: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value
