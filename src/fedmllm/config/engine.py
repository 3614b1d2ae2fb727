"""Which engine maps the clients of a round, and its settings. The engines themselves live in `engines/`. Loads no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fedmllm.core.spec import Named


class Engine(Named):
    """Settings of an engine. An engine changes where and how fast a round is computed, never its result."""

    import_path: ClassVar[
        str
    ]  # "module:Class"; Class(settings, clients) is called as (params, round, cohort) -> updates


class InProcess(Engine):
    """One client after another: the readable truth."""

    name: Literal["in-process"] = "in-process"
    import_path = "fedmllm.federation.engines.in_process:InProcess"


class Stacked(Engine):
    """Many clients in one pass over the frozen base; equal to in-process up to the order of summation."""

    name: Literal["stacked"] = "stacked"
    import_path = "fedmllm.federation.engines.stacked.engine:Stacked"
    token_budget: NonNegativeInt = 0  # tokens of one pass, padding included; 0 = what suits the device
    clients: PositiveInt = 16  # adapters in memory at once; a larger cohort comes in turns
    deterministic: bool = False  # CUDA: the same bytes at every repetition, somewhat slower


class FlowerSimulation(Engine):
    """Clients as Flower ClientApps in Ray actors that keep the frozen base; the bytes of in-process."""

    name: Literal["flower-simulation"] = "flower-simulation"
    import_path = "fedmllm.flower.simulation:FlowerSimulation"
    num_actors: PositiveInt = 2  # on one machine; on a cluster (RAY_ADDRESS) as many as its CPUs allow
    cpus_per_actor: PositiveInt = 1  # what Ray counts; `threads` is what an actor uses
    gpus_per_actor: NonNegativeFloat = 0.0
    threads: NonNegativeInt = 0  # of torch in an actor; 0 = as many as here, which the equality of bytes needs
    timeout_s: PositiveFloat = 3600.0  # a round at most; clients that have not answered are left out


class FlowerSites(Engine):
    """Real sites, each with its own data and process, asked over Flower: `fedmllm server run`."""

    name: Literal["flower-sites"] = "flower-sites"
    import_path = "fedmllm.flower.server.server_app:Sites"
    min_sites: PositiveInt = 1  # usable answers that a round needs, if its cohort is that large
    attempts: PositiveInt = 3  # at a round, before the run stops
    round_timeout_s: PositiveFloat = 3600.0  # of an attempt; a later answer is dropped
    connect_s: NonNegativeFloat = 120.0  # wait for the sites of a cohort that are not connected
    retry_s: NonNegativeFloat = 30.0  # between two attempts
