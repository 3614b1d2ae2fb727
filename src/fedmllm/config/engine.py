"""Settings of the engines; the engines themselves are in `federation/engines/` and `flower/`."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from fedmllm.core.errors import ConfigError
from fedmllm.core.spec import ADDED_LATER, Named, Spec, one_or_several

Capability = Literal[
    "client-state",
    "extra",
    "partial",
    "frozen-adapter",
    "mixed-ranks",
    "scale",
    "completion",
    "profiles",
    "modality-dropout",
    "learned-completion",
    "row-privacy",
    "several-devices",
]
"""What an algorithm or an experiment may need of an engine.

client-state: what a client keeps reaches its next round. extra: other tensors than the adapter travel both ways.
partial: some tensors of the adapter neither train nor travel. frozen-adapter: an additive adapter of any rank that does
not train. mixed-ranks: clients of unequal LoRA rank. scale: a factor of the trained adapter's product. completion: rows
that are filled or converted, and public rows. profiles: the server knows which modalities each client has.
modality-dropout: complete rows lose modalities in training. learned-completion: a completion that is learned before
training. row-privacy: it clips each row's gradient and adds noise (`Clients.row_noise`). several-devices: layers of the model
are on several devices (`backbone.device_map`).
"""
ALL: frozenset[str] = frozenset(get_args(Capability))


class Engine(Named):
    """Computation of the clients of a round. An engine changes place and speed; results agree up to the
    order of float32 sums."""

    import_path: ClassVar[str]
    """ "module:Class"; Class(settings, clients) is called as (round, {client: what it receives}) -> updates. A plug-in's module
    may be its own: f"{__name__}:Class"."""
    supports: ClassVar[frozenset[str]] = frozenset()
    """What it can do for `Aggregator.needs`."""
    reads_rows: ClassVar[bool] = True
    """False if other processes read the clients' rows: nothing is computed for them in this one."""


class InProcess(Engine):
    """One client after another: the reference implementation."""

    name: Literal["in-process"] = "in-process"
    import_path = "fedmllm.federation.engines.in_process:InProcessEngine"
    supports = ALL


_DEVICE = r"all|cpu|cuda(:(0|[1-9][0-9]?))?"
_DEVICES = "allowed: 'all' by itself, or CUDA devices by number such as ['cuda:0', 'cuda:1']"


