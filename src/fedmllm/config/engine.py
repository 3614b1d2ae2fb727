"""Settings of the engines; the engines themselves are in `federation/engines/` and `flower/`."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fedmllm.core.spec import Named, Spec

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
]
"""What an algorithm or an experiment may need of an engine.

client-state: what a client keeps reaches its next round. extra: other tensors than the adapter travel both ways.
partial: some tensors of the adapter neither train nor travel. frozen-adapter: an additive adapter of any rank that does
not train. mixed-ranks: clients of unequal LoRA rank. scale: a factor of the trained adapter's product. completion: rows
that are filled or converted, and public rows. profiles: the server knows which modalities each client has.
modality-dropout: complete rows lose modalities in training. learned-completion: a completion that is learned before
training. row-privacy: it clips each row's gradient and adds noise (`Clients.row_noise`).
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


class Stacked(Engine):
    """Many clients in one pass over the frozen base; equal to in-process up to the order of summation."""

    name: Literal["stacked"] = "stacked"
    import_path = "fedmllm.federation.engines.stacked.engine:StackedEngine"
    supports = ALL
    token_budget: NonNegativeInt = 0
    """Tokens of one pass, padding included; 0 = chosen for the device."""
    clients: PositiveInt = 16
    """Adapters in memory at once; a larger cohort is computed in several turns."""
    deterministic: bool = False
    """On CUDA: the same bytes at every repetition, somewhat slower."""


class FlowerSimulation(Engine):
    """Clients as Flower ClientApps in Ray actors that keep the frozen base; the bytes of in-process."""

    name: Literal["flower-simulation"] = "flower-simulation"
    import_path = "fedmllm.flower.simulation:SimulationEngine"
    reads_rows = False
    supports = ALL - {"learned-completion"}  # its actors load an experiment, not what a run has learned
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
WORD_BITS = 64  # sums are modulo 2^64


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
    bits: int = Field(32, ge=8, le=40)
    """Digits after the binary point of the numbers that are summed; the mean is within 2^-(bits + 1) of the exact one."""
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

    def overflow(self, num_sites: int) -> str:
        """Why a sum could leave the range of its words.

        Args:
            num_sites: Sites of a round.

        Returns:
            The reason; "" = every sum fits.
        """
        if num_sites * MOST_ROWS * self.bound * 2.0**self.bits < 2.0 ** (WORD_BITS - 1):
            return ""
        return (
            f"engine.secure: {num_sites} sites of up to {MOST_ROWS} rows, bound = {self.bound:g} and bits = {self.bits} "
            f"need more than {WORD_BITS} bits; lower bits or bound"
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
