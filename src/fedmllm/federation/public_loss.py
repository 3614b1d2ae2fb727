"""Loss of an adapter on public rows, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmllm.algorithms.relations import Profile
from fedmllm.backbones.base import Backbone
from fedmllm.core.rng import stream
from fedmllm.core.types import Modality, Params, Visible
from fedmllm.federation.client import RowStore


def masks_like(profile: Profile, num_rows: int, modalities: Sequence[Modality], seed: int) -> list[Visible]:
    """Masks of public rows that show each modality as often as a node's clients see it.

    The server knows the shares alone, so modalities are hidden independently. Nodes of one profile have the same masks.

    Args:
        profile: Of the node.
        num_rows: Of the public rows.
        modalities: Of the data set.
        seed: Of the experiment.

    Returns:
        One mask a row.
    """
    visible: list[set[Modality]] = [set() for _ in range(num_rows)]
    for modality, share in zip(modalities, profile.shares, strict=True):
        for row in stream(seed, "public-masks", modality).permutation(num_rows)[: round(share * num_rows)].tolist():
            visible[row].add(modality)
    return [frozenset(v) for v in visible]


class MeanLoss:
    """Mean over the public rows of each row's mean loss, without dropout: a `PublicLoss`.

    Args:
        backbone: The server's model.
        store: The public rows.
        masks: Of each node, the mask of each row.
        batch_size: Rows of a pass.
    """

    def __init__(
        self, backbone: Backbone, store: RowStore, masks: Sequence[Sequence[Visible]], batch_size: int
    ) -> None:
        self._backbone, self._store, self._masks, self._batch_size = backbone, store, masks, batch_size

    def __call__(self, node: int, adapter: Params) -> tuple[float, Params]:
        """Measure an adapter.

        Args:
            node: Whose clients' masks the rows get.
            adapter: LoRA tensors of the backbone's names and shapes.

        Returns:
            The loss in nats, and its gradient under the adapter's names, float32, CPU.
        """
        backbone, masks = self._backbone, self._masks[node]
        backbone.set_lora(adapter)
        live, total = backbone.trainable(), 0.0
        for weight in live.values():
            weight.grad = None
        for start in range(0, len(masks), self._batch_size):
            rows = [self._store.row(start + i, v) for i, v in enumerate(masks[start : start + self._batch_size])]
            nll_B, tokens_B = backbone.loss(backbone.collate(rows))
            loss = (nll_B / tokens_B).sum() / len(masks)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        gradient = {
            name: torch.zeros_like(w, device="cpu") if w.grad is None else w.grad.cpu() for name, w in live.items()
        }
        for weight in live.values():
            weight.grad = None
        return total, gradient
