"""Interface of frozen multimodal LLMs with LoRA, and their settings."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.spec import ADDED_LATER, EXECUTION_ONLY, Named, Spec, one_or_several
from fedmllm.core.types import Conversation, Params

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Row:
    """One conversation with its answer, ready to be batched.

    Attributes:
        input_ids: int64 [L].
        labels: int64 [L]; -100 except on the answer and the token that ends it.
        images: Inputs of this family's vision tower: pixels, grids.
        image_key: Digest of `images`; "" without pictures.
        per_token: Further inputs of the language model, [..., L]: token types, M-RoPE positions.
        imagined: For each picture the features [Q, D] that replace the tower's output, or the number Q of the tower's own;
            () = all are the tower's own.
    """

    input_ids: Tensor
    labels: Tensor
    images: dict[str, Tensor] = field(default_factory=dict)
    image_key: str = ""
    per_token: dict[str, Tensor] = field(default_factory=dict)
    imagined: tuple[Tensor | int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """L."""
        return int(self.input_ids.numel())

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        own = (part for part in self.imagined if not isinstance(part, int))
        tensors = (self.input_ids, self.labels, *self.images.values(), *self.per_token.values(), *own)
        return sum(t.numel() * t.element_size() for t in tensors)


Batch = dict[str, Any]  # "input_ids" [B, L], "per_token", "rows", "targets": as `Backbone.collate` made it for `loss`


class Lora(Spec):
    """LoRA (arXiv:2106.09685) as PEFT builds it. Defaults: those of FedMLLM (arXiv:2411.14717)."""

    r: PositiveInt = 8
    """Rank of the update B A."""

    alpha: PositiveFloat = 8.0
    """Scale: the update is multiplied by alpha / r, or by alpha / sqrt(r) with `rslora`."""

    dropout: float = Field(0.05, ge=0, lt=1)
    """Probability to drop an input channel of A in training; a row's mask depends on the row's own seed alone."""

    rslora: bool = False
    """Rank-stabilised scaling, alpha / sqrt(r) (arXiv:2312.03732)."""

    targets: str = ""
    """Regex that must match whole module names; "" = the attention projections of the family's language model."""

    train_extra: tuple[str, ...] = ()
    """Names of modules that are trained and sent whole in addition to LoRA, such as "embed_tokens" or "resampler"."""

    ranks: Annotated[tuple[PositiveInt, ...], ADDED_LATER] = ()
    """Ranks of the clients, in turn: client k has ranks[k mod len]; empty or all equal = every client has rank `r`. `r` must
    be the largest of them; the scaling is alpha / r for every rank. A real site has its own limit of "lora.r" at most."""

    rank_column: Annotated[str, ADDED_LATER] = ""
    """Column of the training rows that states the largest rank of each client, such as a limit of its site; a client has that
    rank, or `r` if that is less. Instead of `ranks`."""

    modality_gate: Annotated[bool, ADDED_LATER] = False
    """Train a vector for each layer and modality (text, picture) that is added to the attention's keys. It is sent and
    averaged with the adapter, and starts at zero, which changes nothing."""

    init: Annotated[Literal["kaiming", "principal", "principal-b"], ADDED_LATER] = "kaiming"
    """Values before training. "kaiming": A uniform, B zero. "principal": B = U sqrt(S), A = sqrt(S) V' from the leading
    directions of the layer's weight W = U S V'. "principal-b": that B, A uniform. Other than "kaiming" is for yoco."""

    def unequal(self) -> str:
        """Say which setting makes the ranks of clients unequal.

        Returns:
            Key and value, for an error message; "" = all clients have rank `r`.
        """
        if self.rank_column:
            return f'backbone.lora.rank_column: got "{self.rank_column}"'
        return f"backbone.lora.ranks: got {list(self.ranks)}" if len(set(self.ranks)) > 1 else ""

    def at_most(self, rank: int) -> Lora:
        """Limit the rank, at the same scaling.

        Args:
            rank: The largest that is allowed; 0 = any.

        Returns:
            These settings if `r` is not larger; else those of clients that all have this rank.
        """
        if not 0 < rank < self.r:
            return self
        share = rank / self.r
        alpha = self.alpha * (math.sqrt(share) if self.rslora else share)
        return self.model_copy(update={"r": rank, "alpha": alpha, "ranks": ()})

    @model_validator(mode="after")
    def _largest_rank(self) -> Lora:
        if self.ranks and self.rank_column:
            raise ValueError(f"rank_column: got {self.rank_column!r} with ranks = {list(self.ranks)}; give one of them")
        if self.ranks and max(self.ranks) != self.r:
            raise ValueError(f"r: got {self.r}; it must be the largest of ranks, {max(self.ranks)}")
        return self


