"""A small federation.

Its clients are of unequal size, one is empty, and a third of the rows have pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fedmllm.algorithms.objectives import Objective, TaskLoss
from fedmllm.backbones.base import Backbone
from fedmllm.config.train import Train
from fedmllm.core.types import ClientUpdate, Content, Example, Modality, Params, Shard
from fedmllm.data.prompts import Plain
from fedmllm.federation.client import Clients, RowStore

SIZES = (3, 9, 1, 0, 12)
"""Rows of each client of the small federation; one has none."""
TEXTS = ("so it is", "a dog on a bicycle, seen from behind", "no", "the other way round, they say", "rain again")
MODALITIES = ("image", "text")
"""Modalities of its rows."""
COHORT = range(len(SIZES))
"""All of its clients."""


def examples(folder: Path) -> list[Example]:
    """Return the rows of the federation: a two-way question on a picture and a text.

    Args:
        folder: Where the pictures are written, random ones of three sizes.
    """
    rng, rows = np.random.default_rng(0), []
    for i in range(sum(SIZES)):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (30 + 10 * (i % 3), 40, 3), dtype=np.uint8)).save(path)
        fields: dict[Modality, Content] = {"image": (path,), "text": TEXTS[i % len(TEXTS)]}
        rows.append(Example(i, fields, "Is it so?", ("no", "yes"), ("no", "yes")[i % 2], f"made up:{i}"))
    return rows


def federation(
    backbone: Backbone, examples: Sequence[Example], objective: Objective | None = None, **train: Any
) -> Clients:
    """Return five clients; a third of the rows have both modalities, the others text alone.

    Args:
        backbone: The model, such as `Tiny().load(seed=0)`.
        examples: The rows, as `examples` makes them.
        objective: The task loss by default.
        train: Settings of local training; the learning rate is 1e-3 by default.
    """
    masks = (frozenset(MODALITIES), frozenset({"text"}), frozenset({"text"}))
    firsts = accumulate(SIZES, initial=0)
    shards = [
        Shard(client, tuple(range(first, first + size)), tuple(masks[(client + i) % 3] for i in range(size)))
        for client, (first, size) in enumerate(zip(firsts, SIZES, strict=False))
    ]
    return Clients(
        backbone=backbone,
        objective=objective or TaskLoss(),
        train=Train(**{"lr": 1e-3, **train}),
        store=RowStore(backbone, Plain(), examples),
        shards=shards,
        modalities=MODALITIES,
        num_rounds=4,
        seed=0,
    )


def perturbed(backbone: Backbone) -> Params:
    """Return an adapter whose B is not zero, so that A has gradients at the first step. It does not depend on the model's."""
    noise = torch.Generator().manual_seed(0)
    return {
        name: (0.05 * torch.randn(t.shape, generator=noise, dtype=torch.float64)).to(t.dtype)
        for name, t in backbone.lora().items()
    }


def flat(params: Params) -> torch.Tensor:
    """Return all values as one float64 vector, in the order of the sorted names."""
    return torch.cat([params[name].double().flatten() for name in sorted(params)])


def assert_same(expected: Sequence[ClientUpdate], updates: Sequence[ClientUpdate], largest: float = 1e-12) -> None:
    """Assert that two engines agree on a cohort's updates.

    Args:
        expected: Of the reference engine.
        updates: Of the engine under test.
        largest: Bound on the difference of a weight.

    Raises:
        AssertionError: Clients, weights, row counts, step counts or losses differ.
    """
    assert [u.client for u in updates] == [u.client for u in expected], "other clients, or another order"
    for a, b in zip(expected, updates, strict=True):
        assert list(a.delta) == list(b.delta), f"client {a.client}: other tensors"
        off = float((flat(a.delta) - flat(b.delta)).abs().max())
        assert off <= largest, f"client {a.client}: a weight differs by {off:g}, more than {largest:g}"
        assert a.num_examples == b.num_examples, f"client {a.client}: other row counts"
        for key in ("num_steps", "num_tokens"):
            assert a.metrics[key] == b.metrics[key], f"client {a.client}: other {key}"
        assert math.isclose(a.metrics["loss"], b.metrics["loss"], rel_tol=1e-9), f"client {a.client}: other losses"
