"""The rows of one optimiser step of several clients, cut into passes of about one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedmllm.backbones import Row
from fedmllm.local import Clients, Step


@dataclass(frozen=True)
class Item:
    """A row on its way into a pass."""

    row: Row
    slot: int  # whose it is: the client's place in the stack
    weight: float  # of its mean loss: 1 / rows of its client in this step, never a share of the batch's tokens
    dropout_seed: int


def in_step(clients: Clients, members: Sequence[int], round_: int) -> Iterator[list[Step]]:
    """The first optimiser step of all members, then the second of all that have one, and so on.

    `members` come in descending order of their number of steps in the round, so that the active ones are always a prefix.
    """
    schedules = [clients.steps(client, round_) for client in members]
    while steps := [step for schedule in schedules if (step := next(schedule, None)) is not None]:
        yield steps


def items(steps: Sequence[Step]) -> list[Item]:
    """All rows of one optimiser step; slot = place in `steps`."""
    return [
        Item(row, slot, 1 / len(step.rows), seed)
        for slot, step in enumerate(steps)
        for row, seed in zip(step.rows, step.dropout_seeds, strict=True)
    ]


def passes(rows: Sequence[Item], token_budget: int) -> list[list[Item]]:
    """Longest rows first, each pass as many rows as fit into `token_budget` when padded to its longest; at least one."""
    out: list[list[Item]] = []
    width = 0
    for item in sorted(rows, key=lambda item: (-item.row.num_tokens, item.slot)):
        if not out or (len(out[-1]) + 1) * width > token_budget:
            out.append([])
            width = item.row.num_tokens
        out[-1].append(item)
    return out
