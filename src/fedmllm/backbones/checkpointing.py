"""Gradient checkpointing of the language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedmllm.backbones.dropout import Seeds
from fedmllm.core.errors import ConfigError


class BlockCheckpointing:
    """The layers of `decoder`, checkpointed while `on()` is open and gradients are enabled.

    A checkpointed layer stores its input alone and computes its activations again in the backward pass. transformers
    checkpoints layers in training mode only. Here the base never trains, so that its own dropout stays off: the flag is set
    on the layers themselves, not on their modules.

    Args:
        decoder: The language model.
        seeds: Dropout seeds, set again for the second forward pass.
        wanted: False = no layer is checkpointed.

    Raises:
        ConfigError: The family's layers do not support it.
    """

    def __init__(self, decoder: nn.Module, seeds: Seeds, wanted: bool) -> None:
        self._layers = [m for m in decoder.modules() if wanted and isinstance(m, GradientCheckpointingLayer)]
        if wanted and not self._layers:
            raise ConfigError(
                f"precision.gradient_checkpointing: {type(decoder).__name__} has no layers that support it"
            )

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), seeds.set(seeds.current)  # the second pass drops the same values

        for layer in self._layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(
                checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
            )

    @contextmanager
    def on(self) -> Iterator[None]:
        """Checkpointing is active in this block if gradients are enabled."""
        active = self._layers if torch.is_grad_enabled() else []
        for layer in active:
            layer.training = True
        try:
            yield
        finally:
            for layer in active:
                layer.training = False
