"""Recovery of a row's words from one update (DAGER, arXiv:2405.15586), and the site's limits against it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedmllm.backbones.base import Lora
from fedmllm.config.experiment import Experiment
from fedmllm.config.train import Train
from fedmllm.core.rng import stream
from fedmllm.core.tensors import flatten, manifest_digest
from fedmllm.core.types import Params
from fedmllm.flower.request import Request
from fedmllm.flower.site.config import Refused, Site
from fedmllm.flower.site.plausibility import scales, suppressed_updates
from fedmllm.flower.site.trainer import Trainer

OPEN = "min_steps = 1\nmin_rows_per_step = 1\nlora_a = {min = 0}\nlora_b = {min = 0}\nmin_movement = 0"
ONE_ROW = {"lr": 1e-3, "batch_size": 1, "accumulation": 1, "max_steps": 1}
STEPS = {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 2}
NUM_FRAME_ROWS = 60  # of other people's rows, from which the server knows the words of every prompt


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Trainer:
    return trainer(tmp_path_factory.mktemp("open"), OPEN)


def trainer(folder: Path, allow: str) -> Trainer:
    head = 'name = "north"\nserver = "localhost:1"\nca = "ca.crt"\nkey = "site.key"\nmodalities = ["text"]\n'
    (folder / "site.toml").write_text(f"{head}[data]\nname = 'synthetic-irony'\n[allow]\n{allow}\n")
    return Trainer(Site.load(folder / "site.toml"), folder)


def request_of(there: Trainer, train: dict, **changes) -> Request:
    experiment = Experiment.parse({"data": "synthetic-irony", "cohort_size": 1, "train": train})
    asked = Request.of(experiment, "", "north", 0, 1).model_copy(update=changes)
    return asked.model_copy(update={"base": there.backbone(asked).digest})


def adapter(there: Trainer, request: Request, a: float, b: float) -> Params:
    """An adapter as a server may send it: `a` times the drawn lora_A, and lora_B of that size."""
    noise = torch.Generator().manual_seed(0)
    own = there.backbone(request).spec.load(request.seed).lora()
    return {n: t * a if "lora_A" in n else b * torch.randn(t.shape, generator=noise) for n, t in own.items()}


def ask(there: Trainer, request: Request, start: Params) -> Params:
    return there.train(request, flatten(start).numpy(), manifest_digest(start))[0]


def recovered(there: Trainer, request: Request, delta: Params) -> float:
    """Share of the row's own words among as many tokens that lie nearest to the row space of layer 0's change."""
    backbone = there.backbone(request)
    shard = there.site.shard(0)[1]
    order = stream(request.seed, "order", 1, 0, 0).permutation(len(shard.rows))
    store = there._store[1]
    of_row = [set(store.row(shard.rows[i], shard.visible[i]).input_ids.tolist()) for i in order[:NUM_FRAME_ROWS]]
    frame = set.intersection(*of_row)
    words = of_row[0] - frame
    layer = next(m for n, m in backbone.model.named_modules() if n.endswith("layers.0.input_layernorm"))
    with torch.no_grad():
        x_VD = layer(backbone.model.get_input_embeddings().weight.float()).double()
    known, _ = torch.linalg.qr(x_VD[sorted(frame)].T)
    x_VD = x_VD - x_VD @ known @ known.T
    g_RD = torch.cat([t for n, t in delta.items() if "layers.0.self_attn" in n and "lora_A" in n]).double()
    g_RD = g_RD / g_RD.norm()
    g_RD = g_RD - g_RD @ known @ known.T
    _, sizes, basis = torch.linalg.svd(g_RD, full_matrices=False)
    basis = basis[sizes > 1e-5 * sizes[0]]
    off_V = (x_VD - x_VD @ basis.T @ basis).norm(dim=1) / x_VD.norm(dim=1).clamp_min(1e-9)
    off_V[sorted(frame)] = torch.inf
    nearest = set(off_V.argsort()[: len(words)].tolist())
    return len(nearest & words) / len(words)


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
        r"1 optimiser steps; .* no fewer than 2; 1 rows per optimiser step",
    ),
    "a large rank": (STEPS, {"lora": Lora(r=16)}, 1.0, 0.0, r"lora\.r = 16; this site allows at most 8"),
    "factor A of zeros": (STEPS, {}, 0.0, 0.02, r"lora_A.*: RMS relative to an untrained one is 0;"),
    "a tiny factor B": (STEPS, {}, 1.0, 1e-11, r"lora_B.*: RMS is 1\.03e-11;"),
    "a tiny scale": (STEPS, {"lora": Lora(alpha=1e-11)}, 1.0, 0.02, r"moved by .* proportional to the gradient"),
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
    assert (
        "moved by 4e-05 (RMS); this site allows no less than 5e-05"
        in suppressed_updates(slow, start, train, 1e-3, 2, 0.05)[0]
    )
    assert suppressed_updates({"a": decayed["a"] - 6e-5}, start, train, 1e-3, 2, 0.05) == []
