"""MiniCPM-V 2.6 and MiniCPM-Llama3-V 2.5 for transformers 5, without remote code.

Sources: openbmb/MiniCPM-V-2_6 and openbmb/MiniCPM-Llama3-V-2_5 (arXiv:2408.01800), written from their behaviour;
`tests/backbones/test_minicpmv2.py` compares the logits. The vision encoder is in `vision.py`, the processor of text and
pictures in `processor.py`.

Shapes: B rows, L tokens, S slices of a batch, C = 3 channels, P patch side, X pixels (patches * P) of a slice, Q queries of
the resampler, D width of the language model.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig

from fedmllm.backbones.kv_cache import cache_argument
from fedmllm.backbones.minicpmv2.images import ImageSettings, ImageSlices
from fedmllm.backbones.minicpmv2.processor import IMAGE_MARK, MiniCPMV2Processor
from fedmllm.backbones.minicpmv2.vision import HEAD_WIDTH, CrossAttention, Resampler, VisionTower
from fedmllm.core.errors import FedmllmError

__all__ = [
    "IMAGE_MARK",
    "ImageSettings",
    "ImageSlices",
    "MiniCPMV2Config",
    "MiniCPMV2ForConditionalGeneration",
    "MiniCPMV2Processor",
]

HUB_VISION = {  # of both models, should a config.json name no tower
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}


class MiniCPMV2Config(PreTrainedConfig):  # type: ignore[misc]
    """The hub's config.json: the language model's fields are at its top level; `text_config` gathers them.

    `version` 2.6 means a Qwen2 language model, 2.5 a Llama. The file written by `save_pretrained` is flat again.
    """

    model_type = "minicpmv"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(AutoConfig, model_type="qwen2"),
        "vision_config": SubConfigSpec(Idefics2VisionConfig),
    }

    version: float | str = 2.6
    text_config: Any = None
    vision_config: Any = None
    query_num: int = 64  # placeholders of a slice
    slice_config: dict[str, Any] | None = (
        None  # a field of the hub's file; the processor reads preprocessor_config.json
    )
    drop_vision_last_layer: bool = False
    batch_vision_input: bool = True  # 2.5 only: whether the slices of a row share one strip of positions
    vision_batch_size: int = 16  # slices that go through the vision tower at once: memory, not results

    def __post_init__(self, **kwargs: Any) -> None:
        if str(self.version) not in ("2.5", "2.6"):
            raise FedmllmError(
                f"config.json: version is {self.version!r}; this port knows 2.5 (Llama 3) and 2.6 (Qwen2)"
            )
        text_class = LlamaConfig if self.on_strip else Qwen2Config
        flat_names = {field.name for field in fields(text_class)} - {field.name for field in fields(PreTrainedConfig)}
        flat = {name: kwargs.pop(name) for name in (flat_names | {"rope_theta", "rope_scaling"}) & kwargs.keys()}
        if self.text_config is None or isinstance(self.text_config, dict):
            self.text_config = text_class(**{**flat, **(self.text_config or {})})
        if self.vision_config is None or isinstance(self.vision_config, dict):
            vision = self.vision_config or HUB_VISION
            # The hub says siglip, siglip_vision_model or idefics2; the layers are the same.
            self.vision_config = Idefics2VisionConfig(**{k: v for k, v in vision.items() if k != "model_type"})
        for name in ("auto_map", "_name_or_path", "transformers_version"):
            kwargs.pop(name, None)  # auto_map points at the hub's remote code
        super().__post_init__(**kwargs)
        if self.hidden_size % HEAD_WIDTH:
            raise FedmllmError(
                f"config.json: hidden_size is {self.hidden_size}; the resampler's heads are {HEAD_WIDTH} wide, "
                f"so it must be a multiple of {HEAD_WIDTH}"
            )

    @property
    def on_strip(self) -> bool:
        """True if a slice's patches lie on one strip of positions (2.5), False if they have rows and columns (2.6)."""
        return str(self.version) == "2.5"

    @property
    def hidden_size(self) -> int:
        return int(self.text_config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.text_config.vocab_size)

    def to_dict(self) -> dict[str, Any]:
        """Flat, as on the hub."""
        values: dict[str, Any] = super().to_dict()
        return {**values.pop("text_config"), **values}