def _numbered(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


class Stacked(Engine):
    """Many clients in one pass over the frozen base; equal to in-process up to the order of summation."""

    name: Literal["stacked"] = "stacked"
    import_path = "fedmllm.federation.engines.stacked.replicas:start"
    supports = ALL - {"several-devices"}  # all adapters are one tensor
    token_budget: NonNegativeInt = 0
    """Tokens of one pass, padding included; 0 = chosen for the device."""
    clients: PositiveInt = 16
    """Adapters in memory at once; a larger cohort is computed in several turns."""
    deterministic: bool = False
    """On CUDA: the same bytes at every repetition, somewhat slower."""
    devices: Annotated[tuple[str, ...], ADDED_LATER, BeforeValidator(one_or_several)] = ()
    """Devices that divide the clients of a round, each with a copy of the frozen model: "all" (every CUDA device), or names as
    in ["cuda:0", "cuda:1"], one of them that of `backbone.device`; empty = that one alone. `token_budget` and `clients` are
    those of each device. ["cpu", "cpu"] is for tests."""

    @field_validator("devices")
    @classmethod
    def _are_devices_of_one_kind(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not re.fullmatch(_DEVICE, name):
                raise ValueError(f"{name!r} is not a known device; {_DEVICES}")
        numbers = [_numbered(name) for name in names]
        if "all" in names and len(names) > 1:
            raise ValueError(f"'all' with other names; {_DEVICES}")
        if "cpu" in names and set(names) != {"cpu"}:
            raise ValueError(f"a CPU is too slow to divide a round with CUDA devices; {_DEVICES}")
        if twice := [name for name in numbers if name != "cpu" and numbers.count(name) > 1]:
            raise ValueError(f"{twice[0]!r} is named twice, and a device has one copy of the model; {_DEVICES}")
        return names

    def includes(self, device: str) -> bool:
        """Return whether `devices` may have the device of `backbone.device`; it is not looked whether this machine does.

        Args:
            device: As in `backbone.device`.
        """
        if not self.devices or device == "auto":
            return True
        return device.startswith("cuda") if "all" in self.devices else _numbered(device) in map(_numbered, self.devices)


class FlowerSimulation(Engine):
    """Clients as Flower ClientApps in Ray actors that keep the frozen base; the bytes of in-process."""

    name: Literal["flower-simulation"] = "flower-simulation"
    import_path = "fedmllm.flower.simulation:SimulationEngine"
    reads_rows = False
    supports = ALL - {"learned-completion", "several-devices"}  # actors load an experiment, and a model each
    num_actors: PositiveInt = 2
    """Ray actors on one machine; on a cluster (RAY_ADDRESS) as many as its CPUs allow."""
    cpus_per_actor: PositiveInt = 1
    """CPUs that Ray reserves for an actor; `threads` is the number that it uses."""
    gpus_per_actor: NonNegativeFloat = 0.0
    """GPUs that Ray reserves for an actor."""
    threads: NonNegativeInt = 0
    """Threads of torch in an actor; 0 = as in this process, which equal bytes require."""
    timeout_s: PositiveFloat = 3600.0
    """Seconds of a round at most; clients that have not responded are left out."""


LEAST_SITES, MOST_SITES = 3, 50  # of a secure sum: of two, each could subtract its own; every pair of sites has a key
MOST_ROWS = 2**20  # of a site in a secure sum
WordBits = Literal[32, 48, 64]  # sums are modulo 2^32, 2^48 or 2^64
LEAST_BITS, MOST_BITS = 8, 40  # digits after the binary point
_ENOUGH = {"rows": 16, "clients": 24}  # digits for which the narrowest words are taken; a sum by rows has more of them


def sum_fits(num_sites: int, rows: int, bound: float, bits: int, word_bits: int) -> bool:
    """Return whether no sum leaves the range of its words.

    Args:
        num_sites: Sites of the sum.
        rows: Largest weight of a site.
        bound: Largest absolute value of a number.
        bits: Digits after the binary point.
        word_bits: Bits of a word, of which one is the sign.
    """
    return num_sites * (rows * bound * 2.0**bits + 0.5) < 2.0 ** (word_bits - 1)


def least_holders(num_sites: int) -> int:
    """Shares of a key that give it: more than two thirds, so that no two sets of sites can be opened for one sum.

    Args:
        num_sites: Sites of a secure sum.
    """
    return max(LEAST_SITES, 2 * num_sites // 3 + 1)


class SecureAggregation(Spec):
    """Masks between the sites: of a round the server learns the sums of updates, row counts and metrics. Sums of other rounds,
    runs or sets of sites may differ by what one site sent (docs/deploy.md)."""

    drop_outs: Literal["repeat", "recover"] = "repeat"
    """If a site of a round is missing: repeat it over the same sites, or recover the sum over the others from shares of the
    missing sites' keys, if more than two thirds of the sites are there: three more messages to each site in each round."""
    bits: int | None = Field(None, ge=LEAST_BITS, le=MOST_BITS)
    """Digits after the binary point of the numbers that are summed; None = as many as fit into the words. The mean is within
    2^-(bits + 1) of the exact one, over the mean number of rows of a site if sites count by their rows."""
    rows: int = Field(MOST_ROWS, ge=1, le=MOST_ROWS)
    """Most rows of a site; one with more sends nothing. Where sites count by their rows, a small number and a small `bound`
    make words of 32 bits instead of 48, and of a masked update the bytes of one in the clear."""
    bound: PositiveFloat = 8.0
    """Largest absolute value of a number of a delta; a site with a larger one sends nothing."""

    def threshold(self, num_sites: int) -> int:
        """Sites that a sum needs, more than two thirds.

        Args:
            num_sites: Sites of a round.

        Returns:
            A number of sites; 0 = all of them, without shares of keys.
        """
        return least_holders(num_sites) if self.drop_outs == "recover" else 0

    def words(self, num_sites: int, weights: str) -> tuple[WordBits, int]:
        """The words of all sums of a run: the narrowest ones with enough digits.

        Args:
            num_sites: Sites of a round.
            weights: "rows" or "clients", by which a site counts.

        Returns:
            Bits of a word, and how many of them are after the binary point.

        Raises:
            ConfigError: A sum could leave the range of the widest words.
        """
        most = self.rows if weights == "rows" else 1
        enough = self.bits or _ENOUGH[weights]
        for word_bits in get_args(WordBits):
            fit = [b for b in range(enough, MOST_BITS + 1) if sum_fits(num_sites, most, self.bound, b, word_bits)]
            if fit:
                return word_bits, self.bits or fit[-1]
        raise ConfigError(
            f"engine.secure: {num_sites} sites of up to {most} rows, bound = {self.bound:g} and bits = {enough} need more than "
            f"{word_bits} bits; lower bits, rows or bound"
        )


class FlowerSites(Engine):
    """Real sites, each with its own data and process, reached over Flower: `fedmllm server run`."""

    name: Literal["flower-sites"] = "flower-sites"
    import_path = "fedmllm.flower.server.server_app:Sites"
    reads_rows = False
    supports = ALL - {
        "completion",
        "profiles",
        "modality-dropout",
        "learned-completion",
    }  # a request names none, and a site reports no modalities
    min_sites: NonNegativeInt = 1
    """Usable responses that a round needs, if its cohort is that large; 0 = a round counts whoever responds, as privacy
    "client-dp" requires. With `secure` at least the sites that a sum needs."""
    attempts: PositiveInt = 3
    """Attempts at a round before the run stops."""
    round_timeout_s: PositiveFloat = 3600.0
    """Seconds of an attempt; a later response is dropped."""
    connect_s: NonNegativeFloat = 120.0
    """Seconds to wait for the sites of a cohort that are not connected."""
    retry_s: NonNegativeFloat = 30.0
    """Seconds between two attempts."""
    secure: SecureAggregation | None = None
    """Secure aggregation: the server learns sums only. A table, or {} for its defaults; without it each update travels in the
    clear."""
