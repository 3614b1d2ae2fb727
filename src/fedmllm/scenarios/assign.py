"""Shards: rows partitioned over clients, with modalities hidden. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import chain, compress

import numpy as np

from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.rows import Coded, columns_of_rows, row_fields, row_ids
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
    if any("client" in columns for columns in columns_of_rows(examples).used()):
        refuse_simulation(partition)
    if isinstance(partition, Published):
        rows, masks = partition.assign(examples, modalities, scenario)
    else:
        rows = partition.split(examples, seed)
        masks = scenario.hide(rows, modalities, seed)
    names = partition.client_names(examples) or ("",) * len(rows)
    has, meet = _modalities(examples), _Meet()  # few different ones, and rows share them
    shards = []
    for client, (own, kept, name) in enumerate(zip(rows, masks, names, strict=True)):
        there = map(has.values.__getitem__, has.codes[np.asarray(own, np.int64)].tolist())
        visible = list(map(meet.__getitem__, zip(kept, there, strict=True)))
        if scenario.drops_incomplete:
            complete = [v == frozenset(modalities) for v in visible]
            own, visible = list(compress(own, complete)), list(compress(visible, complete))
        shards.append(Shard(client, tuple(own), tuple(visible), name))
    if not any(shard.rows for shard in shards):
        raise DataError(f"scenario: {scenario.name!r} leaves no row; choose one that leaves complete rows")
    return tuple(shards)


class _Meet(dict[tuple[Visible, Visible], Visible]):
    """(mask, modalities of a row) -> what the row still shows."""

    def __missing__(self, pair: tuple[Visible, Visible]) -> Visible:
        mask, has = pair
        self[pair] = mask & has
        return self[pair]


def _modalities(examples: Sequence[Example]) -> Coded[Visible]:
    """Return what each row has."""
    same = dict[Visible, Visible]()  # one set for all equal ones: Python computes the hash of each object once
    return row_fields(examples).of_values(lambda fields: same.setdefault(has := frozenset(fields), has))


def refuse_simulation(partition: Partition) -> None:
    """Raise ConfigError for a simulated partition of rows that name their clients: these are a real federation."""
    if not (isinstance(partition, ByColumn) and partition.column == "client"):
        raise ConfigError(
            f"partition: got {partition.name!r}, but the rows name their clients; "
            'set partition = "by-column", or leave data.columns.client out to simulate clients'
        )


def show_only(examples: Sequence[Example], visible: Visible) -> tuple[Visible, ...]:
    """Masks of test rows, which belong to no client: of each row, the modalities in `visible`."""
    return tuple(visible & has for has in _modalities(examples))


def shards_digest(shards: Sequence[Shard], examples: Sequence[Example]) -> str:
    """sha256 (16 hex digits) of the clients' ids and masks: equal exactly if partition and masks are."""
    return digest_of_ids(shards, (row_ids(examples, shard.rows) for shard in shards))


def digest_of_ids(shards: Sequence[Shard], ids: Iterable[Sequence[str | int]]) -> str:
    """As `shards_digest`, from the ids of each client's rows."""
    sha = hashlib.sha256()
    codes = {v: "".join(f"\x1f{m}" for m in sorted(v)) + "\x1e" for shard in shards for v in set(shard.visible)}
    for shard, own in zip(shards, ids, strict=True):
        masks = map(codes.__getitem__, shard.visible)
        rows = "".join(chain.from_iterable(zip(map(str, own), masks, strict=True)))
        sha.update(f"client\x1f{shard.client}\x1e{rows}".encode())
    return sha.hexdigest()[:16]