class Precision(Spec):
    """Number format of the frozen base. LoRA weights are float32, or float64 on a float64 base."""

    base: Literal["float32", "float64", "bfloat16", "nf4"] = "float32"
    """Type of the base's weights; "nf4" = four bits (arXiv:2305.14314), which needs the package bitsandbytes."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of storing them: less memory, about a third more time."""


class BackboneSpec(Named):
    """Settings of a model: its source, its adaptation, and how it is held."""

    lora: Lora = Lora()
    """The trained adapter."""

    precision: Precision = Precision()
    """Number format of the frozen base."""

    max_tokens: PositiveInt = 1200
    """Longest row in tokens; a longer one is an error and is never cut inside image tokens."""

    keep_image_features_mb: Annotated[NonNegativeInt, EXECUTION_ONLY] = 1024
    """Memory in MiB for outputs of the frozen vision tower across rounds and runs; 0 = they are computed each time."""

    image_features_folder: Annotated[str, EXECUTION_ONLY] = ""
    """Folder that also caches them, for other processes and later runs; "~" is allowed; "" = none."""

    image_features_folder_mb: Annotated[PositiveInt, EXECUTION_ONLY] = 16384
    """Size of that folder in MiB; the least recently used files are removed first."""

    adapter: Annotated[str, ADDED_LATER] = ""
    """Folder of a PEFT adapter that training starts from, such as `runs/RUN_ID/adapter`; "" = a new adapter, which changes
    nothing. Its rank and scaling must be those of `lora`."""

    device: Annotated[str, EXECUTION_ONLY] = "cpu"
    """ "auto" (a CUDA device if there is one, otherwise the CPU), "cpu", "cuda" or "cuda:1"."""

    device_map: Annotated[tuple[str, ...], EXECUTION_ONLY, BeforeValidator(one_or_several)] = ()
    """Devices over which the layers are spread, instead of `device`: "auto" (every CUDA device) or a list such as
    ["cuda:0", "cuda:1"], in the order of the layers; empty = the whole model is on one device. Not with engine "stacked"."""

    usual_lr: ClassVar[float] = 1e-4
    """A `train.lr` at which LoRA on such a model learns; named when a run has learned nothing."""

    @model_validator(mode="after")
    def _principal_directions_can_be_computed(self) -> BackboneSpec:
        if self.lora.init != "kaiming" and self.precision.base == "nf4":
            raise ValueError(f'lora.init: got "{self.lora.init}"; weights in nf4 have no SVD; allowed: kaiming')
        return self

    @model_validator(mode="after")
    def _layers_can_be_spread(self) -> BackboneSpec:
        check_device_map(self)
        # A full dump names every default, so `device` counts as given if it is another one.
        if self.device_map and self.device != type(self).model_fields["device"].default:
            raise ValueError(f"device_map: got {list(self.device_map)} with device = {self.device!r}; give one of them")
        return self

    def check_adapter(self, folder: Path) -> None:
        """Check that a PEFT folder was trained on this base, where shapes do not say so. Any passes by default.

        Args:
            folder: The folder of the adapter.

        Raises:
            ConfigError: It was trained on another base.
        """

    @abstractmethod
    def load(self, seed: int) -> Backbone:
        """Load the frozen model with a new adapter.

        Args:
            seed: Source of LoRA's A; B is zero.

        Returns:
            The model, ready to encode, train and evaluate.

        Raises:
            ConfigError: A setting does not fit the model or this machine.
            FedmllmError: The model cannot be loaded.
        """


