"""Stacked clients in special cases: client halves, resting tensors, unequal ranks, precisions, determinism."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.feddyn import FedDyn
from fedmllm.algorithms.fednova import FedNova
from fedmllm.algorithms.objectives import FedProx
from fedmllm.algorithms.scaffold import Scaffold
from fedmllm.backbones.base import Lora
from fedmllm.backbones.hf import TransformersBackbone
from fedmllm.config import engine as engines
from fedmllm.core.types import ClientUpdate, Example, Params, Sent, State
from fedmllm.federation.client_state import ClientStateStore
from fedmllm.federation.engines.stacked.engine import StackedEngine
from fedmllm.federation.engines.stacked.stack import find_targets
from support.small_federation import (
    COHORT,
    assert_same,
    at,
    federation,
    flat,
    gradients_off,
    one_after_another,
    stirred,
    together,
)
from support.small_federation import sents as sents_of

Load = Callable[..., TransformersBackbone]
Engine = Callable[..., list[ClientUpdate]]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install 'fedmllm[nf4]'"
)


@pytest.mark.parametrize("aggregator", [Scaffold(), FedDyn(alpha=0.1), FedNova()], ids=lambda a: a.name)
def test_client_halves(load: Load, examples: list[Example], aggregator: Aggregator, tmp_path: Path) -> None:
    """Two rounds, so that client state is no longer zero; with a proximal term and clients of unequal size."""
    plain = federation(load("tiny"), examples, FedProx(mu=0.1))
    start = stirred(plain.backbone)

    def rounds(engine: Engine, folder: Path) -> tuple[list[ClientUpdate], State]:
        params, state = start, aggregator.init(start)
        clients = replace(plain, aggregator=aggregator, state=ClientStateStore(folder))
        for round_ in (1, 2):
            sents = {client: aggregator.sends(params, state, at(round_), client) for client in COHORT}
            updates = engine(clients, sents, round_=round_)
            params, state = aggregator.apply(params, state, at(round_), iter(updates))
        return updates, state

    (expected, server), (updates, other) = rounds(one_after_another, tmp_path / "a"), rounds(together, tmp_path / "b")
    assert_same(expected, updates, largest=1e-10)  # as in test_stacked.py
    for key, tree in server.items():
        assert float((flat(tree) - flat(other[key])).abs().max()) <= 1e-12
    for a, b in zip(expected, updates, strict=True):
        assert a.extra.keys() == b.extra.keys()
        assert not a.extra or float((flat(a.extra) - flat(b.extra)).abs().max()) <= 1e-12
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.safetensors"))
    assert files == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*.safetensors"))
    assert bool(files) == ("client-state" in aggregator.needs)


@pytest.mark.parametrize("resting", ["lora_A", "lora_B"])
def test_a_resting_factor(load: Load, examples: list[Example], resting: str) -> None:
    """It has no place in the gradient's norm and no weight decay reaches it."""
    clients = federation(load("tiny"), examples, FedProx(mu=0.1), clip_norm=0.05, weight_decay=0.5)
    start = stirred(clients.backbone)
    trains = frozenset(name for name in start if f".{resting}." not in name)
    sents = {client: Sent(start, trains=trains) for client in COHORT}
    expected = one_after_another(clients, sents)
    assert_same(expected, together(clients, sents), largest=1e-10)
    assert set(expected[1].delta) == trains
    assert bool(flat(expected[1].delta).any())
    left = clients.backbone.lora()
    assert all(torch.equal(left[name], start[name]) for name in set(start) - trains)
    assert all(parameter.requires_grad for parameter in clients.backbone.trainable().values())


def test_clients_of_different_trained_tensors_and_ranks(load: Load, examples: list[Example]) -> None:
    clients = federation(load("tiny"), examples)
    start = stirred(clients.backbone)
    trains = [None, frozenset(n for n in start if ".lora_B." in n), frozenset(n for n in start if ".lora_A." in n)]

    def of_rank(rank: int) -> Params:
        return {n: (t[:rank] if ".lora_A." in n else t[:, :rank]).clone() for n, t in start.items()}

    sents = {client: Sent(of_rank((8, 1, 3)[client % 3]), trains[client % 3]) for client in COHORT}
    expected = one_after_another(clients, sents)
    assert_same(expected, together(clients, sents), largest=1e-10)
    assert_same(expected[2:3], together(clients, sents, cohort=[2])[2:3], largest=1e-10)
    for client, update in enumerate(expected):
        assert {n: t.shape for n, t in update.delta.items()} == {
            n: t.shape for n, t in sents[client].returned().items()
        }


