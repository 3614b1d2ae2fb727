"""Recovery of a row's words from one update (DAGER, arXiv:2405.15586), by a server that chooses the adapter."""

from __future__ import annotations

from pathlib import Path

import torch

from fedmllm.config.experiment import Experiment
from fedmllm.core.rng import stream
from fedmllm.core.tensors import flatten, manifest_digest
from fedmllm.core.types import Params
from fedmllm.flower.request import Request
from fedmllm.flower.site.config import Site
from fedmllm.flower.site.trainer import Trainer
from fedmllm.runs.audits.tokens import nearest_words

OPEN = "min_steps = 1\nmin_rows_per_step = 1\nlora_a = {min = 0}\nlora_b = {min = 0}\nmin_movement = 0"
ONE_ROW = {"lr": 1e-3, "batch_size": 1, "accumulation": 1, "max_steps": 1}
STEPS = {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 2}
NUM_FRAME_ROWS = 60  # of other people's rows, from which the server knows the words of every prompt


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
    nearest = nearest_words(backbone.model, delta, frame, len(words))
    return len(nearest & words) / len(words)
