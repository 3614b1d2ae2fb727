"""Memory of a model, from its config.json alone.

The model is built on torch's meta device, without weights. Activations are not a formula: the language model runs forward
on meta tensors, and the tensors that autograd would save are summed. So the figure holds for every family, with its norms,
gates and LoRA casts. Shapes: B = 1 row, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedmllm.backbones import nf4
from fedmllm.backbones.base import BackboneSpec
from fedmllm.backbones.dropout import Seeds
from fedmllm.backbones.folder import DTYPES, LOADING_ERRORS, OURS, device_named, family_of, quiet
from fedmllm.backbones.lora import add_lora, decoder_name, parameters_by_saved_name
from fedmllm.backbones.modality_gate import ModalityGate
from fedmllm.backbones.spread import DevicePart, device_parts, devices_of
from fedmllm.core.errors import FedmllmError

PROBE_TOKENS = 256
# NF4 with double quantisation: 4 bits a weight, 8 bits for the scale of 64 weights, 32 bits for that of 256 scales
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class MemoryPart:
    """A component of the frozen base."""

    name: str
    num_weights: int
    num_bytes: int


@dataclass(frozen=True)
class Footprint:
    """Sizes of one model under one specification."""

    family: str
    parts: tuple[MemoryPart, ...]
    num_layers: int
    num_vocabulary: int
    trained: dict[str, int]  # weights that are trained and sent, by group: "LoRA", and each whole module
    targets: tuple[str, ...]  # adapted modules
    activation_bytes: float  # a token, saved from forward to backward
    checkpointed_bytes: float  # the same with gradient checkpointing, without the one layer that is computed again
    layer_bytes: float  # a token, of one layer: the largest that is computed again
    shares: tuple[DevicePart, ...] = ()  # what each device holds of the base, if layers are spread over several

    @property
    def num_weights(self) -> int:
        return sum(part.num_weights for part in self.parts)

    @property
    def base_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @property
    def num_trained(self) -> int:
        return sum(self.trained.values())

    @property
    def payload_bytes(self) -> int:
        """One way, one client: float32."""
        return 4 * self.num_trained


def footprint(folder: Path, spec: BackboneSpec) -> Footprint:
    """Sizes of the model of `folder`/config.json.

    Args:
        folder: A model folder; its weights are not needed.
        spec: How the model is held and adapted.

    Raises:
        ConfigError: LoRA's settings do not fit the model.
        FedmllmError: config.json is not that of an image-text-to-text model.
    """
    family = family_of(folder)
    model = empty_model(folder, family)
    parts = _parts(model, family, spec)
    dtype = (
        nf4.compute_dtype(device_named(spec.device)) if spec.precision.base == "nf4" else DTYPES[spec.precision.base]
    )
    name = decoder_name(model)
    config = model.config.get_text_config()
    model = model.to(dtype)
    parted = device_parts(model, name, devices_of(spec.device_map, exist=False)) if spec.device_map else []
    peft, seeds = add_lora(model, spec.lora, 0, "")
    live = parameters_by_saved_name(peft)
    trained = {"LoRA": sum(p.numel() for n, p in live.items() if ".lora_" in n)}
    for extra in spec.lora.train_extra:
        trained[extra] = sum(p.numel() for n, p in live.items() if f".{extra}." in n and ".lora_" not in n)
    saved = _saved_bytes(model.get_submodule(name), config.hidden_size, dtype, seeds) / PROBE_TOKENS
    if spec.lora.modality_gate:  # after the probe, whose tokens have no modality
        trained["modality gate"] = sum(p.numel() for p in ModalityGate(model, name).parameters().values())
    return Footprint(
        family=family,
        parts=parts,
        num_layers=int(config.num_hidden_layers),
        num_vocabulary=int(config.vocab_size),
        trained=trained,
        targets=tuple(sorted({n.removeprefix("base_model.model.").rsplit(".", 2)[0] for n in live if ".lora_" in n})),
        activation_bytes=saved,
        checkpointed_bytes=float(config.num_hidden_layers * config.hidden_size * dtype.itemsize),
        layer_bytes=saved / config.num_hidden_layers,
        shares=tuple(parted),
    )


def empty_model(folder: Path, family: str) -> PreTrainedModel:
    """Build the model on the meta device, without weights.

    Args:
        folder: A model folder; config.json alone is read.
        family: As `family_of` names it.

    Raises:
        FedmllmError: config.json is not that of an image-text-to-text model.
    """
    try:
        with torch.device("meta"), quiet():
            if family in OURS:
                from fedmllm.backbones.minicpmv2.model import MiniCPMV2Config, MiniCPMV2ForConditionalGeneration

                ours = MiniCPMV2Config.from_pretrained(str(folder), local_files_only=True)
                return MiniCPMV2ForConditionalGeneration(ours)
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
            config.quantization_config = None  # four-bit weights are counted here, not made
            return cast("PreTrainedModel", AutoModelForImageTextToText.from_config(config))
    except LOADING_ERRORS as error:
        raise FedmllmError(f"{folder / 'config.json'}: a model ({family}) cannot be built from it: {error}") from error


def _parts(model: PreTrainedModel, family: str, spec: BackboneSpec) -> tuple[MemoryPart, ...]:
    decoder = decoder_name(model)
    shared = decoder.rsplit(".", 1)[0] + "."  # "model." or "llm."
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    small = {id(p) for p in _quantized(model, family, spec)}
    sizes: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():  # tied ones come once
        if any(parameter is p for p in embeddings.parameters()):
            group = "embeddings"
        elif head is not None and any(parameter is p for p in head.parameters()):
            group = "language-model head"
        elif name.startswith(decoder + "."):
            group = "language model"
        else:
            group = name.removeprefix(shared).split(".")[0]
        each = NF4_BYTES if id(parameter) in small else _plain_bytes(spec)
        weights = sizes.setdefault(group, [0, 0])
        weights[0] += parameter.numel()
        weights[1] += parameter.numel() * each
    return tuple(MemoryPart(group, int(count), round(num_bytes)) for group, (count, num_bytes) in sizes.items())


def _plain_bytes(spec: BackboneSpec) -> int:
    if spec.precision.base == "nf4":
        return nf4.compute_dtype(device_named(spec.device)).itemsize
    return DTYPES[spec.precision.base].itemsize


def _quantized(model: PreTrainedModel, family: str, spec: BackboneSpec) -> Iterator[Tensor]:
    """Weights that are held in four bits: those of linear layers except the head and those that the family leaves alone."""
    if spec.precision.base != "nf4":
        return
    skipped = {*nf4.SKIPPED.get(family, ["lm_head"]), *spec.lora.train_extra}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not skipped & set(name.split(".")):
            yield module.weight


# --- activations


class _FusedAttention(torch.autograd.Function):
    """Fused attention for autograd: queries, keys, values and the result are saved, an L x L matrix is not."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


