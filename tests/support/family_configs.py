"""config.json, preprocessor_config.json and processor_config.json of each family, as small as it allows.

A maker gets the ids of the family's special tokens and returns the three files, and what its chat template writes for a
picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": False}
SIGLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7}
SIGLIP |= {"image_size": 28}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_PICTURES = {"patch_size": 7, "temporal_patch_size": 2, "merge_size": 2}
QWEN_PICTURES |= {"size": {"shortest_edge": 14 * 14 * 4, "longest_edge": 28 * 42}}


def _siglip(named: Mapping[str, int]) -> dict[str, Any]:
    return {
        "vision_config": {"model_type": "siglip_vision_model", **SIGLIP},
        "text_config": {"model_type": "qwen2", "vocab_size": named["size"], **TEXT},
    }


def llava(ids: Mapping[str, int]) -> dict[str, Any]:
    pictures = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}}
    config = {**_siglip(ids), "image_token_index": ids["image_token"], "vision_feature_select_strategy": "full"}
    return {
        "config": {**config, "vision_feature_layer": -1, "image_seq_length": 16},
        "pictures": pictures,
        "processor": {"processor_class": "LlavaProcessor", "patch_size": 7, "vision_feature_select_strategy": "full"},
        "slot": "<image>",
    }


def _qwen(ids: Mapping[str, int], vision: dict[str, Any], text: dict[str, Any], name: str) -> dict[str, Any]:
    text = {**TEXT, "vocab_size": ids["size"], "rope_parameters": MROPE, "bos_token_id": None, **text}
    config = {"vision_config": vision, "text_config": text}
    config |= {f"{key}_id": ids[key] for key in ("image_token", "video_token")}
    config |= {f"vision_{end}_token_id": ids[f"vision_{end}_token"] for end in ("start", "end")}
    return {
        "config": config,
        "pictures": {"image_processor_type": "Qwen2VLImageProcessor", **QWEN_PICTURES},
        "processor": {"processor_class": name},
        "slot": "<|vision_start|><|image_pad|><|vision_end|>",
    }


def qwen2_vl(ids: Mapping[str, int]) -> dict[str, Any]:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 7, "mlp_ratio": 2}
    return _qwen(ids, vision, {}, "Qwen2VLProcessor")


def qwen2_5_vl(ids: Mapping[str, int]) -> dict[str, Any]:
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 7}
    vision |= {"intermediate_size": 48, "window_size": 28, "fullatt_block_indexes": [1]}
    return _qwen(ids, vision, {}, "Qwen2_5_VLProcessor")


def _qwen3_vision(**more: Any) -> dict[str, Any]:
    sizes = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 7}
    return {**sizes, "intermediate_size": 48, "num_position_embeddings": 16, **more}


def qwen3_vl(ids: Mapping[str, int]) -> dict[str, Any]:
    text = {"head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    return _qwen(ids, _qwen3_vision(deepstack_visual_indexes=[0]), text, "Qwen3VLProcessor")


def _hybrid() -> dict[str, Any]:
    """Qwen3.5's text model: a layer of linear attention, then one of full attention."""
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    return {
        **sizes,
        "linear_value_head_dim": 16,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
        | {"mrope_section": [2, 3, 3], "mrope_interleaved": True},
    }


def qwen3_5(ids: Mapping[str, int]) -> dict[str, Any]:
    return _qwen(ids, _qwen3_vision(), _hybrid(), "Qwen3VLProcessor")


def minicpmv4_6(ids: Mapping[str, int]) -> dict[str, Any]:
    text = {"model_type": "qwen3_5_text", **TEXT, "vocab_size": ids["size"], **_hybrid()}
    vision = {**SIGLIP, "image_size": 56}
    config = {"vision_config": vision, "text_config": text, "insert_layer_id": 0}
    config |= {f"{key}_id": ids[key] for key in ("image_token", "video_token")}
    pictures = {"image_processor_type": "MiniCPMV4_6ImageProcessor", "scale_resolution": 28, "patch_size": 7}
    return {
        "config": config,
        "pictures": {**pictures, "max_slice_nums": 4},
        "processor": {"processor_class": "MiniCPMV4_6Processor"},
        "slot": "<|image_pad|>",
    }


