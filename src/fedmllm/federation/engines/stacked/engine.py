"""Many clients in one pass: the rows of all clients of an optimiser step share the frozen base.

Equal to `engines/in_process.py` up to the order of summation, whatever shares a pass (tests/engines/test_stacked.py).

Shapes: K clients, P weights of one adapter, B rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fedmllm.config import engine as settings
from fedmllm.core.errors import FedmllmError
from fedmllm.core.types import ClientUpdate, Params
from fedmllm.federation.client import Clients, Step
from fedmllm.federation.engines.in_process import InProcess
from fedmllm.federation.engines.stacked.memory import is_out_of_memory, release, token_budget
from fedmllm.federation.engines.stacked.packing import PASS_TOKENS, in_step, items, passes
from fedmllm.federation.engines.stacked.row_adamw import RowAdamW, clip, prox_matrix
from fedmllm.federation.engines.stacked.stack import Stack, find_targets

if TYPE_CHECKING:
    from fedmllm.federation.client_state import Controls


class Stacked:
    """Engine: (params, round, cohort) -> the cohort's updates, in ascending client order.

    At most `settings.clients` adapters are in memory at once, so memory grows neither with the cohort nor the federation.
    """

    def __init__(self, settings_: settings.Engine, clients: Clients) -> None:
        self._settings = cast("settings.Stacked", settings_)
        self._clients, self._backbone = clients, clients.backbone
        self._targets, reason = find_targets(clients.backbone)
        self._budget = self._settings.token_budget
        self.note = f"{reason}; so clients are trained one after another (in-process)" if reason else ""

    def __call__(self, params: Params, round_: int, cohort: Sequence[int]) -> Iterator[ClientUpdate]:
        if self.note:
            yield from InProcess(self._settings, self._clients)(params, round_, cohort)
            return
        members, size = sorted(cohort), self._settings.clients
        with _deterministic(self._settings.deterministic):
            for start in range(0, len(members), size):
                yield from self._together(params, round_, members[start : start + size])

    def _together(self, params: Params, round_: int, members: Sequence[int]) -> Iterator[ClientUpdate]:
        """The members' updates; in halves where memory is too short for the adapters of all."""
        try:
            updates = self._train(params, round_, members)
        except RuntimeError as error:
            if len(members) == 1 or not is_out_of_memory(error):
                raise
            updates = []
        if updates:
            yield from updates
        else:
            release(self._backbone.device)
            half = len(members) // 2
            yield from self._together(params, round_, members[:half])
            yield from self._together(params, round_, members[half:])

    def _train(self, params: Params, round_: int, members: Sequence[int]) -> list[ClientUpdate]:
        began, clients = time.perf_counter(), self._clients
        ordered = sorted(members, key=lambda client: (-clients.num_steps(client, round_), client))
        stack = Stack(self._targets, self._backbone.trainable(), params, len(ordered))
        mu = prox_matrix([clients.prox_mus(client, list(params)) for client in ordered], stack.sizes, stack.weights_KP)
        optimizer = RowAdamW(clients.train, stack.weights_KP)
        controls = _Controls(clients.controls, stack, ordered, round_) if clients.controls else None
        losses_K = stack.weights_KP.new_zeros(len(ordered), dtype=torch.float64)
        num_steps, num_tokens = [0] * len(ordered), [0] * len(ordered)
        for steps in in_step(clients, ordered, round_):
            self._gradients(stack, steps, losses_K)
            k = len(steps)
            weights, grads = stack.weights_KP[:k], stack.grads_KP[:k]
            if controls:
                controls.correct(grads)
            if mu is not None:
                grads.add_((weights - stack.anchor_P).mul_(mu[:k]))
            if clients.train.clip_norm:
                clip(grads, clients.train.clip_norm)
            optimizer.step(weights, grads, [step.lr for step in steps])
            for slot, step in enumerate(steps):
                num_steps[slot] += 1
                num_tokens[slot] += sum(row.num_tokens for row in step.rows)
        losses, total = losses_K.tolist(), max(1, sum(num_tokens))
        wall_s = time.perf_counter() - began
        learned = controls.learned(num_steps) if controls else {}
        updates = [
            ClientUpdate(
                client=client,
                delta=stack.params(stack.weights_KP[slot] - stack.anchor_P),
                num_examples=len(clients.shards[client].rows),
                metrics={
                    "loss": losses[slot] / max(1, num_steps[slot]),
                    "num_steps": num_steps[slot],
                    "num_tokens": num_tokens[slot],
                    "time_s": wall_s * num_tokens[slot] / total,  # its share of the passes
                },
                control=learned.get(client),
            )
            for slot, client in enumerate(ordered)
        ]
        return sorted(updates, key=lambda update: update.client)

    def _gradients(self, stack: Stack, steps: Sequence[Step], losses_K: Tensor) -> None:
        """Fill the stack's gradients and add each client's mean loss; short of memory, again with half the budget."""
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
        """Gradients of each client's mean over its rows of the row's mean loss -> these losses [K]."""
        losses_K, device = torch.zeros_like(like_K), self._backbone.device
        stack.grads_KP.zero_()
        with stack.installed() as use:
            for part in passes(items(steps), self._budget, PASS_TOKENS[device.type]):
                clients_B = torch.tensor([item.slot for item in part], device=device)
                use(clients_B)
                batch = self._backbone.collate([item.row for item in part])
                nll_B, tokens_B = self._backbone.loss(batch, [item.dropout_seed for item in part])
                weights_B = torch.tensor([item.weight for item in part], dtype=nll_B.dtype, device=device)
                loss_B = nll_B / tokens_B * weights_B
                loss_B.sum().backward()  # type: ignore[no-untyped-call]
                losses_K.index_add_(0, clients_B, loss_B.detach().to(losses_K.dtype))
        return losses_K


class _Controls:
    """SCAFFOLD's part of a round, as `Clients.update` has it, for all clients at once."""

    def __init__(self, controls: Controls, stack: Stack, ordered: Sequence[int], round_: int) -> None:
        self._controls, self._stack, self._ordered, self._round = controls, stack, ordered, round_
        self._offset_KP = stack.matrix([controls.offset(client, round_) for client in ordered])
        self._sum_KP = torch.zeros_like(self._offset_KP)

    def correct(self, grads_KP: Tensor) -> None:
        """Add c - c_k to the gradients of the clients that still train, and remember what they were."""
        self._sum_KP[: len(grads_KP)] += grads_KP
        grads_KP += self._offset_KP[: len(grads_KP)]

    def learned(self, num_steps: Sequence[int]) -> dict[int, Params]:
        """Client -> its part of the change of c, for those that trained."""
        return {
            client: self._controls.learned(client, self._round, self._stack.params(sum_P / steps))
            for client, sum_P, steps in zip(self._ordered, self._sum_KP, num_steps, strict=True)
            if steps
        }


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
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