def _attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    output = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def _fused_attention(config: Any) -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS.register("fedmllm_fused", _attention)
    before, config._attn_implementation = config._attn_implementation, "fedmllm_fused"
    try:
        yield
    finally:
        config._attn_implementation = before


def _saved_bytes(decoder: nn.Module, width: int, dtype: torch.dtype, seeds: Seeds) -> int:
    """Bytes that autograd saves in one forward pass over `PROBE_TOKENS`: each storage once, without weights and buffers."""
    own = {t.untyped_storage()._cdata for t in [*decoder.parameters(), *decoder.buffers()]}
    found: dict[int, tuple[int, Any]] = {}  # a reference to the storage, so that its address is not used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        seeds.set(torch.zeros(1, dtype=torch.int64, device="meta")),
        _fused_attention(decoder.config),
        quiet(),
    ):
        embeds = torch.empty(1, PROBE_TOKENS, width, dtype=dtype, device="meta")
        decoder(inputs_embeds=embeds, attention_mask=_mask(decoder.config, dtype), use_cache=False)
    return sum(num_bytes for key, (num_bytes, _) in found.items() if key not in own)


def _mask(config: Any, dtype: torch.dtype) -> Any:
    """A ready mask: making one reads values, and meta tensors have none."""
    if "linear_attention" in (getattr(config, "layer_types", None) or []):
        return dict.fromkeys(("full_attention", "linear_attention", "sliding_attention"))
    return torch.empty(1, 1, PROBE_TOKENS, PROBE_TOKENS, dtype=dtype, device="meta")
