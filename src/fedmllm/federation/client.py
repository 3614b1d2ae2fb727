"""Local training of one client: the reference for faster engines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.objectives import ClientView, Objective
from fedmllm.algorithms.privacy.row_dp import RowNoise, clip_factors
from fedmllm.algorithms.schedules import round_factor, step_factor
from fedmllm.algorithms.server_optimizers import FedAvg
from fedmllm.backbones.base import Backbone, Row
from fedmllm.backbones.cache.bounded import RowCache
from fedmllm.backbones.frozen import frozen_adapter, scaled
from fedmllm.config.experiment import Experiment
from fedmllm.config.train import Train
from fedmllm.core.errors import DataError, FedmllmError
from fedmllm.core.rng import stream, stream_seed
from fedmllm.core.tensors import cut, padded, subtract
from fedmllm.core.types import (
    ClientUpdate,
    Example,
    LocalRule,
    Modality,
    Outcome,
    Params,
    Round,
    Sent,
    Shard,
    Visible,
)
from fedmllm.data.prompts import Prompt
from fedmllm.federation.client_state import ClientStateStore
from fedmllm.federation.importance import importance
from fedmllm.scenarios.availability import Always, Availability
from fedmllm.scenarios.modalities.completion import Completer
from fedmllm.scenarios.modalities.dropout import ModalityDropout, NoDropout

ALWAYS = Always()
FEDAVG = FedAvg()
NO_DROPOUT = NoDropout()
ROWS_KEPT_BYTES = 512 * 2**20


class RowStore:
    """Encoded rows, cached while memory allows: preprocessing costs as much as a small model's step.

    Args:
        backbone: The model that reads the rows.
        prompt: How they are worded.
        examples: All training rows.
        completer: Fills or converts them before they are worded; None = they stay as they are.
    """

    def __init__(
        self, backbone: Backbone, prompt: Prompt, examples: Sequence[Example], completer: Completer | None = None
    ) -> None:
        self._backbone, self._prompt, self._examples, self._completer = backbone, prompt, examples, completer
        self._cache = RowCache(ROWS_KEPT_BYTES)
        self._groups: dict[tuple[int, str], tuple[Shard, list[list[int]]]] = {}
        self._completed: dict[tuple[int, Visible], tuple[Example, Visible]] = {}

    def on(self, backbone: Backbone) -> RowStore:
        """A store of the same rows for a copy of the model; it also has what `complete` fills here, now or later."""
        store = RowStore(backbone, self._prompt, self._examples, self._completer)
        store._completed = self._completed
        return store

    def complete(self, shards: Sequence[Shard]) -> None:
        """Fill or convert the rows of these clients, and keep those until the next call.

        A completion may use the model, which belongs to one thread.
        """
        self._completed.clear()
        for shard in shards if self._completer else ():
            for index, visible in zip(shard.rows, shard.visible, strict=True):
                self._completed[index, visible] = self._filled(index, visible)

    def _filled(self, index: int, visible: Visible) -> tuple[Example, Visible]:
        """The row after the completion. An error names the example's place."""
        example = self._examples[index]
        if not self._completer:
            return example, visible
        known = self._completed.get((index, visible))
        try:
            return known or self._completer(example, visible, training=True)
        except FedmllmError as error:
            raise _at(example, error) from None

    def groups(self, shard: Shard, column: str) -> list[list[int]]:
        """Places in the shard of the rows of each group, in the order in which the groups appear.

        Raises:
            DataError: A row has no value in the column, so its group is not known.
        """
        known = self._groups.get((shard.client, column))
        if known is None or known[0] is not shard:
            known = (shard, grouped(self._examples, shard, column))
            self._groups[shard.client, column] = known
        return known[1]

    def row(self, index: int, visible: Visible) -> Row:
        """The encoded row of one example with these modalities visible. An error names the example's place."""
        key = (index, visible)
        row = self._cache.get(key)
        if row is None:
            example, visible = self._filled(index, visible)
            try:
                row = self._backbone.encode(self._prompt.render(example, visible), self._prompt.target(example))
            except FedmllmError as error:
                raise _at(example, error) from None
            self._cache.put(key, row, lambda _, old: not self._backbone.needs_pixels(old))
        return row

    def importance(
        self, indices: Sequence[int], modalities: tuple[Modality, ...], adapter: Params
    ) -> dict[Modality, float]:
        """Mean importance of each modality for some complete rows, as the adapter answers them; {} without rows."""
        rows = [self._examples[i] for i in indices]
        return importance(self._backbone, self._prompt, rows, modalities, adapter)

    def warm(self, shards: Sequence[Shard]) -> None:
        """Let the completion compute at once what the rows of these clients need."""
        if self._completer:
            pairs = [pair for shard in shards for pair in zip(shard.rows, shard.visible, strict=True)]
            self._completer.warm([(self._examples[row], visible) for row, visible in pairs], training=True)


