"""A small federation: unequal clients, one of them empty, pictures on a third of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedmllm.backbones.hf import TransformersBackbone
from fedmllm.config import Train
from fedmllm.local import Clients, RowStore
from fedmllm.objectives import Objective, TaskLoss
from fedmllm.prompts import Plain
from fedmllm.types import Example, Params, Shard

SIZES = (3, 9, 1, 0, 12)  # rows of each client
TEXTS = ("so it is", "a dog on a bicycle, seen from behind", "no", "the other way round, they say", "rain again")
MODALITIES = ("image", "text")


def federation(
    backbone: TransformersBackbone, examples: list[Example], objective: Objective | None = None, **train: Any
) -> Clients:
    """Five clients; a third of the rows show both modalities, the others text alone."""
    masks = (frozenset(MODALITIES), frozenset({"text"}), frozenset({"text"}))
    firsts = np.cumsum((0, *SIZES))
    shards = [
        Shard(client, tuple(range(first, first + size)), tuple(masks[(client + i) % 3] for i in range(size)))
        for client, (first, size) in enumerate(zip(firsts[:-1].tolist(), SIZES, strict=True))
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


def stirred(backbone: TransformersBackbone) -> Params:
    """An adapter whose B is not zero, so that A's have gradients at the first step; the same whatever ran before."""
    noise = torch.Generator().manual_seed(0)
    return {
        name: (0.05 * torch.randn(t.shape, generator=noise, dtype=torch.float64)).to(t.dtype)
        for name, t in backbone.lora().items()
    }


def flat(params: Params) -> torch.Tensor:
    return torch.cat([params[name].double().flatten() for name in sorted(params)])