def smolvlm(ids: Mapping[str, int]) -> dict[str, Any]:
    text = {"model_type": "llama", **TEXT, "vocab_size": ids["size"], "pad_token_id": ids["<pad>"]}
    pictures = {"image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 56}}
    return {
        "config": {"vision_config": SIGLIP, "text_config": text, "image_token_id": ids["image_token"]},
        "pictures": {**pictures, "max_image_size": {"longest_edge": 28}},
        "processor": {"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
        "slot": "<image>",
    }


def internvl(ids: Mapping[str, int]) -> dict[str, Any]:
    text = {"model_type": "qwen2", **TEXT, "vocab_size": ids["size"]}
    config = {"vision_config": {**SIGLIP, "image_size": [28, 28], "patch_size": [7, 7]}, "text_config": text}
    config |= {"image_token_id": ids["context_image_token"], "image_seq_length": 4, "downsample_ratio": 0.5}
    pictures = {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 28, "width": 28}}
    return {
        "config": {**config, "tie_word_embeddings": False},
        "pictures": {**pictures, "crop_to_patches": True, "max_patches": 3, "min_patches": 1},
        "processor": {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        "slot": "<IMG_CONTEXT>",
    }


def gemma3(ids: Mapping[str, int]) -> dict[str, Any]:
    text = {**TEXT, "vocab_size": ids["size"], "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "bos_token_id": ids["<bos>"]}
    config = {"vision_config": {"model_type": "siglip_vision_model", **SIGLIP}, "text_config": text}
    config |= {f"{key}_index": ids[key] for key in ("image_token", "boi_token", "eoi_token")}
    pictures = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}}
    return {
        "config": {**config, "mm_tokens_per_image": 4, "tie_word_embeddings": False},
        "pictures": pictures,
        "processor": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        "slot": "<start_of_image>",
    }


def minicpmv4_7(ids: Mapping[str, int]) -> dict[str, Any]:
    """4.6 with positions that lie on the picture's canvas."""
    parts = minicpmv4_6(ids)
    marks = {f"{word}_{end}_id": ids[f"{word}_{end}_token"] for word in ("image", "slice") for end in ("start", "end")}
    config = {**parts["config"], **marks, "newline_id": ids["\n"]}
    return {**parts, "config": config, "processor": {"processor_class": "MiniCPMV4_7Processor"}}


def llava_next(ids: Mapping[str, int]) -> dict[str, Any]:
    parts, pinpoints = llava(ids), [[28, 56], [56, 28]]
    pictures = {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 28}}
    pictures |= {"crop_size": {"height": 28, "width": 28}, "image_grid_pinpoints": pinpoints}
    return {
        **parts,
        "config": {**parts["config"], "image_grid_pinpoints": pinpoints},
        "pictures": pictures,
        "processor": {**parts["processor"], "processor_class": "LlavaNextProcessor"},
    }


QWEN_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
QWEN_TOKENS |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
MINICPM_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
MINICPM_TOKENS |= {f"{w}_{e}_token": f"<{'/' * (e == 'end')}{w}>" for w in ("image", "slice") for e in ("start", "end")}
MINICPM_TOKENS |= {"image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}
INTERN_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
GEMMA_TOKENS = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
SMOL_TOKENS = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
SMOL_TOKENS |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
FAMILIES: dict[str, tuple[Callable[[Mapping[str, int]], dict[str, Any]], dict[str, str]]] = {
    "minicpmv4_6": (minicpmv4_6, MINICPM_TOKENS),
    "qwen2_vl": (qwen2_vl, QWEN_TOKENS),
    "qwen2_5_vl": (qwen2_5_vl, QWEN_TOKENS),
    "qwen3_vl": (qwen3_vl, QWEN_TOKENS),
    "qwen3_5": (qwen3_5, QWEN_TOKENS),
    "smolvlm": (smolvlm, SMOL_TOKENS),
    "llava": (llava, {"image_token": "<image>"}),
    "internvl": (internvl, {**INTERN_TOKENS, "video_token": "<video>"}),
    "gemma3": (gemma3, GEMMA_TOKENS),
    "minicpmv4_7": (minicpmv4_7, MINICPM_TOKENS),
    "llava_next": (llava_next, {"image_token": "<image>"}),
}