class MiniCPMV2ForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """`vpm` and `resampler` turn slices into vectors that replace the placeholders in the text that `llm` reads.

    `llm.model(inputs_embeds=...)` gives hidden states, `llm.lm_head` their logits. Inputs: see `MiniCPMV2Processor`.
    """

    config_class = MiniCPMV2Config
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[Any] = ["Idefics2EncoderLayer", "Resampler"]
    _skip_keys_device_placement: ClassVar[Any] = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MiniCPMV2Config) -> None:
        super().__init__(config)
        # The tower is not a PreTrainedModel, so transformers does not pass the choice of attention to it.
        config.vision_config._attn_implementation = config._attn_implementation
        self.llm = (LlamaForCausalLM if config.on_strip else Qwen2ForCausalLM)(config.text_config)
        self.vpm = VisionTower(config.vision_config, config.drop_vision_last_layer)
        self.resampler = Resampler(config.query_num, config.hidden_size, config.vision_config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler):
            init.normal_(module.query, std=0.02)
            init.normal_(module.proj, std=module.proj.shape[0] ** -0.5)
        elif isinstance(module, CrossAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a weight that is missing, unexpected or of another shape is an error."""
        kwargs["ignore_mismatched_sizes"] = True  # they are listed then, like the others, and raised below
        model, info = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
        odd = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(odd.values()):
            found = [f"{len(names)} {kind.replace('_', ' ')}: {names[:3]}" for kind, names in odd.items() if names]
            raise FedmllmError(f"{folder}: the weights are not those of its config.json: {'; '.join(found)}")
        llm = model.llm
        if llm.config.tie_word_embeddings and llm.lm_head.weight is not llm.get_input_embeddings().weight:
            raise FedmllmError(
                f"{folder}: config.json has tie_word_embeddings true, but llm.lm_head.weight and "
                "llm.model.embed_tokens.weight differ in the weights: it should be false"
            )
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        module: nn.Module = self.llm.get_input_embeddings()
        return module

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        module: nn.Module = self.llm.get_output_embeddings()
        return module

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.llm.set_output_embeddings(new_embeddings)

    def get_image_features(
        self, pixel_values: Tensor, tgt_sizes: Tensor, slices_per_row: Sequence[int] | None = None
    ) -> Tensor:
        """Pixels [S, C, P, X] and sizes [S, 2] -> [S, Q, D], each slice as if it came alone (2.6).

        2.5 was trained with an attention mask that is true everywhere: a slice attends to its own padding, and its positions
        run along a strip as long as the longest slice of its row. `slices_per_row` has the rows' counts, so that a row does
        not depend on its batch (the original puts one row into a batch); without it, all S slices count as one row.
        """
        sizes = [(int(height), int(width)) for height, width in tgt_sizes.tolist()]
        lengths = self._padded_lengths([height * width for height, width in sizes], slices_per_row)
        patch = pixel_values.shape[2]
        features: dict[int, Tensor] = {}
        # Slices of one length go together: none is padded to the length of another, and the tower needs no mask.
        for length in sorted(set(lengths)):
            members = [index for index, other in enumerate(lengths) if other == length]
            for start in range(0, len(members), self.config.vision_batch_size):
                chunk = members[start : start + self.config.vision_batch_size]
                own = [sizes[index] for index in chunk]
                grids = [(1, length)] * len(chunk) if self.config.on_strip else own
                patches_SNV = self.vpm(pixel_values[chunk, ..., : length * patch], grids)
                features.update(zip(chunk, self.resampler(patches_SNV, own), strict=True))
        return torch.stack([features[index] for index in range(len(sizes))])

    def _padded_lengths(self, lengths: Sequence[int], slices_per_row: Sequence[int] | None) -> list[int]:
        """Length of each slice in the tower, in patches: its own, or (2.5) that of the longest slice of its row."""
        if not (self.config.on_strip and self.config.batch_vision_input):
            return list(lengths)
        counts = [len(lengths)] if slices_per_row is None else list(slices_per_row)
        if sum(counts) != len(lengths):
            raise FedmllmError(f"slices_per_row counts {sum(counts)} slices, tgt_sizes has {len(lengths)}")
        ends = torch.tensor(counts).cumsum(0).tolist()
        return [max(lengths[end - n : end]) for n, end in zip(counts, ends, strict=True) for _ in range(n)]

    def embed(
        self,
        input_ids: Tensor,
        mm_token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tgt_sizes: Tensor | None = None,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, L] -> what the language model reads [B, L, D], with features [S, Q, D] at the places marked 1."""
        embeds_BLD: Tensor = self.get_input_embeddings()(input_ids)
        if pixel_values is None and image_features is None:
            if mm_token_type_ids is not None and bool((mm_token_type_ids == 1).any()):
                raise FedmllmError(
                    "the text has places for image features, but neither pixel_values nor image_features"
                )
            return embeds_BLD
        if mm_token_type_ids is None:
            raise FedmllmError(
                "pictures came without mm_token_type_ids [B, L], which mark the places of their features"
            )
        places_BL = mm_token_type_ids == 1
        per_row = places_BL.sum(1).tolist()
        if image_features is None:
            if pixel_values is None or tgt_sizes is None:
                raise FedmllmError(
                    "pixel_values came without tgt_sizes [S, 2], the slices' heights and widths in patches"
                )
            rows = [count // self.config.query_num for count in per_row]
            if sum(per_row) != len(tgt_sizes) * self.config.query_num:
                raise FedmllmError(
                    f"{sum(per_row)} places for image features, but {len(tgt_sizes)} slices of {self.config.query_num}"
                )
            image_features = self.get_image_features(pixel_values, tgt_sizes, rows)
        if sum(per_row) * embeds_BLD.shape[-1] != image_features.numel():
            raise FedmllmError(f"{sum(per_row)} places for image features of shape {tuple(image_features.shape)}")
        # Out of place: the embeddings may be a leaf that requires grad (gradient checkpointing below frozen weights).
        return embeds_BLD.masked_scatter(places_BL[..., None], image_features.to(embeds_BLD))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,  # the name of `cache` up to transformers 5.23
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tgt_sizes: Tensor | None = None,
        image_features: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """A transformers causal forward pass; pictures as `pixel_values` and `tgt_sizes`, or as cached `image_features`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise FedmllmError("give input_ids or inputs_embeds, one of them")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, mm_token_type_ids, pixel_values, tgt_sizes, image_features)  # type: ignore[arg-type]
        return self.llm(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{cache_argument(self.llm): past_key_values if cache is None else cache},
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Pictures go in with the prompt only; later steps find them in the cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("pixel_values", "tgt_sizes", "image_features"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> Any:
        """Beams repeat rows; a row's slices must follow it as a block, not one by one."""
        names = [n for n in ("pixel_values", "tgt_sizes", "image_features") if kwargs.get(n) is not None]
        packed = {name: kwargs.pop(name) for name in names} if expand_size > 1 else {}
        if packed:
            counts = ((kwargs["mm_token_type_ids"] == 1).sum(1) // self.config.query_num).tolist()
            blocks = torch.split(torch.arange(sum(counts)), counts)
            order = torch.cat([block for block in blocks for _ in range(expand_size)])
            packed = {name: value[order.to(value.device)] for name, value in packed.items()}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, {**kwargs, **packed}
