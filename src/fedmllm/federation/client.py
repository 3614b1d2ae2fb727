"""Train one client: the global adapter in, its update out. The readable truth that every faster engine must equal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedmllm.algorithms.objectives import ClientView, Objective
from fedmllm.algorithms.schedules import round_factor, step_factor
from fedmllm.backbones.base import Backbone, Row
from fedmllm.backbones.cache.bounded import RowCache
from fedmllm.config.experiment import Experiment
from fedmllm.config.train import Train
from fedmllm.core.errors import FedmllmError
from fedmllm.core.rng import stream, stream_seed
from fedmllm.core.tensors import subtract
from fedmllm.core.types import ClientUpdate, Example, Modality, Params, Shard, Visible
from fedmllm.data.prompts import Prompt
from fedmllm.scenarios.availability import Always, Availability

if TYPE_CHECKING:
    from fedmllm.federation.client_state import Controls

ALWAYS = Always()
ROWS_KEPT_BYTES = 512 * 2**20


class RowStore:
    """Encoded rows, made once and kept while memory allows: preprocessing costs as much as a small model's step."""

    def __init__(self, backbone: Backbone, prompt: Prompt, examples: Sequence[Example]) -> None:
        self._backbone, self._prompt, self._examples = backbone, prompt, examples
        self._cache = RowCache(ROWS_KEPT_BYTES)

    def row(self, index: int, visible: Visible) -> Row:
        key = (index, visible)
        row = self._cache.get(key)
        if row is None:
            example = self._examples[index]
            try:
                row = self._backbone.encode(self._prompt.render(example, visible), self._prompt.target(example))
            except FedmllmError as error:
                raise type(error)(f"{example.where}, id {example.id}: {error}") from None
            self._cache.put(key, row, lambda _, old: not self._backbone.needs_pixels(old))
        return row


@dataclass(frozen=True)
class Step:
    """One optimiser step of one client: its rows, and the dropout seed of each."""

    rows: tuple[Row, ...]
    dropout_seeds: tuple[int, ...]
    lr: float


