"""Modality scenarios: masks over the rows. A scenario hides; it never rewrites data.

`hide` works for any number of modalities. `hide_as_published` gives the masks of FedMLLM (arXiv:2411.14717) from the
streams that its public code uses: N = numpy.random.RandomState(42) (legacy) and R = random.Random(42).
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeInt

from fedmllm.core.errors import ConfigError
from fedmllm.core.rng import stream
from fedmllm.core.spec import Named
from fedmllm.core.types import Modality, Visible

ClientRows = Sequence[Sequence[int]]  # per client, the rows that it holds
Masks = list[list[Visible]]  # per client, one mask a row
MaskRate = Annotated[float, Field(ge=0, le=1)]

IMAGE, TEXT = frozenset({"image"}), frozenset({"text"})
BOTH = IMAGE | TEXT
PUBLISHED_SEED = 42


class Scenario(Named):
    """A rule that hides modalities of the clients' rows."""

    drops_incomplete: ClassVar[bool] = False  # True: a client does not keep a row that lacks a modality

    def check(self, modalities: tuple[Modality, ...], num_clients: int) -> None:
        """Check the settings against the experiment.

        Args:
            modalities: Of the data set.
            num_clients: Number of clients; 0 = known only when the rows are read.

        Raises:
            ConfigError: A setting does not fit.
        """

    def without_effect(self) -> tuple[str, ...]:
        """Settings that the others make ineffective; summaries leave them out.

        Returns:
            Keys of the scenario.
        """
        return ()

    @abstractmethod
    def hide(self, rows: ClientRows, modalities: tuple[Modality, ...], seed: int) -> Masks:
        """Mask the rows. Pure: the same rows and seed give the same masks.

        Args:
            rows: Per client, the indices of its rows.
            modalities: Of the data set, in order.
            seed: Seed of the experiment.

        Returns:
            Per client, one mask per row: the modalities that stay visible.
        """

    def hide_as_published(self, rows: ClientRows) -> Masks:
        """The published masks, bit for bit; only scenarios of the paper have them.

        Args:
            rows: Per client the indices of its rows.

        Returns:
            Per client and row the modalities that stay visible.
        """
        raise ConfigError(f"scenario {self.name!r} has no published masks; pick another partition than 'published'")


class Aligned(Scenario):
    """Every row is complete."""

    name: Literal["aligned"] = "aligned"

    def hide(self, rows: ClientRows, modalities: tuple[Modality, ...], seed: int) -> Masks:
        return [[frozenset(modalities)] * len(own) for own in rows]

    def hide_as_published(self, rows: ClientRows) -> Masks:
        return [[BOTH] * len(own) for own in rows]


class Missing(Scenario):
    """Each row loses each modality independently with probability `rate`; all may go.

    `rates` names other rates for single modalities. A row's draws depend on the seed, the modality and the row alone,
    so a higher rate hides a superset, and another partition changes no mask.
    """

    name: Literal["missing"] = "missing"
    rate: MaskRate = 0.3
    """Probability that a row loses a modality."""
    rates: dict[str, MaskRate] = Field(default_factory=dict)
    """Other probabilities for single modalities: { CAM_BACK = 0.9 }."""

    def check(self, modalities: tuple[Modality, ...], num_clients: int) -> None:
        known(self.rates, modalities, "scenario.rates")

    def rate_of(self, modality: Modality) -> float:
        return self.rates.get(modality, self.rate)

    def hide(self, rows: ClientRows, modalities: tuple[Modality, ...], seed: int) -> Masks:
        self.check(modalities, len(rows))
        size = 1 + max((row for own in rows for row in own), default=-1)
        code = np.zeros(size, dtype=np.int64)  # bit i: modality i is kept
        for i, modality in enumerate(modalities):
            code |= (stream(seed, "missing", modality).random(size) >= self.rate_of(modality)).astype(np.int64) << i
        masks = {c: frozenset(m for i, m in enumerate(modalities) if c >> i & 1) for c in set(code.tolist())}
        return [[masks[c] for c in code[np.asarray(own, dtype=np.int64)].tolist()] for own in rows]

    def hide_as_published(self, rows: ClientRows) -> Masks:
        known(self.rates, ("image", "text"), "scenario.rates")
        legacy = random.Random(PUBLISHED_SEED)
        masks: Masks = []
        for own in rows:
            masks.append([])
            for _ in own:
                text = legacy.random() < 1 - self.rate_of("text")  # text is drawn first
                image = legacy.random() < 1 - self.rate_of("image")
                masks[-1].append((IMAGE if image else frozenset()) | (TEXT if text else frozenset()))
        return masks


