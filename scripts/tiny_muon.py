"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for many small matrices: those of one shape go at once.

`torch.optim.Muon` takes them one by one, which for a model of this size costs as much time as its forward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the published quintic iteration


class Muon(torch.optim.Optimizer):
    """w -= lr * sqrt(max(1, rows / columns)) * orthogonalized Nesterov momentum, after decoupled weight decay."""

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for (rows, columns), members in by_shape.items():
                directions = orthogonalized(torch.stack([self._momentum(p, group["momentum"]) for p in members]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for p, direction in zip(members, directions, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=scale)

    def _momentum(self, p: torch.nn.Parameter, beta: float) -> Tensor:
        assert p.grad is not None
        buffer: Tensor = self.state[p].setdefault("momentum", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - beta)
        return p.grad.lerp(buffer, beta)


def orthogonalized(matrices_NRC: Tensor, steps: int = 5) -> Tensor:
    """Each matrix with its singular values moved near 1, by Newton-Schulz iteration in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = (matrices_NRC.mT if tall else matrices_NRC).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()
