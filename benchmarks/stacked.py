"""Seconds of a round: a Trainer per client as the reference has it, one client after another, and all in one pass.

python benchmarks/stacked.py [--model tiny|100M] [--clients 10] [--rows 12] [--repeats 3] > results/stacked-tiny.md

All run in one process, in turns. "CPU s" is what a noisy machine distorts least.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe
from models import hundred_million

from fedmllm.algorithms.objectives import TaskLoss
from fedmllm.backbones.base import FromFolder, Row, Tiny
from fedmllm.backbones.hf import TransformersBackbone
from fedmllm.config.engine import InProcess as InProcessSettings
from fedmllm.config.engine import Stacked as StackedSettings
from fedmllm.config.train import Train
from fedmllm.core.types import Round, Sent, Shard
from fedmllm.data.prompts import Plain
from fedmllm.data.synthetic import SyntheticIrony
from fedmllm.federation.client import Clients, RowStore
from fedmllm.federation.engines.in_process import InProcessEngine
from fedmllm.federation.engines.stacked.engine import StackedEngine
from fedmllm.federation.engines.stacked.memory import CPU_TOKENS
from fedmllm.federation.engines.stacked.packing import PASS_TOKENS, in_step, items, passes

MODALITIES = ("image", "text")


def federation(backbone: TransformersBackbone, num_clients: int, num_rows: int) -> Clients:
    """Clients of `num_rows` rows each; three rows of ten have no picture. The published step: batch 1, accumulation 4."""
    examples = SyntheticIrony(num_train=num_clients * num_rows).load("train").examples
    shards = []
    for client in range(num_clients):
        rows = tuple(range(client * num_rows, (client + 1) * num_rows))
        visible = tuple(frozenset({"text"}) if row % 10 < 3 else frozenset(MODALITIES) for row in rows)
        shards.append(Shard(client, rows, visible))
    return Clients(
        backbone=backbone,
        objective=TaskLoss(),
        train=Train(lr=1e-3, batch_size=1, accumulation=4),
        store=RowStore(backbone, Plain(), examples),
        shards=shards,
        modalities=MODALITIES,
        num_rounds=10,
        seed=0,
    )


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """A client's rows, made again at every access, as the reference does."""

    def __init__(self, clients: Clients, client: int) -> None:
        self._clients, self._shard = clients, clients.shards[client]

    def __len__(self) -> int:
        return len(self._shard.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        store, encoder = self._clients.store, self._clients.backbone.encoder
        example = store._examples[self._shard.rows[index]]
        prompt = store._prompt.render(example, self._shard.visible[index])
        row = encoder.answered(encoder._prompt(prompt), [*encoder.answer_ids("(A) no"), encoder.end_of_turn])
        return {"row": row}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    row: Row = rows[0]["row"]  # batch 1
    per_token = {k: v[..., None, :] if k == "position_ids" else v[None] for k, v in row.per_token.items()}
    return {"input_ids": row.input_ids[None], "labels": row.labels[None], **per_token, **row.images}


def trainers(clients: Clients, checkpointing: bool) -> Callable[[int], None]:
    """A new Hugging Face Trainer per client and round: pixels through the tower and all positions through the head."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    backbone = clients.backbone
    layers = backbone.model.get_submodule(f"base_model.model.{backbone.decoder}")

    def go(round_: int) -> None:
        start = backbone.lora()
        folder = tempfile.mkdtemp()
        for client in range(len(clients.shards)):
            backbone.set_lora(start)
            if checkpointing:
                layers.gradient_checkpointing_enable({"use_reentrant": False})
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=4,
                num_train_epochs=1,
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                adam_beta2=0.95,
                weight_decay=0.1,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=True,
                label_names=["labels"],
            )
            rows = Rows(clients, client)
            trainer = Trainer(model=backbone.model, args=arguments, train_dataset=rows, data_collator=collate)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            if checkpointing:
                layers.gradient_checkpointing_disable()
        backbone.model.eval()
        backbone.set_lora(start)

    return go


def bare(clients: Clients, budget: int) -> Callable[[int], None]:
    """Forward, backward and optimiser on the pooled batches, made beforehand, of one adapter: what no engine can avoid."""
    backbone, prepared = clients.backbone, []
    for steps in in_step(clients, range(len(clients.shards)), 1):
        parts = passes(items(steps), budget, PASS_TOKENS["cpu"])
        prepared.append([(backbone.collate([i.row for i in part]), [i.dropout_seed for i in part]) for part in parts])
    weights = list(backbone.trainable().values())
    start = backbone.lora()

    def go(round_: int) -> None:
        optimizer = clients.optimizer(weights)
        for step in prepared:
            optimizer.zero_grad()
            for batch, seeds in step:
                nll_B, tokens_B = backbone.loss(batch, seeds)
                (nll_B / tokens_B).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        backbone.set_lora(start)

    return go


def engine(of: Any, settings: Any, clients: Clients) -> Callable[[int], None]:
    made = of(settings, clients)
    start, cohort = clients.backbone.lora(), tuple(range(len(clients.shards)))

    def go(round_: int) -> None:
        for update in made(Round(round_, 0, 10, cohort, len(cohort)), dict.fromkeys(cohort, Sent(start))):
            assert update.num_examples
        clients.backbone.set_lora(start)

    return go


def timed(go: Callable[[int], None], round_: int) -> tuple[float, float]:
    gc.collect()  # the previous Trainer leaves many objects behind
    wall, cpu = time.perf_counter(), time.process_time()
    go(round_)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["tiny", "100M"], default="tiny")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    logging.disable(logging.WARNING)

    def load(keep_mb: int) -> TransformersBackbone:
        if a.model == "tiny":
            return Tiny(keep_image_features_mb=keep_mb).load(0)  # type: ignore[return-value]
        return FromFolder(path=str(folder), keep_image_features_mb=keep_mb).load(0)  # type: ignore[return-value]

    folder = Path(tempfile.mkdtemp())
    if a.model == "100M":
        hundred_million(folder)
    clients, forgetful = federation(load(256), a.clients, a.rows), federation(load(0), a.clients, a.rows)
    budget = CPU_TOKENS
    runs = {
        "(a) Trainer per client, checkpointing": trainers(forgetful, True),
        "(b) Trainer per client": trainers(forgetful, False),
        "(c) in-process, image features not kept": engine(InProcessEngine, InProcessSettings(), forgetful),
        "(c') in-process": engine(InProcessEngine, InProcessSettings(), clients),
        "stacked, K = 1": engine(StackedEngine, StackedSettings(clients=1, token_budget=budget), clients),
        "stacked": engine(StackedEngine, StackedSettings(clients=a.clients, token_budget=budget), clients),
        "bare passes (a lower bound)": bare(clients, budget),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    timed(runs["stacked"], 1)  # rows are encoded and features kept: once for all rounds
    for repeat in range(a.repeats):
        for name, go in runs.items():
            times[name].append(timed(go, repeat + 1))
    weights = sum(p.numel() for n, p in clients.backbone.model.named_parameters() if "lora_" not in n)
    tokens = sum(
        clients.store.row(i, v).num_tokens for s in clients.shards for i, v in zip(s.rows, s.visible, strict=True)
    )
    print(f"# A round of {a.clients} clients: {a.model}, {weights / 1e6:.1f} M weights\n\nMachine: {describe()}.")
    print(
        f"{a.rows} rows a client, {tokens / a.clients / a.rows:.0f} tokens a row, medians of {a.repeats}, in turns.\n"
    )
    print("| | wall s | CPU s | stacked is faster by (wall) | (CPU) |\n|---|---|---|---|---|")
    middle = {
        name: tuple(statistics.median(column) for column in zip(*found, strict=True)) for name, found in times.items()
    }
    for name, (wall, cpu) in middle.items():
        ratios = (wall / middle["stacked"][0], cpu / middle["stacked"][1])
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