def check_device_map(spec: BackboneSpec) -> None:
    """Check the names of `device_map`, whether this machine has the devices or not, and that the model can be spread.

    Args:
        spec: Settings of a model.

    Raises:
        ValueError: A device is not known or named twice, there is one alone, or the base is held in four bits.
    """
    names = ["cpu:0" if name == "cpu" else name for name in spec.device_map]
    allowed = 'allowed: "auto", or a list of at least two of "cuda:0", "cuda:1", ..., "cpu"'
    odd = [name for name in names if not re.fullmatch(r"(cuda|cpu):(0|[1-9]\d?)", name)]
    if odd and names != ["auto"]:
        raise ValueError(f"device_map: got {odd[0]!r}; {allowed}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"device_map: {twice[0]!r} is named twice; {allowed}")
    if len(names) == 1 and not odd:
        raise ValueError(f'device_map: got {names[0]!r} alone; use device = "{names[0]}"')
    if names and spec.precision.base == "nf4":
        raise ValueError(
            'device_map: weights in nf4 are not spread over several devices; allowed: precision.base "float32", "float64", '
            '"bfloat16", or one device'
        )


class Tiny(BackboneSpec):
    """The embedded MiniCPM-V 2.6 of about a million weights, pre-trained by `scripts/pretrain_tiny.py`."""

    name: Literal["tiny"] = "tiny"
    edition: Annotated[Literal[1, 2], ADDED_LATER] = 1
    """1: learns `synthetic-irony`; an earlier form of the script made it. 2: seed 0 of today's script, which rebuilds it; for
    `synthetic-verdict`."""

    usual_lr: ClassVar[float] = 3e-3
    keep_image_features_mb: Annotated[NonNegativeInt, EXECUTION_ONLY] = 64
    """Memory in MiB for outputs of the frozen vision tower across rounds and runs, 8 kB a picture; 0 = none."""

    def load(self, seed: int) -> Backbone:
        from fedmllm.backbones.tiny import load_tiny

        return load_tiny(self, seed)

    def base_name(self) -> str:
        """Base of a saved adapter: a path would mean nothing on another machine."""
        return "fedmllm/tiny" if self.edition == 1 else f"fedmllm/tiny-{self.edition}"

    def check_adapter(self, folder: Path) -> None:
        config = folder / "adapter_config.json"
        try:
            trained_on = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            return  # not a PEFT adapter: its reader says so
        for edition in get_args(type(self).model_fields["edition"].annotation):
            if edition != self.edition and trained_on == Tiny(edition=edition).base_name():
                raise ConfigError(
                    f"{folder}: trained on edition {edition} of the embedded model; backbone.edition is {self.edition}"
                )


class FromFolder(BackboneSpec):
    """A model folder in the hub's layout: MiniCPM-V 2.6 / Llama3-V 2.5 by our port, others by transformers."""

    name: Literal["hf"] = "hf"
    path: str
    """A folder, or "hub:owner/name", which is the only way to reach the network."""

    def load(self, seed: int) -> Backbone:
        from fedmllm.backbones.hf import load_folder

        return load_folder(self, seed)


class Backbone(ABC):
    """A frozen multimodal LLM with one LoRA adapter. Clients differ in `lora()` alone.

    Attributes:
        model: PEFT model; its base is frozen.
        digest: Identity of the base: all files that change what the model reads or computes (`folder.folder_digest`).
        num_layers: Layers of the language model.
        device: torch.device of the weights; of inputs and logits, if there are several.
        devices: Names of the devices if layers are spread over several, else empty.
    """

    model: nn.Module
    digest: str
    num_layers: int
    device: Any
    devices: tuple[str, ...] = ()

    @abstractmethod
    def encode(self, prompt: Conversation, answer: str) -> Row:
        """Tokens, labels and pixels of one row. No string in a row's text becomes a control token.

        Args:
            prompt: Texts and pictures of the user's turn.
            answer: Text to learn.

        Returns:
            The row; its labels are the answer and the token that ends it.

        Raises:
            DataError: A picture cannot be read.
            FedmllmError: The row is longer than `max_tokens`.
        """

    def needs_pixels(self, row: Row) -> bool:
        """False if `row.images` may be dropped, because the output of the frozen tower for them is cached.

        Args:
            row: An encoded row.

        Returns:
            True if the pixels are still needed.
        """
        return bool(row.images)

    def token_vectors(self, text: str) -> tuple[list[int], Tensor]:
        """Tokens of a text and their vectors in the frozen model. Optional: some completions need it.

        Args:
            text: Any text; no string in it becomes a control token.

        Returns:
            The tokens [L], and their input embeddings [L, D], float32, CPU.

        Raises:
            FedmllmError: The backbone does not offer it.
        """
        raise FedmllmError(f"{type(self).__name__} gives no token vectors, which this completion needs")

    def picture_vectors(self, path: Path) -> Tensor:
        """Output of the frozen vision tower for a picture. Optional: some completions need it.

        Args:
            path: The picture.

        Returns:
            The vectors that take the places of its image tokens [Q, D], float32, CPU.

        Raises:
            FedmllmError: The backbone does not offer it.
        """
        raise FedmllmError(f"{type(self).__name__} gives no picture vectors, which this completion needs")

    def generate_frozen(self, prompts: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """Greedy answers of the model without its adapter; the adapter is the same afterwards.

        Args:
            prompts: The rows.
            max_new_tokens: Longest answer in tokens.

        Returns:
            One text a prompt, without special tokens.
        """
        before = self.lora()
        self.set_lora(
            {
                name: t.new_zeros(t.shape) if "lora_B" in name or "modality_gate" in name else t
                for name, t in before.items()
            }
        )
        try:
            return self.generate(prompts, max_new_tokens)
        finally:
            self.set_lora(before)

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> Batch:
        """Rows as one batch, padded on the right, on the model's device.

        Args:
            rows: Encoded rows, at least one.

        Returns:
            The batch that `loss` takes: "input_ids" [B, L] and what else the family reads.
        """

    @abstractmethod
    def loss(self, batch: Batch, dropout_seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihood of each row's labels, differentiable.

        Args:
            batch: B rows, by `collate`.
            dropout_seeds: One a row: turns LoRA dropout on. A row's mask is a function of its own seed, the module, the
                token position and the channel, so it does not depend on the rest of the batch. None = no dropout.

        Returns:
            nll_B [B], and the number of label tokens of each row [B].
        """

    @abstractmethod
    def score(self, prompts: Sequence[Conversation], choices: Sequence[Sequence[str]]) -> list[list[float]]:
        """log p(choice | prompt), in nats.

        Args:
            prompts: The rows.
            choices: The choices of each.

        Returns:
            For each prompt, for each choice, the sum over the choice's tokens; no EOS is added.
        """

    @abstractmethod
    def generate(self, prompts: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """Greedy answers.

        Args:
            prompts: The rows.
            max_new_tokens: Longest answer in tokens.

        Returns:
            One text a prompt, without special tokens.
        """

    @abstractmethod
    def lora(self) -> Params:
        """A copy of the adapter under PEFT's saved names, float32, CPU.

        Returns:
            Saved name -> tensor, A [r, in] and B [out, r].
        """

    @abstractmethod
    def set_lora(self, params: Params) -> None:
        """Load an adapter.

        Args:
            params: Tensors as in `lora()`.

        Raises:
            FedmllmError: Names or shapes are not exactly those of `lora()`.
        """

    @abstractmethod
    def layer_of(self, name: str) -> int | None:
        """Layer of the language model, from 0, that holds the LoRA tensor of this saved name; None if none does.

        Args:
            name: A name in `lora()`.

        Returns:
            The layer, or None.
        """

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """The live parameters behind `lora()`, by the same names.

        Returns:
            Saved name -> parameter on the model's device.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the adapter to `folder`, which is made, as a PEFT folder: `PeftModel.from_pretrained(base, folder)`.

        Args:
            folder: The folder; existing files of an adapter are replaced.
        """
