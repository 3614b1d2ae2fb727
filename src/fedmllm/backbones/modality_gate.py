"""Learned key vectors by layer and modality, for the frozen attention.

Shapes: B rows, L tokens, D channels of the keys, M = 2 modalities: text, picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedmllm.backbones.base import Batch
from fedmllm.core.errors import ConfigError

GATE_SUFFIX = ".modality_gate"  # of the saved names
NUM_MODALITIES = 2


class GateLayer:
    """The vectors of one layer: row 0 is added to the keys of text tokens, row 1 to those of picture tokens."""

    def __init__(self, name: str, projection: nn.Module, weight: nn.Parameter) -> None:
        self.name, self.weight = name, weight
        self.pictures_BL1 = torch.zeros(0, dtype=torch.bool)
        self.instead: Callable[[Tensor], Tensor] | None = None  # of an engine whose rows have vectors of their own
        projection.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, inputs: tuple[Any, ...], keys_BLD: Tensor) -> Tensor:
        if self.instead:
            return self.instead(keys_BLD)
        text_D, picture_D = self.weight.to(keys_BLD.dtype)
        return keys_BLD + torch.where(self.pictures_BL1.to(keys_BLD.device), picture_D, text_D)


class ModalityGate:
    """An additive key for each layer and modality: k_j + c[layer, modality of token j], before the positions.

    A logit gains q_i . c, so how much a modality counts depends on the query. A factor on the picture's embeddings would not
    do: the layer's norm removes it. Zero at the start, which is the frozen model. One modality is that of all pictures.

    Args:
        base: The frozen model, with its LoRA layers.
        decoder: Name of its language model.

    Raises:
        ConfigError: A layer has no key projection of its own, or picture tokens are not marked.
    """

    def __init__(self, base: nn.Module, decoder: str) -> None:
        config: Any = base.config
        ids = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        self._picture_id = next((i for i in ids if isinstance(i, int)), None)
        wide = torch.float64 if getattr(base, "dtype", None) == torch.float64 else torch.float32
        self.layers = []
        for number, layer in enumerate(base.get_submodule(decoder).layers):  # type: ignore[arg-type]
            found = [(name, m) for name, m in layer.named_modules() if name.endswith("attn.k_proj")]
            if len(found) != 1:
                raise ConfigError(
                    f"backbone.lora.modality_gate: layer {number} of {type(base).__name__} has {len(found)} modules "
                    "attn.k_proj; it is for models whose every layer has one"
                )
            name, projection = found[0]
            linear: Any = getattr(projection, "base_layer", projection)
            zeros = torch.zeros(NUM_MODALITIES, linear.out_features, dtype=wide, device=linear.weight.device)
            saved = f"base_model.model.{decoder}.layers.{number}.{name}{GATE_SUFFIX}"
            self.layers.append(GateLayer(saved, projection, nn.Parameter(zeros)))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Saved name -> vectors [M, D]."""
        return {layer.name: layer.weight for layer in self.layers}

    def read(self, batch: Batch) -> None:
        """Find the picture tokens of the batch that the model computes next; they hold until the next one.

        Args:
            batch: Rows by `collate`, or tokens that follow cached ones.

        Raises:
            ConfigError: The family marks picture tokens neither by type nor by a number.
        """
        types_BL, ids_BL = batch["per_token"].get("mm_token_type_ids"), batch["input_ids"]
        if types_BL is not None:
            pictures_BL = types_BL == 1
        elif self._picture_id is not None:
            pictures_BL = ids_BL == self._picture_id
        elif any(row.image_key for row in batch["rows"]):
            raise ConfigError("backbone.lora.modality_gate: this family does not mark which tokens are a picture's")
        else:
            pictures_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
        for layer in self.layers:
            layer.pictures_BL1 = pictures_BL[..., None]
