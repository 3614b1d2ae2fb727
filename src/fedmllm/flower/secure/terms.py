"""Terms of a secure sum, as they travel in a request."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from fedmllm.config.engine import LEAST_BITS, LEAST_SITES, MOST_BITS, MOST_ROWS, MOST_SITES, WordBits, sum_fits
from fedmllm.core.spec import Spec

RUN_ID = "^[0-9a-f]{12}$"
HEX_KEY, HEX_SIGNATURE = r"^[0-9a-f]{64}$", r"^[0-9a-f]{16,300}$"

KEY, PREPARE, SIGN, OPEN = "key", "prepare", "sign", "open"  # requests about a secure sum
_Share = Annotated[str, Field(pattern=r"^[0-9a-f]{1,140}$")]


class Advert(Spec):
    """A site's key of a run, signed with the site's registered key."""

    site: str
    """Name of the site."""
    public: str = Field(pattern=HEX_KEY)
    """X25519 key of this run, in hexadecimal digits."""
    signature: str = Field(pattern=HEX_SIGNATURE)
    """Of run, site and key."""


class Terms(Spec):
    """Rules by which a site masks its update. All sites of a round receive the same."""

    version: Literal[2]
    """Of the protocol; sites and servers of another one refuse each other."""
    serial: PositiveInt
    """Number of the attempt, which grows within a run: a site uses each key of a pair for one attempt."""
    adverts: tuple[Advert, ...] = Field(min_length=LEAST_SITES, max_length=MOST_SITES)
    """Keys of all sites of the sum, this one included."""
    weights: Literal["rows", "clients"]
    """Whether a site counts by its rows, or once."""
    word_bits: WordBits
    """Bits of a number: sums are known modulo 2^word_bits."""
    bits: int = Field(ge=LEAST_BITS, le=MOST_BITS)
    """Digits after the binary point."""
    rows: int = Field(ge=1, le=MOST_ROWS)
    """Most rows of a site, if it counts by them."""
    bound: PositiveFloat
    """Largest absolute value of a number of the delta."""
    max_norm: float = Field(ge=0)
    """Largest norm of the delta; 0 = no limit."""

    threshold: int = Field(0, ge=0, le=MOST_SITES)
    """Shares that give a missing site's key; 0 = no shares, all sites are needed."""
    mask_keys: tuple[Advert, ...] = Field((), max_length=MOST_SITES)
    """With shares: each site's key of this attempt, from which its masks come."""
    shares: dict[str, str] = Field({}, max_length=MOST_SITES)
    """With shares: those for this site by the name of the site that made them, encrypted. They differ from site to site."""

    @model_validator(mode="after")
    def _sums_fit(self) -> Terms:
        most = self.rows if self.weights == "rows" else 1
        if not sum_fits(len(self.adverts), most, self.bound, self.bits, self.word_bits):
            raise ValueError(
                f"sums of {len(self.adverts)} sites with {self.bits} digits after the binary point do not fit into "
                f"{self.word_bits} bits"
            )
        return self

    def names(self) -> list[str]:
        """The sites of the sum, sorted."""
        return sorted(advert.site for advert in self.adverts)


class Prepared(Spec):
    """A site's key of an attempt and the shares of its secrets for the other sites."""

    mask_key: Advert
    """Key of the attempt, signed."""
    shares: dict[str, Annotated[str, Field(max_length=1000)]] = Field(max_length=MOST_SITES)
    """By the name of the site that can decrypt it."""


class Opened(Spec):
    """A site's shares of other sites' secrets: of each site one of the two, never both."""

    seeds: dict[str, _Share] = Field(max_length=MOST_SITES)
    """Of the own masks of sites whose update is in the sum."""
    keys: dict[str, _Share] = Field(max_length=MOST_SITES)
    """Of the keys of the attempt of sites that are missing."""


class Ask(Spec):
    """A request about keys and shares of a secure sum."""

    version: Literal[2] = 2
    """As in `Terms`."""
    op: Literal["key", "prepare", "sign", "open"]
    """What is asked."""
    run_id: str = Field(pattern=RUN_ID)
    """Of the run."""
    round: PositiveInt = 1
    """Of the run, from 1."""
    terms: Terms | None = None
    """Of the attempt, for "prepare"."""
    serial: int = Field(0, ge=0)
    """Of the attempt, for "sign" and "open"."""
    alive: tuple[str, ...] = Field((), max_length=MOST_SITES)
    """The sites whose updates are in the sum, sorted."""
    signatures: dict[str, Annotated[str, Field(pattern=HEX_SIGNATURE)]] = Field({}, max_length=MOST_SITES)
    """Of `alive`, by site."""
