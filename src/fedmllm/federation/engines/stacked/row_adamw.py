"""AdamW, clipping and proximal pulls for many clients at once: row operations on [K, P] matrices.

Shapes: K clients, of which the first k are active; P weights of one adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmllm.config.train import Train

EPS = 1e-8  # torch.optim.AdamW's


class RowAdamW:
    """AdamW (arXiv:1711.05101) as torch.optim.AdamW has it, with a learning rate for each row."""

    def __init__(self, train: Train, like_KP: Tensor) -> None:
        self._train, self._num_steps = train, 0
        self._m_KP, self._v_KP = torch.zeros_like(like_KP), torch.zeros_like(like_KP)

    def step(self, weights_KP: Tensor, grads_KP: Tensor, lr: Sequence[float]) -> None:
        """Move the first len(lr) rows; every row that moves has moved at every step before."""
        t, k = self._train, len(lr)
        self._num_steps += 1
        w, g, m, v = weights_KP[:k], grads_KP[:k], self._m_KP[:k], self._v_KP[:k]
        lr_k1 = torch.tensor(lr, dtype=torch.float64)[:, None]
        w.mul_((1 - lr_k1 * t.weight_decay).to(w))
        m.lerp_(g, 1 - t.beta1)
        v.mul_(t.beta2).addcmul_(g, g, value=1 - t.beta2)
        root_kP = v.sqrt().div_((1 - t.beta2**self._num_steps) ** 0.5).add_(EPS)
        w.sub_(m.div(root_kP).mul_((lr_k1 / (1 - t.beta1**self._num_steps)).to(w)))


def clip(grads_KP: Tensor, max_norm: float) -> None:
    """Scale each row down to `max_norm`, as torch.nn.utils.clip_grad_norm_ does for one client."""
    grads_KP.mul_((max_norm / (grads_KP.norm(dim=1, keepdim=True) + 1e-6)).clamp_(max=1.0))


def prox_matrix(prox_mus: Sequence[Mapping[str, float]], sizes: Mapping[str, int], like_KP: Tensor) -> Tensor | None:
    """mu of every weight of every client, [K, P], or [K, 1] where it is the same for all of a client's; None = no pull."""
    if not any(prox_mus):
        return None
    mu_KT = torch.tensor([[prox_mu.get(name, 0.0) for name in sizes] for prox_mu in prox_mus], dtype=like_KP.dtype)
    if bool((mu_KT == mu_KT[:, :1]).all()):
        return mu_KT[:, :1].to(like_KP.device)
    return mu_KT.repeat_interleave(torch.tensor(list(sizes.values())), dim=1).to(like_KP.device)
