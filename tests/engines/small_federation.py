"""A small federation: unequal clients, one of them empty, pictures on a third of the rows; and both engines on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedmllm.algorithms.objectives import Objective, TaskLoss
from fedmllm.backbones.hf import TransformersBackbone
from fedmllm.config import engine as engines
from fedmllm.config.train import Train
from fedmllm.core.types import ClientUpdate, Example, Params, Round, Sent, Shard
from fedmllm.data.prompts import Plain
from fedmllm.federation.client import Clients, RowStore
from fedmllm.federation.engines.in_process import InProcess
from fedmllm.federation.engines.stacked.engine import Stacked
from fedmllm.federation.engines.stacked.stack import Stack

SIZES = (3, 9, 1, 0, 12)  # rows of each client
TEXTS = ("so it is", "a dog on a bicycle, seen from behind", "no", "the other way round, they say", "rain again")
MODALITIES = ("image", "text")
COHORT = range(len(SIZES))


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


def at(round_: int = 2) -> Round:
    return Round(round_, 0, 4, tuple(COHORT), len(SIZES))


def one_after_another(
    clients: Clients, start: Params | dict[int, Sent], cohort=COHORT, round_: int = 2
) -> list[ClientUpdate]:
    return list(InProcess(engines.InProcess(), clients)(at(round_), sents(start, cohort)))


def together(
    federation_: Clients, start: Params | dict[int, Sent], cohort=COHORT, round_: int = 2, **settings: Any
) -> list[ClientUpdate]:
    engine = Stacked(engines.Stacked(**settings), federation_)
    assert engine.note == ""
    return list(engine(at(round_), sents(start, cohort)))


def sents(start: Params | dict[int, Sent], cohort) -> dict[int, Sent]:
    """The same adapter for all, unless `start` says what each client receives."""
    return start if 0 in start else {client: Sent(start) for client in cohort}


def assert_same(expected: list[ClientUpdate], updates: list[ClientUpdate], largest: float = 1e-12) -> None:
    """The issue's bound on max |dW| in float64, and the same books."""
    assert [u.client for u in updates] == [u.client for u in expected]
    for a, b in zip(expected, updates, strict=True):
        assert list(a.delta) == list(b.delta)
        assert float((flat(a.delta) - flat(b.delta)).abs().max()) <= largest
        assert a.num_examples == b.num_examples
        assert [a.metrics[k] for k in ("num_steps", "num_tokens")] == [
            b.metrics[k] for k in ("num_steps", "num_tokens")
        ]
        assert b.metrics["loss"] == pytest.approx(a.metrics["loss"], rel=1e-9)


def gradients_off(clients: Clients, token_budget: int = 1024) -> list[float]:
    """Relative L2 between the engines of every client's gradient at the first step, before Adam."""
    start = stirred(clients.backbone)
    members = [client for client in COHORT if SIZES[client]]
    steps = [next(clients.steps(client, 1)) for client in members]
    engine = Stacked(engines.Stacked(token_budget=token_budget), clients)
    stack = Stack(engine._targets, clients.backbone.trainable(), [start] * len(members))
    engine._gradients(stack, steps, torch.zeros(len(members), dtype=torch.float64))
    clients.backbone.set_lora(start)
    off, weights = [], clients.backbone.trainable()
    for slot, step in enumerate(steps):
        for weight in weights.values():
            weight.grad = None
        clients.backward(step)
        expected = flat({name: weight.grad for name, weight in weights.items() if weight.grad is not None})
        off.append(float((stack.grads_KT[slot].double() - expected).norm() / expected.norm()))
    return off
