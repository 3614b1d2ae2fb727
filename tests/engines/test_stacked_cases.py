"""Stacked clients where something is special: SCAFFOLD, other precisions, what cannot be stacked, determinism."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_federation import COHORT, assert_same, federation, flat, gradients_off, one_after_another, stirred, together

from fedmllm.algorithms.objectives import FedProx
from fedmllm.algorithms.scaffold import Scaffold
from fedmllm.backbones.base import Lora
from fedmllm.backbones.hf import TransformersBackbone
from fedmllm.config import engine as engines
from fedmllm.core.tensors import subtract
from fedmllm.core.types import ClientUpdate, Example, Params
from fedmllm.federation.client_state import Controls
from fedmllm.federation.engines.stacked.engine import Stacked
from fedmllm.federation.engines.stacked.stack import find_targets

Load = Callable[..., TransformersBackbone]
Engine = Callable[..., list[ClientUpdate]]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install 'fedmllm[nf4]'"
)


def test_scaffold(load: Load, examples: list[Example], tmp_path: Path) -> None:
    """Two rounds, so that the control variates are not zero any more; with a proximal pull and clients of unequal size."""
    plain = federation(load("tiny"), examples, FedProx(mu=0.1))
    start = stirred(plain.backbone)

    def rounds(engine: Engine, folder: Path) -> tuple[list[ClientUpdate], Params]:
        aggregator, params = Scaffold(), start
        state = aggregator.init(start)
        controls = Controls(folder, len(COHORT), aggregator.broadcast(state), begun=0)
        clients = replace(plain, controls=controls)
        for round_ in (1, 2):
            updates = engine(clients, params, round_=round_)
            params, state = aggregator.apply(params, state, iter(updates))
            controls.server = aggregator.broadcast(state)
        return updates, controls.server

    (expected, server), (updates, other) = rounds(one_after_another, tmp_path / "a"), rounds(together, tmp_path / "b")
    assert_same(expected, updates, largest=1e-10)  # as in test_stacked.py
    assert float((flat(server) - flat(other)).abs().max()) <= 1e-12
    assert [u.control is None for u in updates] == [u.control is None for u in expected]
    for a, b in zip(expected, updates, strict=True):
        assert not a.control or float((flat(a.control) - flat(b.control)).abs().max()) <= 1e-12
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.safetensors"))
    assert files == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*.safetensors"))
    without = together(plain, start)
    assert float(flat(subtract(without[1].delta, updates[1].delta)).norm()) > 0


@pytest.mark.parametrize(
    ("base", "family", "limit"),
    [
        ("bfloat16", "tiny", 0.03),  # eight bits: the rounding of a product differs with the rows beside (seen: 0.008)
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
    engine = Stacked(engines.Stacked(), clients)
    assert extra in engine.note
    assert "one after another" in engine.note
    expected = one_after_another(clients, start)
    assert_same(expected, list(engine(start, 2, COHORT)), largest=0.0)
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
    assert find_targets(backbone) == ([], f"{name} is no plain LoRA on a linear layer")


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
