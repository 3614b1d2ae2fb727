"""Multimodal LLMs, frozen, with LoRA on top: one small interface, one Spec a kind of model. Loads no torch."""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fedmllm.core.spec import ADDED_LATER, EXECUTION_ONLY, Named, Spec
from fedmllm.core.types import Conversation, Params

if TYPE_CHECKING:
    from torch import Tensor, nn

# Where the package `kernels` is installed, transformers (at a model's first pass) and bitsandbytes (when imported) fetch
# compiled code from the network with it. They manage without; bitsandbytes need not say so each time.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # None = not importable
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Row:
    """One conversation with its answer, ready to be batched. `labels` is -100 except on the answer and its EOS."""

    input_ids: Tensor  # [L] int64
    labels: Tensor  # [L] int64
    images: dict[str, Tensor] = field(default_factory=dict)  # what this family's vision tower reads: pixels, grids
    image_key: str = ""  # digest of `images`; "" without pictures
    per_token: dict[str, Tensor] = field(default_factory=dict)  # [..., L]: token types, M-RoPE positions

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.numel())

    @property
    def num_bytes(self) -> int:
        tensors = (self.input_ids, self.labels, *self.images.values(), *self.per_token.values())
        return sum(t.numel() * t.element_size() for t in tensors)


Batch = dict[str, Any]  # "input_ids" [B, L], "per_token", "rows", "targets": as `Backbone.collate` made it for `loss`


class Lora(Spec):
    """LoRA (arXiv:2106.09685) as PEFT builds it. Defaults: those of FedMLLM (arXiv:2411.14717)."""

    r: PositiveInt = 8
    alpha: PositiveFloat = 8.0
    dropout: float = Field(0.05, ge=0, lt=1)
    rslora: bool = False
    targets: str = ""  # regex over module names; "" = the language model's attention projections of the family
    train_extra: tuple[str, ...] = ()  # whole modules trained and sent besides, by name; the reference's fault 6
    ranks: Annotated[tuple[PositiveInt, ...], ADDED_LATER] = ()
    """Ranks of the clients, in turn: client k has ranks[k mod len]; () = `r` for all. The scaling is alpha / r for every rank,
    and `r` is the largest of them."""

    @model_validator(mode="after")
    def _largest_rank(self) -> Lora:
        if self.ranks and max(self.ranks) != self.r:
            raise ValueError(f"r: got {self.r}; it must be the largest of ranks, {max(self.ranks)}")
        return self


class Precision(Spec):
    """How the frozen base is held. LoRA weights are float32 always."""

    base: Literal["float32", "float64", "bfloat16", "nf4"] = "float32"
    gradient_checkpointing: bool = False


class BackboneSpec(Named):
    """Which model, where from, and how it is adapted."""

    lora: Lora = Lora()
    precision: Precision = Precision()
    max_tokens: PositiveInt = 1200  # a longer prompt is an error, never cut inside image tokens
    # memory for the frozen tower's output across rounds and runs; 0 = off
    keep_image_features_mb: Annotated[NonNegativeInt, EXECUTION_ONLY] = 1024
    # where it is kept besides, for other processes and later runs, "~" allowed; "" = nowhere
    image_features_folder: Annotated[str, EXECUTION_ONLY] = ""
    image_features_folder_mb: Annotated[PositiveInt, EXECUTION_ONLY] = (
        16384  # of disk; what was used longest ago goes first
    )
    device: Annotated[str, EXECUTION_ONLY] = "cpu"  # "cpu", "cuda", "cuda:1"

    @abstractmethod
    def load(self, seed: int) -> Backbone:
        """The frozen model with freshly initialised LoRA (A from `seed`, B zero)."""


class Tiny(BackboneSpec):
    """The embedded MiniCPM-V 2.6 of about a million weights, pre-trained by `scripts/pretrain_tiny.py`."""

    name: Literal["tiny"] = "tiny"
    keep_image_features_mb: Annotated[NonNegativeInt, EXECUTION_ONLY] = 64  # 8 kB a picture

    def load(self, seed: int) -> Backbone:
        from fedmllm.backbones.tiny import load_tiny

        return load_tiny(self, seed)


class FromFolder(BackboneSpec):
    """A model folder in the hub's layout: MiniCPM-V 2.6 / Llama3-V 2.5 by our port, others by transformers."""

    name: Literal["hf"] = "hf"
    path: str  # a folder; "hub:owner/name" asks the network, nothing else does

    def load(self, seed: int) -> Backbone:
        from fedmllm.backbones.hf import load_folder

        return load_folder(self, seed)


class Backbone(ABC):
    """A frozen multimodal LLM with one LoRA adapter. Clients differ in `lora()` alone."""

    model: nn.Module  # PeftModel; its base is frozen
    digest: str  # sha256 of the base's configuration and weights
    num_layers: int  # of the language model
    device: Any

    @abstractmethod
    def encode(self, prompt: Conversation, answer: str) -> Row:
        """Tokens, labels, pixels of one row. Raises FedmllmError when over max_tokens, DataError for a bad image."""

    def needs_pixels(self, row: Row) -> bool:
        """False where `row.images` may be let go: what the frozen tower says about them is kept."""
        return bool(row.images)

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> Batch:
        """Right-padded batch on the model's device."""

    @abstractmethod
    def loss(self, batch: Batch, dropout_seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """(nll_B, num_label_tokens_B): summed negative log-likelihood of each row's labels, differentiable.

        `dropout_seeds`, one a row, turns LoRA dropout on. A row's mask is a function of its own seed, the module, the
        token position and the channel, so it does not depend on what else is in the batch. None = no dropout.
        """

    @abstractmethod
    def score(self, prompts: Sequence[Conversation], choices: Sequence[Sequence[str]]) -> list[list[float]]:
        """log p(choice | prompt) for each choice of each prompt, summed over the choice's tokens; no EOS is added."""

    @abstractmethod
    def generate(self, prompts: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """Greedy answers, without special tokens."""

    @abstractmethod
    def lora(self) -> Params:
        """A copy of the adapter under PEFT's saved names, float32, CPU."""

    @abstractmethod
    def set_lora(self, params: Params) -> None:
        """Load an adapter. Raises FedmllmError unless names and shapes are exactly those of `lora()`."""

    @abstractmethod
    def layer_of(self, name: str) -> int | None:
        """The language-model layer (0-based) that a LoRA tensor of that saved name belongs to; None = none."""

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """The live parameters behind `lora()`, by the same names."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the adapter so that `PeftModel.from_pretrained(base, folder)` loads it."""
