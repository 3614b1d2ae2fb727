"""Recovery of a row's words from one update (DAGER, arXiv:2405.15586), and the site's limits against it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedmllm.backbones.base import Lora
from fedmllm.config.train import Train
from fedmllm.flower.site.config import Refused
from fedmllm.flower.site.plausibility import scales, suppressed_updates
from fedmllm.flower.site.trainer import Trainer
from support.token_attack import ONE_ROW, OPEN, STEPS, adapter, ask, recovered, request_of, trainer


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Trainer:
    return trainer(tmp_path_factory.mktemp("open"), OPEN)


def test_without_limits_one_update_gives_the_words_of_a_row_away(rows: Trainer):
    request = request_of(rows, ONE_ROW)
    delta = ask(rows, request, adapter(rows, request, a=0.0, b=1e-11))
    assert recovered(rows, request, delta) == 1.0


def test_an_honest_adapter_gives_few_of_them_away(rows: Trainer):
    request = request_of(rows, ONE_ROW)
    delta = ask(rows, request, adapter(rows, request, a=1.0, b=0.02))
    assert recovered(rows, request, delta) < 0.5


ATTACKS = {
    "one step of one row": (
        ONE_ROW,
        {},
        0.0,
        1e-11,
        r"fewer optimiser steps .* allow.min_steps = 2; fewer rows per optimiser step",
    ),
    "a large rank": (STEPS, {"lora": Lora(r=16)}, 1.0, 0.0, r"lora\.r = 16; this site allows at most 8"),
    "factor A of zeros": (STEPS, {}, 0.0, 0.02, r"lora_A.*: RMS relative to an untrained one is 0;"),
    "a tiny factor B": (STEPS, {}, 1.0, 1e-11, r"lora_B.*: RMS is 1\.03e-11;"),
    "a tiny scale": (STEPS, {"lora": Lora(alpha=1e-11)}, 1.0, 0.02, r"moved by less .* proportional to the gradient"),
    "a tiny clip": ({**STEPS, "clip_norm": 1e-10}, {}, 1.0, 0.02, r"moved by .* proportional to the gradient"),
}


@pytest.mark.parametrize(("train", "changes", "a", "b", "reason"), ATTACKS.values(), ids=ATTACKS)
def test_the_default_limits_refuse_every_variant(tmp_path: Path, train, changes, a, b, reason):
    there = trainer(tmp_path, "")
    request = request_of(there, train, **changes)
    with pytest.raises(Refused, match=f"refused by site north: .*{reason}"):
        ask(there, request, adapter(there, request, a, b))


@pytest.mark.parametrize("lr", [2e-5, 1e-3])
def test_the_default_limits_leave_ordinary_rounds_alone(tmp_path: Path, lr: float):
    there = trainer(tmp_path, "")
    request = request_of(there, {"lr": lr, "max_steps": 2})
    start = there.backbone(request).lora()
    delta = ask(there, request, start)
    second = request.model_copy(update={"round": 2})
    assert ask(there, second, {name: start[name] + delta[name] for name in start})


def test_a_tensor_without_gradient_passes_and_one_with_a_suppressed_gradient_does_not():
    start = {"a": torch.ones(4)}
    train = Train(lr=1e-3, weight_decay=0.1, step_schedule="constant")
    decayed = {"a": start["a"] * (1 - 1e-4) * (1 - 1e-4) - 1}
    assert scales(start) == {"a": 1.0}
    assert suppressed_updates(decayed, start, train, 1e-3, 2, 0.05) == []
    slow = {"a": decayed["a"] - 4e-5}
    (reason,) = suppressed_updates(slow, start, train, 1e-3, 2, 0.05)
    assert "a: moved by less than allow.min_movement = 0.05 allows" in reason
    assert getattr(reason, "here", "") == "4e-05 (RMS), less than 5e-05"
    assert suppressed_updates({"a": decayed["a"] - 6e-5}, start, train, 1e-3, 2, 0.05) == []
