"""Shards: rows partitioned over clients, with modalities hidden. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import compress

from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.types import Example, Modality, Shard, Visible
from fedmllm.scenarios.masks import Aligned, Cross, Hybrid, Missing, Scenario
from fedmllm.scenarios.partitions import ByColumn, Dirichlet, Iid, Partition
from fedmllm.scenarios.published import Published

__all__ = [
    "Aligned",
    "ByColumn",
    "Cross",
    "Dirichlet",
    "Hybrid",
    "Iid",
    "Missing",
    "Partition",
    "Published",
    "Scenario",
    "assign",
    "shards_digest",
    "show_only",
]


def assign(
    examples: Sequence[Example],
    modalities: tuple[Modality, ...],
    partition: Partition,
    scenario: Scenario,
    seed: int,
) -> tuple[Shard, ...]:
    """Partition rows over clients and mask them.

    Every row lands on exactly one client, or on none if the scenario drops incomplete rows; a client may get none. Everything
    random comes from `seed`, except under `Published`, whose streams are fixed.

    Args:
        examples: The training rows.
        modalities: Of the data set, in order.
        partition: Rule that gives rows to clients.
        scenario: Rule that hides modalities.
        seed: Seed of the experiment.

    Returns:
        One shard per client, in client order. A row's mask holds what the scenario leaves of what the row has.

    Raises:
        DataError: There are no rows.
        ConfigError: The rows name their clients, but the partition simulates others.
    """
    if not examples:
        raise DataError("the training split is empty: there are no rows to partition")
    if any("client" in example.columns for example in examples):
        refuse_simulation(partition)
    if isinstance(partition, Published):
        rows, masks = partition.assign(examples, modalities, scenario)
    else:
        rows = partition.split(examples, seed)
        masks = scenario.hide(rows, modalities, seed)
    names = partition.client_names(examples) or ("",) * len(rows)
    has = [tuple(example.fields) for example in examples]
    meet = _Meet()  # few different ones, and rows share them
    shards = []
    for client, (own, kept, name) in enumerate(zip(rows, masks, names, strict=True)):
        visible = list(map(meet.__getitem__, zip(kept, map(has.__getitem__, own), strict=True)))
        if scenario.drops_incomplete:
            complete = [v == frozenset(modalities) for v in visible]
            own, visible = list(compress(own, complete)), list(compress(visible, complete))
        shards.append(Shard(client, tuple(own), tuple(visible), name))
    if not any(shard.rows for shard in shards):
        raise DataError(f"scenario: {scenario.name!r} leaves no row; choose one that leaves complete rows")
    return tuple(shards)


class _Meet(dict[tuple[Visible, tuple[Modality, ...]], Visible]):
    """(mask, modalities of a row) -> what the row still shows."""

    def __missing__(self, pair: tuple[Visible, tuple[Modality, ...]]) -> Visible:
        mask, has = pair
        self[pair] = mask & frozenset(has)
        return self[pair]


def refuse_simulation(partition: Partition) -> None:
    """Raise ConfigError for a simulated partition of rows that name their clients: these are a real federation."""
    if not (isinstance(partition, ByColumn) and partition.column == "client"):
        raise ConfigError(
            f"partition: got {partition.name!r}, but the rows name their clients; "
            'set partition = "by-column", or leave data.columns.client out to simulate clients'
        )


def show_only(examples: Sequence[Example], visible: Visible) -> tuple[Visible, ...]:
    """Masks of test rows, which belong to no client: of each row, the modalities in `visible`."""
    return tuple(visible & frozenset(example.fields) for example in examples)


def shards_digest(shards: Sequence[Shard], examples: Sequence[Example]) -> str:
    """sha256 (16 hex digits) of the clients' ids and masks: equal exactly if partition and masks are."""
    sha = hashlib.sha256()
    codes = {v: "".join(f"\x1f{m}" for m in sorted(v)) for v in {v for shard in shards for v in shard.visible}}
    for shard in shards:
        rows = [f"{examples[row].id}{codes[v]}\x1e" for row, v in zip(shard.rows, shard.visible, strict=True)]
        sha.update(f"client\x1f{shard.client}\x1e{''.join(rows)}".encode())
    return sha.hexdigest()[:16]
