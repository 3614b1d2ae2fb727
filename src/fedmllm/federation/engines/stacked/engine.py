"""Stacked engine: clients share passes over the frozen base.

Equal to `engines/in_process.py` up to the order of summation, whatever shares a pass (tests/engines/test_stacked.py).

Shapes: K clients, P weights of one adapter, T of them trained, B rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event
from typing import cast

import torch
from torch import Tensor

from fedmllm.algorithms.privacy.row_dp import clip_factors
from fedmllm.config import engine as settings
from fedmllm.core.errors import FedmllmError
from fedmllm.core.types import ClientUpdate, LocalRule, Outcome, Round, Sent
from fedmllm.federation.client import Clients, Step, own_start
from fedmllm.federation.engines.in_process import InProcessEngine
from fedmllm.federation.engines.stacked.memory import is_out_of_memory, release, token_budget
from fedmllm.federation.engines.stacked.packing import PASS_TOKENS, Item, clipped_passes, in_step, items, passes
from fedmllm.federation.engines.stacked.row_adamw import RowAdamW, clip, prox_matrix
from fedmllm.federation.engines.stacked.stack import Stack, find_targets, gate_of

ROW_GRADIENT_BYTES = 256 * 2**20  # of the rows of one pass, each with a gradient of its own


class Halted(Exception):
    """A round was ended by another thread, whose error is the cause."""


class StackedEngine:
    """Engine: (round, what each client receives) -> their updates, in ascending client order.

    At most `settings.clients` adapters are in memory at once, so memory grows neither with the cohort nor the federation.

    Args:
        settings_: Of the engine.
        clients: The inputs of local training.
        halt: Set by another thread to end a round between two steps, with `Halted`.
    """

    def __init__(self, settings_: settings.Engine, clients: Clients, halt: Event | None = None) -> None:
        self._settings, self._halt = cast("settings.Stacked", settings_), halt or Event()
        self._clients, self._backbone = clients, clients.backbone
        self._targets, reason = find_targets(clients.backbone)
        self._budget = self._settings.token_budget
        self.note = f"{reason}; so clients are trained one after another (in-process)" if reason else ""

    def __call__(self, at: Round, sents: Mapping[int, Sent]) -> Iterator[ClientUpdate]:
        if self.note:
            yield from InProcessEngine(self._settings, self._clients)(at, sents)
            return
        members, size = sorted(sents), self._settings.clients
        with deterministic(self._settings.deterministic):
            for start in range(0, len(members), size):
                chunk = [Member(client, sents[client], self._clients, at) for client in members[start : start + size]]
                groups: dict[object, list[Member]] = {}
                for member in chunk:
                    groups.setdefault((member.sent.trained(), not member.sent.frozen, member.sent.scale), []).append(
                        member
                    )
                updates = [update for group in groups.values() for update in self._together(at, group)]
                yield from sorted(updates, key=lambda update: update.client)

    def _together(self, at: Round, members: Sequence[Member]) -> list[ClientUpdate]:
        """The members' updates; in halves if memory is too short for the adapters of all."""
        try:
            return self._train(at, members)
        except RuntimeError as error:
            if len(members) == 1 or not is_out_of_memory(error):
                raise
        release(self._backbone.device)
        half = len(members) // 2
        return [*self._together(at, members[:half]), *self._together(at, members[half:])]

    def _train(self, at: Round, members: Sequence[Member]) -> list[ClientUpdate]:
        """One round of clients that train the same tensors, at one scale, all of them with a frozen adapter or none."""
        began, clients = time.perf_counter(), self._clients
        ordered = sorted(members, key=lambda m: (-clients.num_steps(m.client, at.number), m.client))
        trained = ordered[0].sent.trained()
        frozens = [m.sent.frozen for m in ordered] if ordered[0].sent.frozen else []
        if frozens and all(frozen is frozens[0] for frozen in frozens):
            frozens = frozens[:1]
        stack = Stack(
            self._targets,
            self._backbone.trainable(),
            [m.start for m in ordered],
            trained,
            frozens,
            ordered[0].sent.scale,
            gate_of(self._backbone),
        )
        rules = Rules([m.rule for m in ordered], trained, stack)
        trains_KT, anchor_KT = (matrix[:, : stack.num_trained] for matrix in (stack.weights_KP, stack.anchor_KP))
        optimizer = RowAdamW(clients.train, trains_KT)
        losses_K = stack.weights_KP.new_zeros(len(ordered), dtype=torch.float64)
        num_steps, num_tokens = [0] * len(ordered), [0] * len(ordered)
        for number, steps in enumerate(in_step(clients, [m.client for m in ordered], at.number)):
            if self._halt.is_set():
                raise Halted
            self._gradients(stack, steps, losses_K)
            k = len(steps)
            weights, grads = trains_KT[:k], stack.grads_KT[:k]
            if noise := clients.row_noise:
                for slot in range(k):
                    grads[slot] = noise.noisy(grads[slot], ordered[slot].client, at.number, number)
                grads.div_(clients.rows_per_step)
            done = [clients.progress(m.client, num_steps[slot]) for slot, m in enumerate(ordered[:k])]
            rules.apply(grads, weights, anchor_KT[:k], done)
            if clients.train.clip_norm:
                clip(grads, clients.train.clip_norm)
            optimizer.step(weights, grads, [step.lr for step in steps])
            for slot, step in enumerate(steps):
                num_steps[slot] += 1
                num_tokens[slot] += sum(row.num_tokens for row in step.rows)
        losses, total = losses_K.tolist(), max(1, sum(num_tokens))
        wall_s, updates = time.perf_counter() - began, []
        for slot, member in enumerate(ordered):
            metrics = {
                "loss": losses[slot] / max(1, num_steps[slot]),
                "num_steps": num_steps[slot],
                "num_tokens": num_tokens[slot],
                "time_s": wall_s * num_tokens[slot] / total,  # its share of the passes
            }
            if clients.row_noise:
                del metrics["loss"]  # a number about the rows, without noise
            updates.append(self._finished(member, at, stack, slot, rules.mean_gradient(slot, num_steps[slot]), metrics))
        return updates

    def _finished(
        self, m: Member, at: Round, stack: Stack, slot: int, mean_T: Tensor | None, metrics: Mapping[str, float]
    ) -> ClientUpdate:
        anchor_P = stack.anchor_KP[slot if len(stack.anchor_KP) > 1 else 0]
        moved_T = (stack.weights_KP[slot] - anchor_P)[: stack.num_trained]
        mean = {} if mean_T is None else stack.params(mean_T, m.start)
        num_rows = len(self._clients.shards[m.client].rows)
        outcome = Outcome(m.sent, stack.params(moved_T, m.start), mean, int(metrics["num_steps"]), num_rows)
        own = stack.params(stack.weights_KP[slot], {n: m.start[n] for n in m.sent.keeps}) if m.sent.keeps else {}
        update, state = self._clients.finished(m.client, at, outcome, m.kept, own, metrics)
        self._clients.keep(m.client, at, state)
        return update

    def _gradients(self, stack: Stack, steps: Sequence[Step], losses_K: Tensor) -> None:
        """Fill the stack's gradients and add each client's mean loss; if memory is short, again with half the budget."""
        rows = items(steps)
        if not self._budget:
            self._budget = token_budget(self._backbone, rows)
        while True:
            try:
                losses_K.add_(self._passes(stack, steps, losses_K))
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                longest = max(item.row.num_tokens for item in rows)
                if self._budget < longest:
                    raise FedmllmError(
                        f"memory is short for a single row of {longest} tokens; set backbone.precision."
                        "gradient_checkpointing = true, or lower backbone.max_tokens"
                    ) from error
                self._budget //= 2
            release(self._backbone.device)

    def _passes(self, stack: Stack, steps: Sequence[Step], like_K: Tensor) -> Tensor:
        """Gradients of each client's mean over its rows of the row's mean loss -> these losses [K].

        With `Clients.row_noise`: the sum over its rows, or groups of rows, of each one's clipped gradient.
        """
        losses_K, budget = torch.zeros_like(like_K), (self._budget, PASS_TOKENS[self._backbone.device.type])
        noise, device = self._clients.row_noise, self._backbone.device
        stack.grads_KT.zero_()
        with stack.installed() as use:
            if not noise:
                for part in passes(items(steps), *budget):
                    use(torch.tensor([item.slot for item in part], device=device))
                    self._backward(part, losses_K, weighted=True)
                return losses_K
            most = max(1, ROW_GRADIENT_BYTES // (stack.num_trained * stack.grads_KT.element_size()))
            for clipped in clipped_passes(items(steps), *budget, most):
                place = {unit: i for i, unit in enumerate(clipped.units)}
                units_ST = stack.grads_KT[:0]
                for number, part in enumerate(clipped.passes):
                    use(torch.tensor([item.slot for item in part], device=device))
                    slots_B = torch.tensor([place[item.slot, item.unit] for item in part], device=device)
                    units_ST = stack.unit_gradients(len(place), slots_B, adds=number > 0)
                    self._backward(part, losses_K, weighted=False)
                factors_S = clip_factors(units_ST, noise.settings.clip)
                units_ST[factors_S == 0] = 0  # NaN times 0 is NaN
                clients_S = torch.tensor([slot for slot, _ in clipped.units], device=device)
                stack.grads_KT.index_add_(0, clients_S, units_ST.mul_(factors_S[:, None]))
        return losses_K

    def _backward(self, part: Sequence[Item], losses_K: Tensor, weighted: bool) -> None:
        """One pass; adds the losses by client. `weighted`: each row counts by its weight, otherwise once."""
        batch = self._backbone.collate([item.row for item in part])
        nll_B, tokens_B = self._backbone.loss(batch, [item.dropout_seed for item in part])
        weights_B = torch.tensor([item.weight for item in part], dtype=nll_B.dtype, device=nll_B.device)
        loss_B = nll_B / tokens_B
        (loss_B * weights_B if weighted else loss_B).sum().backward()  # type: ignore[no-untyped-call]
        clients_B = torch.tensor([item.slot for item in part], device=losses_K.device)
        losses_K.index_add_(0, clients_B, (loss_B * weights_B).detach().to(losses_K.dtype))


class Member:
    """A client of the round: what it receives, what it kept, and where it starts."""

    def __init__(self, client: int, sent: Sent, clients: Clients, at: Round) -> None:
        self.client, self.sent = client, sent
        self.kept = clients.kept(client, at)
        self.start = own_start(sent, self.kept)
        clients.measure(client, at, self.start)
        self.rule = clients.rule(client, at, sent, self.kept)


class Rules:
    """`LocalRule` of all clients at once, as `Clients.train_one` applies one of them."""

    def __init__(self, rules: Sequence[LocalRule], trained: frozenset[str], stack: Stack) -> None:
        sizes = {name: size for name, size in stack.sizes.items() if name in trained}
        self._mu = prox_matrix([rule.mu for rule in rules], sizes, stack.weights_KP)
        self._shift_KT = self._sum_KT = None
        self._penalties, self._stack = [rule.penalty for rule in rules], stack
        if any(rule.shift for rule in rules):
            zero = {name: t.new_zeros(()).expand(t.shape) for name, t in stack.trained().items()}
            self._shift_KT = stack.matrix([{**zero, **rule.shift} for rule in rules])
        if any(rule.mean_gradient for rule in rules):
            self._sum_KT = torch.zeros_like(stack.grads_KT)

    def apply(self, grads_KT: Tensor, weights_KT: Tensor, anchor_KT: Tensor, done_K: Sequence[float]) -> None:
        """Change the gradients of the first k clients, which still train; sum up what they were."""
        k = len(grads_KT)
        if self._sum_KT is not None:
            self._sum_KT[:k] += grads_KT
        if self._shift_KT is not None:
            grads_KT += self._shift_KT[:k]
        if self._mu is not None:
            grads_KT.add_((weights_KT - anchor_KT).mul_(self._mu[:k]))
        if any(self._penalties):
            weights, grads = self._stack.views(weights_KT), self._stack.views(grads_KT)
            for slot, penalty in enumerate(self._penalties[:k]):
                own = {name: view[slot] for name, view in weights.items()}
                for name, gradient in (penalty(done_K[slot], own) if penalty else {}).items():
                    grads[name][slot] += gradient

    def mean_gradient(self, slot: int, num_steps: int) -> Tensor | None:
        """Mean of a client's gradients over its steps; None without steps, or if no rule needs it."""
        return self._sum_KT[slot] / num_steps if self._sum_KT is not None and num_steps else None


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """The same bytes at every repetition, also on CUDA, where adding up the rows of a client is a race otherwise."""
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