def planned_steps(train: Train, num_rows: int) -> int:
    """Optimiser steps of a round that is finished, of a client with so many rows."""
    steps = train.epochs * -(-num_rows // (train.batch_size * train.accumulation))
    return min(steps, train.max_steps) if train.max_steps else steps


@dataclass(frozen=True)
class Clients:
    """All that local training needs besides the global adapter: one frozen model, every client's rows and settings."""

    backbone: Backbone
    objective: Objective
    train: Train
    store: RowStore
    shards: Sequence[Shard]
    modalities: tuple[Modality, ...]
    num_rounds: int
    seed: int
    availability: Availability = ALWAYS
    last_share: float = 1.0  # of the steps of the last round: a budget of 5.56 rounds has six, and 0.56 here
    controls: Controls | None = None  # SCAFFOLD's, where the aggregator is that
    experiment: Experiment | None = None  # where these come from: what other processes load the same from

    @property
    def budget(self) -> float:
        """Rounds, the last one counted by its share."""
        return self.num_rounds - 1 + self.last_share

    def round_lr(self, round_: int) -> float:
        return self.train.lr * round_factor(self.train.round_schedule, round_, self.num_rounds)

    def planned_steps(self, client: int) -> int:
        """Optimiser steps of the client in a round that it finishes."""
        return planned_steps(self.train, len(self.shards[client].rows))

    def num_steps(self, client: int, round_: int) -> int:
        """Optimiser steps of the client in the round: all planned ones, unless it straggles or the budget ends."""
        share = self.availability.share(self.seed, round_, client)
        share *= self.last_share if round_ == self.num_rounds else 1.0
        return math.ceil(share * self.planned_steps(client))

    def steps(self, client: int, round_: int) -> Iterator[Step]:
        """The client's optimiser steps in a round: rows shuffled anew each epoch, by the client's own stream."""
        shard, size = self.shards[client], self.train.batch_size * self.train.accumulation
        planned, num_steps = self.planned_steps(client), self.num_steps(client, round_)
        base, done = self.round_lr(round_), 0
        for epoch in range(self.train.epochs):
            order = stream(self.seed, "order", round_, client, epoch).permutation(len(shard.rows))
            for start in range(0, len(order), size):
                if done == num_steps:
                    return
                group = [int(i) for i in order[start : start + size]]
                yield Step(
                    rows=tuple(self.store.row(shard.rows[i], shard.visible[i]) for i in group),
                    dropout_seeds=tuple(stream_seed(self.seed, "dropout", round_, client, epoch, i) for i in group),
                    lr=base * step_factor(self.train.step_schedule, done, planned),
                )
                done += 1

    def prox_mus(self, client: int, names: Sequence[str]) -> dict[str, float]:
        """The objective's mu of each LoRA tensor for this client, without the zeros."""
        view = ClientView(
            missing_rate=self.shards[client].missing_rate(self.modalities),
            num_layers=self.backbone.num_layers,
            layer_of=self.backbone.layer_of,
        )
        return {name: mu for name in names if (mu := self.objective.prox_mu(name, view))}

    def optimizer(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.AdamW:
        """A new AdamW for every client and round, as published: moments do not outlive a round."""
        t = self.train
        return torch.optim.AdamW(parameters, lr=t.lr, betas=(t.beta1, t.beta2), weight_decay=t.weight_decay)

    def update(self, client: int, round_: int, start: Params) -> ClientUpdate:
        """Train the client from `start` for one round."""
        began = time.perf_counter()
        backbone = self.backbone
        backbone.set_lora(start)
        weights = backbone.trainable()
        anchor = {name: w.detach().clone() for name, w in weights.items()}
        prox_mus = self.prox_mus(client, list(weights))
        optimizer = self.optimizer(list(weights.values()))
        losses, num_tokens = [], 0
        offset = self.controls.offset(client, round_) if self.controls else {}
        gradients = {name: torch.zeros_like(c) for name, c in offset.items()}
        for step in self.steps(client, round_):
            optimizer.zero_grad(set_to_none=True)
            losses.append(self.backward(step))
            with torch.no_grad():
                for name, c in offset.items():
                    grad = weights[name].grad
                    gradients[name] += grad.cpu()  # type: ignore[union-attr]
                    grad.add_(c.to(grad.device))  # type: ignore[union-attr]
                for name, mu in prox_mus.items():  # d/dw of mu/2 ||w - anchor||^2
                    weights[name].grad.add_(weights[name] - anchor[name], alpha=mu)  # type: ignore[union-attr]
                if self.train.clip_norm:
                    torch.nn.utils.clip_grad_norm_(list(weights.values()), self.train.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = step.lr
            optimizer.step()
            num_tokens += sum(row.num_tokens for row in step.rows)
        control = None
        if self.controls and losses:
            control = self.controls.learned(client, round_, {n: g / len(losses) for n, g in gradients.items()})
        return ClientUpdate(
            client=client,
            delta=subtract(backbone.lora(), start),
            num_examples=len(self.shards[client].rows),
            metrics={
                "loss": sum(losses) / len(losses) if losses else 0.0,
                "num_steps": len(losses),
                "num_tokens": num_tokens,
                "time_s": time.perf_counter() - began,
            },
            control=control,
        )

    def backward(self, step: Step) -> float:
        """Gradients of the mean over the step's rows of each row's mean loss, one micro-batch at a time -> that loss."""
        total, size = 0.0, self.train.batch_size
        for i in range(0, len(step.rows), size):
            batch = self.backbone.collate(step.rows[i : i + size])
            nll_B, tokens_B = self.backbone.loss(batch, step.dropout_seeds[i : i + size])
            loss = (nll_B / tokens_B).sum() / len(step.rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total