def test_a_kept_factor_stays_with_the_client(load: Load, examples: list[Example], tmp_path: Path) -> None:
    clients = replace(federation(load("tiny"), examples), state=ClientStateStore(tmp_path))
    start = stirred(clients.backbone)
    keeps = frozenset(name for name in start if ".lora_B." in name)
    sents = {client: Sent(start, keeps=keeps) for client in COHORT}
    first = one_after_another(clients, sents, round_=1)
    assert set(first[1].delta) == set(start) - keeps
    kept = clients.state.read(1, 2)
    assert set(kept) == keeps
    assert not torch.equal(flat(kept), flat({n: start[n] for n in keeps}))
    second = one_after_another(clients, sents, round_=2)
    again = {n: kept.get(n, t) for n, t in start.items()}
    (alone,) = one_after_another(replace(clients, state=None), {0: Sent(start), 1: Sent(again, keeps=keeps)}, round_=2)[
        1:
    ]
    assert torch.equal(flat(second[1].delta), flat(alone.delta))


@pytest.mark.parametrize(
    ("base", "family", "limit"),
    [
        ("bfloat16", "tiny", 0.03),  # eight bits: the rounding of a product differs with the other rows (seen: 0.008)
        ("bfloat16", "llava", 0.03),
        pytest.param(
            "nf4", "tiny", 1e-5, marks=needs_bitsandbytes
        ),  # on the CPU widened to float32, which is computed in
        pytest.param("nf4", "qwen2_vl", 1e-5, marks=needs_bitsandbytes),
    ],
)
def test_a_base_of_fewer_bits(load: Load, examples: list[Example], base: str, family: str, limit: float) -> None:
    clients = federation(load(family, base), examples)
    assert max(gradients_off(clients)) <= limit
    updates = together(clients, stirred(clients.backbone))
    assert all(t.dtype == torch.float32 for t in updates[0].delta.values())
    assert all(bool(flat(u.delta).isfinite().all()) for u in updates)
    assert float(flat(updates[4].delta).norm()) > 0


@pytest.mark.parametrize("family", ["minicpmv2.6", "tiny"])
def test_gradient_checkpointing_under_dropout(load: Load, examples: list[Example], family: str) -> None:
    plain, thrifty = (
        federation(load(family, lora=Lora(dropout=0.5), gradient_checkpointing=on), examples) for on in (False, True)
    )
    start = stirred(plain.backbone)
    assert_same(together(plain, start), together(thrifty, start))


@pytest.mark.parametrize(("family", "extra"), [("llava", "multi_modal_projector"), ("tiny", "resampler")])
def test_what_cannot_be_stacked_runs_one_after_another(
    load: Load, examples: list[Example], family: str, extra: str
) -> None:
    """A part of the vision side that is trained: nothing of it is kept, and the engine says why it does something else."""
    clients = federation(load(family, lora=Lora(train_extra=(extra,))), examples)
    start = stirred(clients.backbone)
    engine = StackedEngine(engines.Stacked(), clients)
    assert extra in engine.note
    assert "one after another" in engine.note
    expected = one_after_another(clients, start)
    assert_same(expected, list(engine(at(2), sents_of(start, COHORT))), largest=0.0)
    moved = [name for name, delta in expected[1].delta.items() if extra in name and bool(delta.any())]
    assert moved


def test_a_layer_that_is_no_plain_lora_is_named(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load("llava")
    targets, reason = find_targets(backbone)
    assert targets
    assert reason == ""
    layer = targets[3].layer
    name = next(name for name, module in backbone.model.named_modules() if module is layer)
    monkeypatch.setattr(layer, "lora_variant", {"default": "DoRA"})
    assert find_targets(backbone) == ([], f"{name} is not plain LoRA on a linear layer")


def test_deterministic_on_request(load: Load, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    """On while it trains, as it was before and after; on the CPU the bytes are the same with it and without."""
    clients = federation(load("llava", "float32"), examples)
    start, seen = stirred(clients.backbone), []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    loss = clients.backbone.loss

    def watched(*arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return loss(*arguments)

    monkeypatch.setattr(clients.backbone, "loss", watched)
    plain = together(clients, start)
    assert not any(seen)
    seen.clear()
    careful = together(clients, start, deterministic=True)
    assert seen
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()
    assert_same(plain, careful, largest=0.0)