class Cross(Scenario):
    """Each client sees one modality only: `num_image_clients` the image, the others the text.

    `clients` holds for any number of modalities: how many clients see each, or each group of them ("labs+genes"). The numbers
    add up to all clients.
    """

    name: Literal["cross"] = "cross"
    num_image_clients: NonNegativeInt = 5
    """Number of clients that see the image; the others see the text."""
    clients: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Number of clients that see each modality, or several joined by "+": { CAM_FRONT = 7, "CAM_BACK+speed" = 3 }."""

    def without_effect(self) -> tuple[str, ...]:
        return ("num_image_clients",) if self.clients else ()

    def check(self, modalities: tuple[Modality, ...], num_clients: int) -> None:
        if num_clients:
            self._counts(modalities, num_clients)

    def _counts(self, modalities: tuple[Modality, ...], num_clients: int) -> dict[str, int]:
        counts = self.clients or self._image_and_text(modalities, num_clients)
        known({m: 0 for group in counts for m in group.split("+")}, modalities, "scenario.clients")
        groups: dict[Visible, str] = {}
        for group in counts:
            if (first := groups.setdefault(frozenset(group.split("+")), group)) != group:
                raise ConfigError(f"scenario.clients.{group}: the same modalities as {first!r}; give them once")
        if sum(counts.values()) != num_clients:
            raise ConfigError(
                f"scenario.clients: {counts} adds up to {sum(counts.values())}, not {num_clients} clients"
            )
        return counts

    def hide(self, rows: ClientRows, modalities: tuple[Modality, ...], seed: int) -> Masks:
        counts = self._counts(modalities, len(rows))
        groups = [*modalities, *sorted(group for group in counts if group not in modalities)]
        masks = [frozenset(group.split("+")) for group in groups for _ in range(counts.get(group, 0))]
        order = stream(seed, "cross").permutation(len(rows)).tolist()
        of_client = dict(zip(order, masks, strict=True))
        return [[of_client[client]] * len(own) for client, own in enumerate(rows)]

    def _image_and_text(self, modalities: tuple[Modality, ...], num_clients: int) -> dict[str, int]:
        if set(modalities) != BOTH:
            example = ", ".join(f"{m} = 1" for m in modalities)
            raise ConfigError(f"scenario.clients: name how many clients see each modality, as in {{ {example} }}")
        return {"image": self.image_clients_of(num_clients), "text": num_clients - self.num_image_clients}

    def image_clients_of(self, num_clients: int) -> int:
        if self.num_image_clients > num_clients:
            raise ConfigError(
                f"scenario.num_image_clients: got {self.num_image_clients}; there are {num_clients} clients"
            )
        return self.num_image_clients

    def published_image_clients(self, legacy: random.Random, num_clients: int) -> list[int]:
        """The clients that see images, in the order in which the reference draws them."""
        if self.clients:
            raise ConfigError("scenario.clients: the published masks know scenario.num_image_clients only")
        return legacy.sample(range(num_clients), self.image_clients_of(num_clients))

    def hide_as_published(self, rows: ClientRows) -> Masks:
        chosen = self.published_image_clients(random.Random(PUBLISHED_SEED), len(rows))
        return [[IMAGE if client in chosen else TEXT] * len(own) for client, own in enumerate(rows)]


class Hybrid(Scenario):
    """Each client keeps each modality with probability `keep_rate`; one left with none draws one of them per row."""

    name: Literal["hybrid"] = "hybrid"
    keep_rate: MaskRate = 0.7
    """Probability that a client keeps a modality."""

    def hide(self, rows: ClientRows, modalities: tuple[Modality, ...], seed: int) -> Masks:
        masks: Masks = []
        for client, own in enumerate(rows):
            rng = stream(seed, "hybrid", client)
            draws = rng.random(len(modalities))
            kept = frozenset(m for m, draw in zip(modalities, draws, strict=True) if draw < self.keep_rate)
            single = [frozenset({modalities[i]}) for i in rng.integers(len(modalities), size=len(own))]
            masks.append([kept] * len(own) if kept else single)
        return masks

    def published_presence(self, legacy: np.random.RandomState, num_clients: int) -> list[Visible]:
        """Per client what it keeps, perhaps nothing."""
        drawn = legacy.binomial(1, self.keep_rate, size=(num_clients, 2))
        return [(IMAGE if image else frozenset()) | (TEXT if text else frozenset()) for image, text in drawn]

    def hide_as_published(self, rows: ClientRows) -> Masks:
        presence = self.published_presence(np.random.RandomState(PUBLISHED_SEED), len(rows))
        legacy = random.Random(PUBLISHED_SEED)
        return [[kept or published_flip(legacy) for _ in own] for kept, own in zip(presence, rows, strict=True)]


def published_flip(legacy: random.Random) -> Visible:
    """One of the two modalities."""
    return IMAGE if legacy.random() < 0.5 else TEXT


def known(table: dict[str, float] | dict[str, int], modalities: tuple[Modality, ...], place: str) -> None:
    """Refuse a modality that the rows of this set cannot have."""
    for modality in table:
        if modality not in modalities:
            raise ConfigError(f"{place}.{modality}: unknown modality; allowed: {', '.join(modalities)}")
