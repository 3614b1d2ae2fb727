"""Terms of a secure sum, as they travel in a request."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from fedmllm.config.engine import LEAST_SITES, MOST_SITES
from fedmllm.core.spec import Spec

HEX_KEY, HEX_SIGNATURE = r"^[0-9a-f]{64}$", r"^[0-9a-f]{16,300}$"

KEY = "key"  # request for a new key of a run


class Advert(Spec):
    """A site's key of a run, signed with the site's registered key."""

    site: str
    """Name of the site."""
    public: str = Field(pattern=HEX_KEY)
    """X25519 key of this run, in hexadecimal digits."""
    signature: str = Field(pattern=HEX_SIGNATURE)
    """Of run, site and key."""


class Terms(Spec):
    """How a site masks its update. All sites of a round receive the same."""

    serial: PositiveInt
    """Number of the attempt, which grows within a run: a site uses each key of a pair for one attempt."""
    adverts: tuple[Advert, ...] = Field(min_length=LEAST_SITES, max_length=MOST_SITES)
    """Keys of all sites of the sum, this one included."""
    weights: Literal["rows", "clients"]
    """Whether a site counts by its rows, or once."""
    bits: int = Field(ge=8, le=40)
    """Digits after the binary point."""
    bound: PositiveFloat
    """Largest absolute value of a number of the delta."""
    max_norm: float = Field(ge=0)
    """Largest norm of the delta; 0 = no limit."""

    def names(self) -> list[str]:
        """The sites of the sum, sorted."""
        return sorted(advert.site for advert in self.adverts)
