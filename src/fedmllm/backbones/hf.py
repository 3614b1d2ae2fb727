"""Backbone of any image-text-to-text model of transformers.

Shapes: B rows, L tokens, N label tokens of all rows, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedmllm.backbones.base import Backbone, BackboneSpec, Batch, FromFolder, Row
from fedmllm.backbones.cache.feature_folder import FeatureFolder
from fedmllm.backbones.cache.features import ImageFeatures, feature_argument
from fedmllm.backbones.checkpointing import BlockCheckpointing
from fedmllm.backbones.decode import Decoder, at_least_float32
from fedmllm.backbones.dropout import seed_tensor
from fedmllm.backbones.encode import IGNORED, Encoder
from fedmllm.backbones.hub_kernels import without_hub_kernels
from fedmllm.backbones.lora import adapter_config, add_lora, copy_of, decoder_name, load_into, parameters_by_saved_name
from fedmllm.backbones.modality_gate import ModalityGate
from fedmllm.backbones.spread import spread_over
from fedmllm.core.storage import write_tensors
from fedmllm.core.types import Conversation, Params, Picture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Families whose tokens never attend to the right, padding included: right padding then needs no attention mask, which keeps
# the fast causal path. Each is tested (tests/backbones); any other family gets a mask.
CAUSAL = frozenset(
    "minicpmv minicpmv4_6 minicpmv4_7 qwen2_vl qwen2_5_vl qwen3_vl qwen3_5 smolvlm llava internvl gemma3".split()  # noqa: SIM905
)


class TransformersBackbone(Backbone):
    """One code path for every family.

    Args:
        model: The base, on its device; it is frozen and adapted in place.
        processor: Its processor, with a tokenizer and a chat template.
        spec: LoRA, limits, caches.
        seed: Source of LoRA's initial values.
        base: `base_model_name_or_path` of a saved adapter: the folder or hub id as the user wrote it.
        digest: Computes the digest of the base; called when it is first needed.

    Raises:
        ConfigError: LoRA's targets, `train_extra` or gradient checkpointing do not fit the model.
        FedmllmError: The model's forward pass takes no precomputed image features.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        spec: BackboneSpec,
        seed: int,
        base: str,
        digest: Callable[[], str],
    ) -> None:
        self.spec, self._digest_of = spec, digest
        self.base = model.eval()
        self.processor = processor
        self.devices = spread_over(model)
        self.device = torch.device(self.devices[0]) if self.devices else model.device
        self.decoder = decoder_name(model)
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)
        feature_argument(model)  # raises if the family cannot be used at all
        with without_hub_kernels():
            self.model, self._seeds = add_lora(model, spec.lora, seed, base)
        self.model.eval()  # dropout of the base stays off, as in the reference; LoRA's follows its row seeds
        self.gate = ModalityGate(self.base, self.decoder) if spec.lora.modality_gate else None
        live = {**parameters_by_saved_name(self.model), **(self.gate.parameters() if self.gate else {})}
        self._live = {name: live[name] for name in sorted(live)}
        frozen = all(name.startswith(f"base_model.model.{self.decoder}.") for name in self._live)
        folder = Path(spec.image_features_folder).expanduser() if spec.image_features_folder else None
        self.features = ImageFeatures(
            self.base,
            spec.keep_image_features_mb,
            frozen,
            lambda: f"{self.digest} {spec.precision.base}",
            FeatureFolder(folder, spec.image_features_folder_mb) if folder else None,
        )
        self.encoder = Encoder(model, processor, spec.max_tokens, self.features.has, self._num_vectors)
        self._checkpointing = BlockCheckpointing(
            model.get_submodule(self.decoder), self._seeds, spec.precision.gradient_checkpointing
        )
        self._decoder = Decoder(self)

    @cached_property
    def digest(self) -> str:  # type: ignore[override]
        return self._digest_of()

    @property
    def replaced_defaults(self) -> dict[str, tuple[Any, Any]]:
        """Image settings of the folder that replaced the family's defaults: key -> (default, the folder's)."""
        return dict(getattr(self.processor, "replaced_defaults", {}))

    # --- rows and batches

    def encode(self, prompt: Conversation, answer: str) -> Row:
        return self.encoder.encode(prompt, answer)

    def needs_pixels(self, row: Row) -> bool:
        return not self.features.has(row)

    def token_vectors(self, text: str) -> tuple[list[int], Tensor]:
        ids = self.encoder.answer_ids(text)
        with torch.no_grad():
            vectors_LD = self.base.get_input_embeddings()(torch.tensor(ids, dtype=torch.int64, device=self.device))
        return ids, vectors_LD.float().cpu()

    def picture_vectors(self, path: Path) -> Tensor:
        with torch.no_grad():
            return self.features.vectors(self.encoder.prompt(Conversation((Picture(path), "?"))))

    def _num_vectors(self, row: Row) -> int:
        with torch.no_grad():
            return len(self.features.vectors(row))

    def collate(self, rows: Sequence[Row], left: bool = False) -> Batch:
        """Tokens padded on the right, or on the left if `left`, on the model's device; pictures stay with their rows."""
        length = max(row.num_tokens for row in rows)

        def stack(tensors: Sequence[Tensor], value: int, dim: int = 0) -> Tensor:
            gaps = [length - t.shape[-1] for t in tensors]
            padded = [
                nn.functional.pad(t, (gap, 0) if left else (0, gap), value=value)
                for t, gap in zip(tensors, gaps, strict=True)
            ]
            return torch.stack(padded, dim=dim).to(self.device)

        per_token = {}
        for key in sorted({key for row in rows for key in row.per_token}):
            have = [row.per_token[key] if key in row.per_token else torch.zeros_like(row.input_ids) for row in rows]
            per_token[key] = stack(have, 0, dim=have[0].ndim - 1)  # M-RoPE positions are [3, B, L]
        batch: Batch = {
            "input_ids": stack([row.input_ids for row in rows], self._pad_id),
            "per_token": per_token,
            "rows": tuple(rows),
            "targets": Targets.of(rows, length, self.device),
        }
        if left or self.encoder.family not in CAUSAL:
            batch["attention_mask"] = stack([torch.ones_like(row.input_ids) for row in rows], 0)
        return batch

    @cached_property
    def ends(self) -> list[int]:
        """Tokens that end an answer: the template's end of a turn, the tokenizer's EOS, the model's own."""
        own = self.base.generation_config.eos_token_id
        ids = {
            self.encoder.end_of_turn,
            self.encoder.tokenizer.eos_token_id,
            *([own] if isinstance(own, int) else own or []),
        }
        return sorted(ids - {None})

    @property
    def _pad_id(self) -> int:
        pad = self.encoder.tokenizer.pad_token_id
        return int(pad if pad is not None else self.encoder.end_of_turn)

    # --- the model

    def logits(self, batch: Batch, index_N: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
        """Logits at some positions.

        Args:
            batch: B rows of L tokens, by `collate`.
            index_N: Positions among the B x L; only these go through the language-model head.
            arguments: Further arguments of the forward pass.

        Returns:
            [N, V], and the whole output of the forward pass.
        """
        if self.gate:
            self.gate.read(batch)
        with without_hub_kernels(), _head_limited_to(self.base.get_output_embeddings(), index_N):
            output = self.base(
                input_ids=batch["input_ids"],
                attention_mask=batch.get("attention_mask"),
                **batch["per_token"],
                **self.features.arguments(batch["rows"]),
                **arguments,
            )
        return output.logits[0], output

    def loss(self, batch: Batch, dropout_seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        targets: Targets = batch["targets"]
        seeds_B = None if dropout_seeds is None else seed_tensor(dropout_seeds, self.device)
        with self._seeds.set(seeds_B), self._checkpointing.on():
            logits_NV, _ = self.logits(batch, targets.index_N, use_cache=False)
        nll_N = nn.functional.cross_entropy(at_least_float32(logits_NV), targets.token_N, reduction="none")
        nll_B = nll_N.new_zeros(len(targets.num_B)).index_add(0, targets.row_N, nll_N)
        return nll_B, targets.num_B

    def score(self, prompts: Sequence[Conversation], choices: Sequence[Sequence[str]]) -> list[list[float]]:
        return self._decoder.score(prompts, choices)

    def generate(self, prompts: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        return self._decoder.generate(prompts, max_new_tokens)

    # --- the adapter

    def lora(self) -> Params:
        return copy_of(self._live)

    def set_lora(self, params: Params) -> None:
        load_into(self._live, params)

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self._live)

    def layer_of(self, name: str) -> int | None:
        prefix = f"base_model.model.{self.decoder}.layers."
        return int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "adapter_model.safetensors", self.lora())
        config = adapter_config(self.model) | ({"modality_gate": True} if self.gate else {})  # PEFT warns of it
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Targets:
    """Positions and tokens that a right-padded batch predicts, found on the CPU without a wait for the device."""

    index_N: Tensor  # positions among the B x L, each before its token
    token_N: Tensor
    row_N: Tensor
    num_B: Tensor  # tokens of each row

    @classmethod
    def of(cls, rows: Sequence[Row], length: int, device: torch.device) -> Targets:
        places = [(row.labels[1:] != IGNORED).nonzero()[:, 0] for row in rows]
        num_B = torch.tensor([len(place) for place in places])
        index = torch.cat([place + b * length for b, place in enumerate(places)])
        token = torch.cat([row.labels[1:][place] for row, place in zip(rows, places, strict=True)])
        row = torch.arange(len(rows)).repeat_interleave(num_B)
        return cls(*(t.to(device) for t in (index, token, row, num_B)))


@contextmanager
def _head_limited_to(head: nn.Module, index_N: Tensor) -> Iterator[None]:
    """The language-model head gets these positions [1, N, D] instead of all [B, L, D] in this block.

    So each family's own forward pass runs to its end, including its own processing of logits behind the head.
    """
    hook = head.register_forward_pre_hook(
        lambda _module, inputs: (inputs[0].flatten(0, 1).index_select(0, index_N)[None], *inputs[1:])
    )
    try:
        yield
    finally:
        hook.remove()


def load_folder(spec: FromFolder, seed: int) -> TransformersBackbone:
    """The model of the folder `spec.path` with a new adapter.

    Args:
        spec: The folder and how it is held and adapted.
        seed: Source of LoRA's initial values.

    Raises:
        ConfigError: A setting does not fit the model or this machine.
        FedmllmError: The folder is not a complete image-text-to-text model.
    """
    from fedmllm.backbones.folder import load_base

    model, processor, digest = load_base(spec)
    return TransformersBackbone(model, processor, spec, seed, spec.path.removeprefix("hub:"), digest)
