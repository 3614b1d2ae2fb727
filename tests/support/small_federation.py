"""Both engines on the small federation."""

from __future__ import annotations

from typing import Any

import torch

from fedmllm.config import engine as engines
from fedmllm.core.types import ClientUpdate, Params, Round, Sent
from fedmllm.federation.client import Clients
from fedmllm.federation.engines.in_process import InProcessEngine
from fedmllm.federation.engines.stacked.engine import StackedEngine
from fedmllm.federation.engines.stacked.stack import Stack, gate_of
from fedmllm.testing import COHORT, MODALITIES, SIZES, assert_same, federation, flat
from fedmllm.testing import perturbed as stirred

__all__ = [
    "COHORT",
    "MODALITIES",
    "SIZES",
    "assert_same",
    "at",
    "federation",
    "flat",
    "gradients_off",
    "one_after_another",
    "sents",
    "stirred",
    "together",
]


def at(round_: int = 2) -> Round:
    return Round(round_, 0, 4, tuple(COHORT), len(SIZES))


def one_after_another(
    clients: Clients, start: Params | dict[int, Sent], cohort=COHORT, round_: int = 2
) -> list[ClientUpdate]:
    return list(InProcessEngine(engines.InProcess(), clients)(at(round_), sents(start, cohort)))


def together(
    federation_: Clients, start: Params | dict[int, Sent], cohort=COHORT, round_: int = 2, **settings: Any
) -> list[ClientUpdate]:
    engine = StackedEngine(engines.Stacked(**settings), federation_)
    assert engine.note == ""
    return list(engine(at(round_), sents(start, cohort)))


def sents(start: Params | dict[int, Sent], cohort) -> dict[int, Sent]:
    """The same adapter for all, unless `start` says what each client receives."""
    return start if 0 in start else {client: Sent(start) for client in cohort}


def gradients_off(clients: Clients, token_budget: int = 1024) -> list[float]:
    """Relative L2 between the engines of every client's gradient at the first step, before Adam."""
    start = stirred(clients.backbone)
    members = [client for client in COHORT if SIZES[client]]
    steps = [next(clients.steps(client, 1)) for client in members]
    engine = StackedEngine(engines.Stacked(token_budget=token_budget), clients)
    starts = [start] * len(members)
    stack = Stack(engine._targets, clients.backbone.trainable(), starts, gate=gate_of(clients.backbone))
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
