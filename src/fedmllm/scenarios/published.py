"""Partitions of FedMLLM's public code (arXiv:2411.14717, github 1xbq1/FedMLLM).

Clients hold the published rows. Streams: N = numpy.random.RandomState (legacy), R = random.Random; seeds 42, and 41 for the
medical federation. The seed of the experiment plays no part.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from pydantic import PositiveFloat, PositiveInt

from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.types import Example, Modality, Visible
from fedmllm.scenarios.masks import BOTH, IMAGE, PUBLISHED_SEED, TEXT, Cross, Hybrid, Masks, Scenario, published_flip
from fedmllm.scenarios.partitions import ClientSplit, Partition

MEDICAL_SEED = 41
MEDICAL = frozenset({"vqa-rad", "flashcards"})
# Set -> is the label with this index lifted? CrisisMMD's rarest class has fewer rows than there can be clients to lift,
# which would never end; lifting one label is enough to leave no client empty.
LIFTED: dict[str, Callable[[int], bool]] = {
    "hateful-memes": lambda label: True,
    "crisismmd": lambda label: label == 0,
}


class Published(Partition):
    """The published rows and masks, bit for bit: Hateful Memes, CrisisMMD and the medical federation.

    `alpha` matters where rows are skewed by label; the medical federation has none. Data sets put their name into
    `Example.columns["set"]`.
    """

    name: Literal["published"] = "published"
    alpha: PositiveFloat = 0.5
    """Concentration of the published partition; the medical federation has none."""
    num_clients: PositiveInt = 10
    """Number of clients."""

    def split(self, examples: Sequence[Example], seed: int) -> ClientSplit:
        """Dirichlet over labels in order of first appearance; see `lift` for clients whose share is below one row."""
        is_lifted = LIFTED[only_set(examples)]
        groups: dict[str, list[int]] = {}
        for row, example in enumerate(examples):
            groups.setdefault(example.answer, []).append(row)
        legacy = np.random.RandomState(PUBLISHED_SEED)
        shares = legacy.dirichlet([self.alpha] * self.num_clients, len(groups))
        clients: ClientSplit = [[] for _ in range(self.num_clients)]
        for index, (label, rows) in enumerate(groups.items()):
            counts = [int(share * len(rows)) for share in shares[index]]
            if is_lifted(index):
                lift(counts, f"{examples[rows[0]].where}: label {label!r}")
            counts[-1] = len(rows) - sum(counts[:-1])
            start = 0
            for client, count in enumerate(counts):
                clients[client] += rows[start : start + count]
                start += count
        shuffler = random.Random(PUBLISHED_SEED)
        for own in clients:
            shuffler.shuffle(own)
        return clients

    def split_test(self, train: Sequence[Example], test: Sequence[Example], seed: int) -> ClientSplit:
        raise ConfigError("partition: 'published' states no split of the test rows; allowed: dirichlet, iid, by-column")

    def assign(
        self, examples: Sequence[Example], modalities: tuple[Modality, ...], scenario: Scenario
    ) -> tuple[ClientSplit, Masks]:
        """Per client its rows and their masks."""
        if frozenset(modalities) != BOTH:
            raise ConfigError(f"partition: 'published' is for rows of image and text, not {', '.join(modalities)}")
        if {example.columns.get("set") for example in examples} == MEDICAL:
            return medical(examples, scenario, self.num_clients)
        rows = self.split(examples, PUBLISHED_SEED)
        return rows, scenario.hide_as_published(rows)


def only_set(examples: Sequence[Example]) -> str:
    """The data set that all rows come from; it must have a published partition."""
    sets = sorted({example.columns.get("set", "this data set") for example in examples})
    if len(sets) != 1 or sets[0] not in LIFTED:
        allowed = ", ".join([*LIFTED, "medical"])
        raise ConfigError(f"partition: 'published' is not known for {' and '.join(sets)}; published: {allowed}")
    return sets[0]


def lift(counts: list[int], place: str) -> None:
    """Lift counts below 1 to 1, in client order, each by taking 1 from the first client that has more than 1.

    The list of donors is made once per pass; a donor that falls to 1 leaves it; passes repeat until no count is below 1.
    """
    if sum(counts) < len(counts):  # the reference loops for ever here
        raise DataError(
            f"{place}: too few rows for the published partition: {sum(counts)} after truncation of the shares, "
            f"and each of {len(counts)} clients needs one"
        )
    while min(counts) < 1:
        donors = [client for client, count in enumerate(counts) if count > 1]
        for client in [client for client, count in enumerate(counts) if count < 1]:
            if not donors:
                break
            counts[client] += 1
            counts[donors[0]] -= 1
            if counts[donors[0]] <= 1:
                donors.pop(0)


def medical(examples: Sequence[Example], scenario: Scenario, num_clients: int) -> tuple[ClientSplit, Masks]:
    """VQA-RAD gives the image questions, the flashcards the text questions.

    Each set is shuffled and cut into as many equal parts as clients see it, the last part taking the rest.
    """
    legacy = random.Random(MEDICAL_SEED)
    if isinstance(scenario, Cross):
        chosen = scenario.published_image_clients(legacy, num_clients)
        presence: list[Visible] = [IMAGE if client in chosen else TEXT for client in range(num_clients)]
        image_clients = chosen  # parts are given out in the order of the draw
    elif isinstance(scenario, Hybrid):
        kept = scenario.published_presence(np.random.RandomState(MEDICAL_SEED), num_clients)
        presence = [present or published_flip(legacy) for present in kept]
        image_clients = [client for client, present in enumerate(presence) if "image" in present]
    else:
        raise ConfigError(
            f"scenario {scenario.name!r}: the medical federation was published with cross and hybrid only"
        )
    text_clients = [client for client, present in enumerate(presence) if "text" in present]
    clients: ClientSplit = [[] for _ in range(num_clients)]
    for source, holders in (("vqa-rad", image_clients), ("flashcards", text_clients)):
        rows = [row for row, example in enumerate(examples) if example.columns["set"] == source]
        for client, part in zip(holders, parts(rows, len(holders), source, legacy), strict=True):
            clients[client] += part
    for client, present in enumerate(presence):
        if present == BOTH:
            legacy.shuffle(clients[client])
    return clients, [[presence[client]] * len(own) for client, own in enumerate(clients)]


def parts(rows: list[int], count: int, source: str, legacy: random.Random) -> list[list[int]]:
    """`rows` shuffled and cut into `count` contiguous parts of n // count, the last taking the rest."""
    if count == 0:
        raise ConfigError(f"scenario: no client would see {source}; the published federation uses both sets")
    legacy.shuffle(rows)
    size = len(rows) // count
    return [rows[i * size : (i + 1) * size if i < count - 1 else len(rows)] for i in range(count)]
