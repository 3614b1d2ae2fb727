"""Checks of a site's received adapter and returned delta.

A server can choose an adapter with which one AdamW step is proportional to the gradient, and a gradient of `lora_A` is a sum
of token embeddings: the words of the rows can be read from it (DAGER, arXiv:2405.15586). In its first step AdamW
(arXiv:1711.05101) moves a weight by lr g / (|g| + 1e-8): a linear function of g if |g| << 1e-8, and little more than its sign
if |g| >> 1e-8. None of these checks is a proof of privacy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fedmllm.algorithms.schedules import step_factor
from fedmllm.config.train import Train
from fedmllm.core.errors import Reason
from fedmllm.core.types import Params
from fedmllm.flower.site.config import Allow, Range


def rms(tensor: torch.Tensor) -> float:
    """Root mean square."""
    return float(tensor.double().pow(2).mean().sqrt()) if tensor.numel() else 0.0


def scales(start: Params) -> dict[str, float]:
    """RMS of each tensor of an adapter before training."""
    return {name: rms(tensor) for name, tensor in start.items()}


def implausible_adapter(received: Params, initial: Mapping[str, float], allow: Allow) -> list[str]:
    """Check a received adapter against the one that this site draws for the same seed.

    Args:
        received: From the server.
        initial: `scales` of the site's own adapter before training.
        allow: The site's limits `lora_a` and `lora_b`.

    Returns:
        At most one reason for each factor; [] = plausible.
    """
    reasons = []
    for factor, limit, relative in (("lora_A", allow.lora_a, True), ("lora_B", allow.lora_b, False)):
        for name, tensor in received.items():
            if factor in name and (
                reason := _outside(name, tensor, initial.get(name, 0.0) if relative else 1.0, limit)
            ):
                reasons.append(reason)
                break
    return reasons


def _outside(name: str, tensor: torch.Tensor, unit: float, limit: Range) -> str:
    is_b = "lora_B" in name
    if is_b and not tensor.any():
        return ""  # as before any training
    value = rms(tensor) / unit if unit else math.inf
    if value in limit:
        return ""
    what = "RMS" if is_b else "RMS relative to an untrained one"
    return f"{name}: {what} is {value:.3g}; this site allows {limit}"


def moving_steps(train: Train, round_lr: float, num_steps: int) -> int:
    """Count the steps that a round's delta shows: a server may give others a learning rate of next to 0, or decay them away.

    Args:
        train: Weight decay and schedule of the steps.
        round_lr: Learning rate at the beginning of the round.
        num_steps: Optimizer steps of the round.

    Returns:
        The steps whose learning rate, times what later weight decay leaves of them, is a tenth of the largest or more.
    """
    left, shares = 1.0, []
    for i in reversed(range(num_steps)):
        rate = round_lr * step_factor(train.step_schedule, i, num_steps)
        shares.append(abs(rate * left))
        left *= 1 - rate * train.weight_decay
    largest = max(shares, default=0.0)
    return sum(share >= largest / 10 for share in shares) if largest else 0


def suppressed_updates(
    delta: Params, start: Params, train: Train, round_lr: float, num_steps: int, least: float
) -> list[str]:
    """Check that no tensor moved so little that its change is proportional to the gradient.

    Args:
        delta: What training changed.
        start: The adapter before training.
        train: Weight decay and schedule of the steps.
        round_lr: Learning rate at the beginning of the round.
        num_steps: Optimiser steps of the round.
        least: RMS of a tensor's change over the mean learning rate; smaller changes are reported. 0 = no check.

    Returns:
        At most one reason; [] = plausible. A tensor whose gradient is exactly zero passes.
    """
    rates = [round_lr * step_factor(train.step_schedule, i, num_steps) for i in range(num_steps)]
    bound = least * sum(rates) / max(1, len(rates))
    for name, change in delta.items():
        decayed = start[name].clone()  # in the arithmetic of AdamW, so that a tensor without gradient differs in no bit
        for rate in rates:
            decayed.mul_(1 - rate * train.weight_decay)
        moved = rms(change - (decayed - start[name]))
        if 0 < moved < bound:
            return [
                Reason(
                    f"{name}: moved by less than allow.min_movement = {least:g} allows; such a change is proportional to the "
                    "gradient",
                    f"{moved:.3g} (RMS), less than {bound:.3g}",
                )
            ]
    return []
