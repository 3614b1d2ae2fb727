"""A DINOv2 tower and a Llama language model in transformers' InternVL form.

InternVL's vision model has DINOv2's parts under other names: class token, absolute positions, layer scale and a final norm.
So both parts compute what they compute alone; only the projector between them is new.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from fedmllm.backbones.build_vlm.sources import Language, Tower
from fedmllm.core.errors import ConfigError
from fedmllm.core.storage import apply_umask

TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SHUFFLE = 2  # pixel shuffle: SHUFFLE x SHUFFLE patches become one image token
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # as DINOv2 was trained
PROJECTOR = "model.multi_modal_projector."
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NAMES = (  # DINOv2's names, on the hub and in transformers 5 -> InternVL's
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attention.projection_layer."),
    (r"\.layer_scale1\.lambda1$", ".lambda_1"),
    (r"\.layer_scale2\.lambda1$", ".lambda_2"),
)


def image_tokens(tower: Tower, image_size: int) -> int:
    """Tokens of a picture of `image_size` pixels a side.

    Raises:
        ConfigError: The size is not a multiple of the patch size times `SHUFFLE`.
    """
    unit = tower.config.patch_size * SHUFFLE
    if image_size < unit or image_size % unit:
        raise ConfigError(f"build-vlm --image-size: got {image_size}; it must be a multiple of {unit}")
    return int((image_size // unit) ** 2)


def tokenizer_of(language: Language) -> PreTrainedTokenizerFast:
    """The language model's tokenizer with the tokens of pictures and a chat template that writes them."""
    own = language.tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=own.backend_tokenizer,
        bos_token=own.bos_token,
        eos_token="<|im_end|>",
        pad_token=own.pad_token or own.eos_token,
        unk_token=own.unk_token,
        extra_special_tokens=dict(TOKENS),
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def assemble(tower: Tower, language: Language, image_size: int, seed: int) -> InternVLForConditionalGeneration:
    """The joint model in float32, with a projector that is drawn from `seed`.

    Raises:
        ConfigError: `image_size` does not fit the tower.
    """
    tokens = image_tokens(tower, image_size)
    tokenizer = tokenizer_of(language)
    text = language.config.to_dict() | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    text |= {"pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": language.config.tie_word_embeddings}
    config = InternVLConfig(
        vision_config=_vision(tower, image_size),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(TOKENS["context_image_token"]),
        image_seq_length=tokens,
        downsample_ratio=1 / SHUFFLE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
    weights = {f"model.vision_tower.{n}": t for n, t in tower_weights(tower, image_size).items()}
    for name, tensor in language.weights.items():
        grown = _grown(tensor, len(tokenizer)) if name in ("model.embed_tokens.weight", "lm_head.weight") else tensor
        weights[name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name] = grown
    weights |= {n: t for n, t in model.state_dict().items() if n.startswith(PROJECTOR)}
    model.load_state_dict(weights)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def _vision(tower: Tower, image_size: int) -> dict[str, Any]:
    own = tower.config
    return {
        "hidden_size": own.hidden_size,
        "num_hidden_layers": own.num_hidden_layers,
        "num_attention_heads": own.num_attention_heads,
        "intermediate_size": own.hidden_size * own.mlp_ratio,
        "hidden_act": own.hidden_act,
        "layer_norm_eps": own.layer_norm_eps,
        "attention_bias": own.qkv_bias,
        "image_size": [image_size, image_size],
        "patch_size": [own.patch_size, own.patch_size],
        "use_mean_pooling": False,  # otherwise InternVL has no final norm
        "use_mask_token": False,
        "norm_type": "layer_norm",
    }


def tower_weights(tower: Tower, image_size: int) -> dict[str, Tensor]:
    """State dict of `InternVLVisionModel`, with positions for pictures of `image_size`, interpolated as DINOv2 does."""
    renamed = {}
    for name, tensor in tower.weights.items():
        if name == "embeddings.mask_token":
            continue
        for pattern, new in _NAMES:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    positions = renamed["embeddings.position_embeddings"]
    side, new_side = round((positions.shape[1] - 1) ** 0.5), image_size // tower.config.patch_size
    if side != new_side:
        grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
        flat = grid.permute(0, 2, 3, 1).reshape(1, new_side**2, -1)
        renamed["embeddings.position_embeddings"] = torch.cat([positions[:, :1], flat], dim=1)
    return renamed


def _grown(embeddings: Tensor, size: int) -> Tensor:
    """Rows for the new tokens, each the mean of all: they are not trained, and no answer contains them."""
    mean = embeddings.mean(dim=0, keepdim=True)
    return torch.cat([embeddings, mean.expand(size - len(embeddings), -1)])


def write_processor(model: InternVLForConditionalGeneration, language: Language, folder: Path) -> None:
    """Write all files of the model folder but the weights: configuration, tokenizer, chat template, image settings."""
    folder.mkdir(parents=True, exist_ok=True)
    size, patch = model.config.vision_config.image_size[0], model.config.vision_config.patch_size[0]
    tokenizer_of(language).save_pretrained(str(folder))
    pictures = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": size, "width": size},
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 1,
        "resample": 3,
        **IMAGENET,
    }
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": (size // patch // SHUFFLE) ** 2}
    for name, table in (("preprocessor_config.json", pictures), ("processor_config.json", processor)):
        (folder / name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    model.config.save_pretrained(str(folder))


def write_weights(model: InternVLForConditionalGeneration, folder: Path, dtype: torch.dtype) -> None:
    """Write the weights; the model has type `dtype` afterwards."""
    model.to(dtype).save_pretrained(str(folder))
    apply_umask(folder)
