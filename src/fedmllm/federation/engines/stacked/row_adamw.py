"""AdamW, clipping and proximal terms as row operations on [K, T].

Shapes: K clients, of which the first k are active; T weights of one adapter that train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmllm.config.train import Train

EPS = 1e-8  # torch.optim.AdamW's


class RowAdamW:
    """AdamW (arXiv:1711.05101) as in torch.optim.AdamW, with a learning rate for each row."""

    def __init__(self, train: Train, like_KT: Tensor) -> None:
        self._train, self._num_steps = train, 0
        self._m_KT, self._v_KT = torch.zeros_like(like_KT), torch.zeros_like(like_KT)

    def step(self, weights_KT: Tensor, grads_KT: Tensor, lr: Sequence[float]) -> None:
        """Move the first len(lr) rows; every row that moves has moved at every step before."""
        t, k = self._train, len(lr)
        self._num_steps += 1
        w, g, m, v = weights_KT[:k], grads_KT[:k], self._m_KT[:k], self._v_KT[:k]
        lr_k1 = torch.tensor(lr, dtype=torch.float64)[:, None]
        w.mul_((1 - lr_k1 * t.weight_decay).to(w))
        m.lerp_(g, 1 - t.beta1)
        v.mul_(t.beta2).addcmul_(g, g, value=1 - t.beta2)
        root_kT = v.sqrt().div_((1 - t.beta2**self._num_steps) ** 0.5).add_(EPS)
        w.sub_(m.div(root_kT).mul_((lr_k1 / (1 - t.beta1**self._num_steps)).to(w)))


def clip(grads_KT: Tensor, max_norm: float) -> None:
    """Scale each row down to `max_norm`, as torch.nn.utils.clip_grad_norm_ does for one client."""
    grads_KT.mul_((max_norm / (grads_KT.norm(dim=1, keepdim=True) + 1e-6)).clamp_(max=1.0))


def prox_matrix(prox_mus: Sequence[Mapping[str, float]], sizes: Mapping[str, int], like_KT: Tensor) -> Tensor | None:
    """mu of every weight of every client, [K, T], or [K, 1] if each client has one for all; None = no proximal term."""
    if not any(prox_mus):
        return None
    mu_KT = torch.tensor([[prox_mu.get(name, 0.0) for name in sizes] for prox_mu in prox_mus], dtype=like_KT.dtype)
    if bool((mu_KT == mu_KT[:, :1]).all()):
        return mu_KT[:, :1].to(like_KT.device)
    return mu_KT.repeat_interleave(torch.tensor(list(sizes.values())), dim=1).to(like_KT.device)
