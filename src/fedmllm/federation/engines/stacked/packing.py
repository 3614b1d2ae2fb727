"""Division of an optimizer step's rows into passes of similar size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedmllm.backbones.base import Row
from fedmllm.federation.client import Clients, Step

# Cost of a pass in addition to its tokens, in tokens. CPU, measured: about 150 on the tiny model, 10 on one of 154 M weights.
# CUDA, not measured: 30 ms of launches for 28 layers, in which an H100 trains about a thousand tokens of 2 B weights.
PASS_TOKENS = {"cpu": 64, "cuda": 1024}


@dataclass(frozen=True)
class Item:
    """A row on its way into a pass."""

    row: Row
    slot: int  # the client's place in the stack
    weight: float  # of its mean loss: 1 / rows of its client in this step, never a share of the batch's tokens
    dropout_seed: int
    unit: int = 0  # of its client in this step: what is clipped together


def in_step(clients: Clients, members: Sequence[int], round_: int) -> Iterator[list[Step]]:
    """The first optimizer step of all members, then the second of all that have one, and so on.

    `members` come in descending order of their number of steps in the round, so that the active ones are always a prefix.
    """
    schedules = [clients.steps(client, round_) for client in members]
    while steps := [step for schedule in schedules if (step := next(schedule, None)) is not None]:
        yield steps


def items(steps: Sequence[Step]) -> list[Item]:
    """All rows of one optimizer step; slot = place in `steps`."""
    return [
        Item(row, slot, 1 / len(step.rows), seed, unit)
        for slot, step in enumerate(steps)
        for row, seed, unit in zip(step.rows, step.dropout_seeds, step.units or range(len(step.rows)), strict=True)
    ]


@dataclass(frozen=True)
class Clipped:
    """Passes after which the gradients of `units` are whole, and are clipped."""

    units: list[tuple[int, int]]  # (slot, unit); the place in this list is the line of the gradients
    passes: list[list[Item]]


def clipped_passes(rows: Sequence[Item], token_budget: int, pass_tokens: int, most: int) -> Iterator[Clipped]:
    """The rows in passes, as `passes`, where at most `most` units at a time have a gradient of their own.

    Units of one row are clipped after their pass. The rows of others may be spread over passes.
    """
    by_unit: dict[tuple[int, int], list[Item]] = {}
    for item in rows:
        by_unit.setdefault((item.slot, item.unit), []).append(item)
    alone = [items[0] for items in by_unit.values() if len(items) == 1]
    for part in passes(alone, token_budget, pass_tokens):
        for i in range(0, len(part), most):
            few = part[i : i + most]
            yield Clipped([(item.slot, item.unit) for item in few], [few])
    several = [key for key, items in by_unit.items() if len(items) > 1]
    for i in range(0, len(several), most):
        units = several[i : i + most]
        yield Clipped(units, passes([item for key in units for item in by_unit[key]], token_budget, pass_tokens))


def passes(rows: Sequence[Item], token_budget: int, pass_tokens: int) -> list[list[Item]]:
    """The rows in passes that hold `token_budget` tokens at most, padding included, or a single row; longest first.

    Of all cuts of the rows sorted by length the cheapest, where a pass costs its tokens and `pass_tokens` more. So a short
    row does not fill up a pass of long ones, as it would if each pass took all that fits (13 % of all tokens were padding).
    """
    ordered = sorted(rows, key=lambda item: (-item.row.num_tokens, item.slot))
    widths = [item.row.num_tokens for item in ordered]
    best: list[tuple[int, int]] = [(0, 0)]  # of the first n rows: (cost, where their last pass begins)
    for end in range(1, len(ordered) + 1):
        begins = [end - 1]
        while begins[-1] and (end - begins[-1] + 1) * widths[begins[-1] - 1] <= token_budget:
            begins.append(begins[-1] - 1)
        best.append(min((best[i][0] + pass_tokens + (end - i) * widths[i], i) for i in begins))
    out: list[list[Item]] = []
    end = len(ordered)
    while end:
        begin = best[end][1]
        out.append(ordered[begin:end])
        end = begin
    return out[::-1]