def _at(example: Example, error: FedmllmError) -> FedmllmError:
    """The error with the example's place."""
    return type(error)(f"{example.where}, id {example.id}: {error}")


@dataclass(frozen=True)
class Step:
    """One optimizer step of one client: its rows, and the dropout seed of each."""

    rows: tuple[Row, ...]
    dropout_seeds: tuple[int, ...]
    lr: float
    units: tuple[int, ...] = ()  # the group of each row, ascending; () = each row is clipped alone


def grouped(examples: Sequence[Example], shard: Shard, column: str) -> list[list[int]]:
    """As `RowStore.groups`."""
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(shard.rows):
        value = examples[row].columns.get(column, "")
        if not value:
            raise DataError(
                f"{examples[row].where}, id {examples[row].id}: no value in column {column!r} (data.group); with "
                'privacy.unit = "group" every row needs one'
            )
        groups.setdefault(value, []).append(place)
    return list(groups.values())


def planned_steps(train: Train, num_rows: int) -> int:
    """Optimizer steps that a client with `num_rows` rows (groups, if these are clipped) has in a round that it finishes."""
    steps = train.epochs * -(-num_rows // (train.batch_size * train.accumulation))
    return min(steps, train.max_steps) if train.max_steps else steps


@dataclass(frozen=True)
class Clients:
    """The fixed inputs of local training: one frozen model, every client's rows, the settings and the algorithm."""

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
    aggregator: Aggregator = FEDAVG
    state: ClientStateStore | None = None  # if the aggregator keeps client state
    row_noise: RowNoise | None = None  # with privacy "row-dp"
    left_out: Callable[[str], None] | None = (
        None  # given why a row cannot be read: it then counts as zeros; None = an error
    )
    dropout: ModalityDropout = NO_DROPOUT
    importances: dict[int, dict[Modality, float]] = field(default_factory=dict)  # by client, of its current round
    experiment: Experiment | None = None  # for engines whose processes load everything again

    @property
    def rows_per_step(self) -> int:
        """Rows (groups, if these are clipped) of an optimizer step, but for the last one of an epoch."""
        return self.train.batch_size * self.train.accumulation

    @property
    def budget(self) -> float:
        """Rounds, the last one counted by its share."""
        return self.num_rounds - 1 + self.last_share

    def round_lr(self, round_: int) -> float:
        """The learning rate of a round, before the schedule over its steps."""
        return self.train.lr * round_factor(self.train.round_schedule, round_, self.num_rounds)

    def planned_steps(self, client: int) -> int:
        """Optimizer steps of the client in a round that it finishes."""
        return planned_steps(self.train, len(self.units(client)))

    def units(self, client: int) -> Sequence[Sequence[int]]:
        """Places in the shard of what is clipped together: each row alone, or all rows of a group."""
        shard = self.shards[client]
        if self.row_noise and self.row_noise.group:
            return self.store.groups(shard, self.row_noise.group)
        return [(place,) for place in range(len(shard.rows))]

    def num_steps(self, client: int, round_: int) -> int:
        """Optimizer steps of the client in the round: all planned ones, unless it straggles or the budget ends."""
        share = self.availability.share(self.seed, round_, client)
        share *= self.last_share if round_ == self.num_rounds else 1.0
        return math.ceil(share * self.planned_steps(client))

    def steps(self, client: int, round_: int) -> Iterator[Step]:
        """The client's optimizer steps in a round; each epoch has its own order, from the client's own stream."""
        shard, size = self.shards[client], self.rows_per_step
        planned, num_steps = self.planned_steps(client), self.num_steps(client, round_)
        base, done = self.round_lr(round_), 0
        odds = self.dropout.odds(self.modalities, self.importances.get(client, {}))
        units = self.units(client)
        for epoch in range(self.train.epochs):
            seen = self._masks(client, round_, epoch, odds)
            order = stream(self.seed, "order", round_, client, epoch).permutation(len(units))
            for start in range(0, len(order), size):
                if done == num_steps:
                    return
                places = [(n, i) for n, unit in enumerate(order[start : start + size]) for i in units[unit]]
                found = [(n, i, row) for n, i in places if (row := self._row(shard.rows[i], seen(i))) is not None]
                yield Step(
                    rows=tuple(row for _, _, row in found),
                    dropout_seeds=tuple(
                        stream_seed(self.seed, "dropout", round_, client, epoch, i) for _, i, _ in found
                    ),
                    lr=base * step_factor(self.train.step_schedule, done, planned),
                    units=tuple(n for n, _, _ in found),
                )
                done += 1

    def _row(self, index: int, visible: Visible) -> Row | None:
        """The encoded row; None if it cannot be read and counts as zeros.

        With row-dp a request that fails because of one row would be an answer without noise: a server that chooses
        `max_tokens` would learn how long each row is.
        """
        try:
            return self.store.row(index, visible)
        except Exception as error:  # whatever the row does to the reader
            if self.left_out is None:
                raise
            self.left_out(f"{type(error).__name__}: {error}")
            return None

    def _masks(self, client: int, round_: int, epoch: int, odds: Sequence[float]) -> Callable[[int], Visible]:
        """Place of a row in the shard -> its mask for an epoch."""
        visible = self.shards[client].visible
        if not any(odds):
            return visible.__getitem__

        def mask(i: int) -> Visible:
            draw = stream(self.seed, "modality-dropout", round_, client, epoch, i)
            return self.dropout.drop(visible[i], self.modalities, odds, draw)

        return mask

    def measure(self, client: int, at: Round, start: Params) -> None:
        """Measure what the client's round needs to know about its modalities, with the adapter that it starts from."""
        if not (count := self.dropout.measured_rows()):
            return
        shard = self.shards[client]
        whole = [row for row, v in zip(shard.rows, shard.visible, strict=True) if v >= frozenset(self.modalities)]
        draw = stream(self.seed, "importance", at.number, client).permutation(len(whole))
        chosen = [whole[i] for i in sorted(draw[:count].tolist())]
        self.importances[client] = self.store.importance(chosen, self.modalities, start)

    def progress(self, client: int, done: int) -> float:
        """Share of a round's steps that is done: 0 at the first step, 1 at the last of those planned."""
        return done / max(1, self.planned_steps(client) - 1)

    def view(self, client: int) -> ClientView:
        """Return what objectives and aggregators may know about a client."""
        return ClientView(
            missing_rate=self.shards[client].missing_rate(self.modalities),
            num_layers=self.backbone.num_layers,
            layer_of=self.backbone.layer_of,
        )

    def kept(self, client: int, at: Round) -> Params:
        """The client's stored state at the start of a round; {} if there is none."""
        return self.state.read(client, at.number) if self.state else {}

    def keep(self, client: int, at: Round, state: Params) -> None:
        """Store the state that a client keeps from a round."""
        if self.state:
            self.state.write(client, at.number, state)

    def rule(self, client: int, at: Round, sent: Sent, kept: Params) -> LocalRule:
        """The aggregator's rule and the objective's proximal weights together, for the tensors that train."""
        view = self.view(client)
        rule = self.aggregator.begin(at, view, sent, kept)
        trained = sent.trained()
        mus = {n: self.objective.prox_mu(n, view) + rule.mu.get(n, 0.0) for n in sent.start if n in trained}
        shift = {n: t for n, t in rule.shift.items() if n in trained}
        return LocalRule({n: mu for n, mu in mus.items() if mu}, shift, rule.penalty, rule.mean_gradient)

    def finished(
        self, client: int, at: Round, outcome: Outcome, kept: Params, own: Params, metrics: Mapping[str, float]
    ) -> tuple[ClientUpdate, Params]:
        """The client's update and the state that it keeps.

        Args:
            client: Who trained.
            at: In which round.
            outcome: What training came to, in the shapes of `outcome.sent.start`.
            kept: The state before the round.
            own: Trained values of `outcome.sent.keeps`.
            metrics: loss, num_steps, num_tokens, time_s.
        """
        metrics = {**metrics, **{f"importance_{m}": v for m, v in self.importances.get(client, {}).items()}}
        extra, state = self.aggregator.finish(at, self.view(client), outcome, kept)
        delta = {name: outcome.delta[name] for name in outcome.sent.returned()}
        return ClientUpdate(client, delta, outcome.num_examples, metrics, extra), {**state, **own}

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
        """A new AdamW for every client and round, as published: moments do not outlive a round."""
        t = self.train
        return torch.optim.AdamW(parameters, lr=t.lr, betas=(t.beta1, t.beta2), weight_decay=t.weight_decay)

    def update(self, client: int, at: Round, sent: Sent) -> ClientUpdate:
        """Train the client for one round; reads and writes its stored state."""
        update, state = self.train_one(client, at, sent, self.kept(client, at))
        self.keep(client, at, state)
        return update

    def train_one(self, client: int, at: Round, sent: Sent, kept: Params) -> tuple[ClientUpdate, Params]:
        """Train the client for one round -> (its update, the state that it keeps)."""
        began = time.perf_counter()
        live, start = self.backbone.trainable(), own_start(sent, kept)
        self.measure(client, at, start)
        self.backbone.set_lora(padded(start, live))
        rule, trained = self.rule(client, at, sent, kept), sent.trained()
        weights = {name: w for name, w in live.items() if name in trained}
        own_scale, frozen = scaled(self.backbone, sent.scale), frozen_adapter(self.backbone, sent.frozen)
        with training_only(live, weights), frozen, own_scale:
            losses, gradients, num_tokens = self._train(client, at, weights, rule)
        num_steps = len(losses)
        end = cut(self.backbone.lora(), start)
        mean = {name: g / num_steps for name, g in cut(gradients, start).items()} if num_steps else {}
        delta = subtract({n: end[n] for n in weights}, {n: start[n] for n in weights})
        metrics = {
            "loss": sum(losses) / num_steps if losses else 0.0,
            "num_steps": num_steps,
            "num_tokens": num_tokens,
            "time_s": time.perf_counter() - began,
        }
        if self.row_noise:
            del metrics["loss"]  # a number about the rows, without noise
        outcome = Outcome(sent, delta, mean, num_steps, len(self.shards[client].rows))
        return self.finished(client, at, outcome, kept, {n: end[n] for n in sent.keeps}, metrics)

    def _train(
        self, client: int, at: Round, weights: Mapping[str, nn.Parameter], rule: LocalRule
    ) -> tuple[list[float], Params, int]:
        """The client's steps -> (loss of each, sum of the gradients if the rule needs their mean, tokens)."""
        anchor = {name: w.detach().clone() for name, w in weights.items()}
        shift = padded({n: t.to(anchor[n].device) for n, t in rule.shift.items()}, anchor)
        gradients = {n: torch.zeros_like(w, device="cpu") for n, w in anchor.items()} if rule.mean_gradient else {}
        optimizer = self.optimizer(list(weights.values()))
        losses: list[float] = []
        num_tokens = 0
        for step in self.steps(client, at.number):
            optimizer.zero_grad(set_to_none=True)
            losses.append(self._private_backward(client, at, step, len(losses), weights))
            with torch.no_grad():
                for name in gradients:
                    gradients[name] += _grad(weights[name]).cpu()
                for name, value in shift.items():
                    _grad(weights[name]).add_(value)
                for name, mu in rule.mu.items():  # d/dw of mu/2 ||w - anchor||^2
                    _grad(weights[name]).add_(weights[name] - anchor[name], alpha=mu)
                if rule.penalty:
                    done, values = self.progress(client, len(losses) - 1), {n: w.detach() for n, w in weights.items()}
                    for name, gradient in rule.penalty(done, values).items():
                        _grad(weights[name]).add_(gradient)
                if self.train.clip_norm:
                    torch.nn.utils.clip_grad_norm_(list(weights.values()), self.train.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = step.lr
            optimizer.step()
            num_tokens += sum(row.num_tokens for row in step.rows)
        return losses, gradients, num_tokens

    def _private_backward(
        self, client: int, at: Round, step: Step, number: int, weights: Mapping[str, nn.Parameter]
    ) -> float:
        """As `backward`; with `row_noise`, gradients of (sum of each unit's clipped gradient + noise) / units of a step."""
        if not self.row_noise:
            return self.backward(step)
        total, names = 0.0, list(weights)
        sum_T = torch.zeros(sum(weights[n].numel() for n in names), dtype=weights[names[0]].dtype)
        units = step.units or range(len(step.rows))
        rows = list(zip(step.rows, step.dropout_seeds, units, strict=True))
        for place, (row, seed, unit) in enumerate(rows):
            nll_B, tokens_B = self.backbone.loss(self.backbone.collate([row]), [seed])
            loss = (nll_B / tokens_B).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            if place + 1 < len(rows) and rows[place + 1][2] == unit:
                continue  # the gradients of a unit's rows add up
            unit_T = torch.cat([_grad(weights[n]).reshape(-1).cpu() for n in names])  # of several devices, perhaps
            factor = float(clip_factors(unit_T[None], self.row_noise.settings.clip))
            if factor:  # otherwise it is not finite
                sum_T += factor * unit_T
            for weight in weights.values():
                weight.grad = None
        mean_T = self.row_noise.noisy(sum_T, client, at.number, number) / self.rows_per_step
        for name, part in zip(names, mean_T.split([weights[n].numel() for n in names]), strict=True):  # type: ignore[no-untyped-call]
            weights[name].grad = part.reshape(weights[name].shape).to(weights[name].device)
        return total / max(1, len(step.rows))

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


def _grad(weight: nn.Parameter) -> Tensor:
    """The gradient; zeros for a weight that the step's rows do not reach."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def own_start(sent: Sent, kept: Params) -> Params:
    """`sent.start` with the client's own values where it has them."""
    return {n: kept[n] if n in sent.keeps and n in kept else t for n, t in sent.start.items()} if kept else sent.start


@contextmanager
def training_only(live: Mapping[str, nn.Parameter], weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """While open, only `weights` require gradients: neither the optimizer nor weight decay reaches the others."""
    resting = [parameter for name, parameter in live.items() if name not in weights]
    for parameter in resting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)
