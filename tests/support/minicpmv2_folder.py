"""A random MiniCPM-V 2 folder in the hub's layout, and the conversations its tests put to it; made without a download."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from fedmllm.backbones.minicpmv2.model import MiniCPMV2Config, MiniCPMV2ForConditionalGeneration, MiniCPMV2Processor

VERSIONS = ["2.6", "2.5"]


def write_folder(folder: Path, version: str, tied: bool = False) -> Path:
    """A random model in the hub's layout: bytes as tokens; weights large enough that every input moves the logits."""
    marks = ["<pad>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    marks += ["<|eot_id|>", "<unk>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(marks)
    folder.mkdir(parents=True, exist_ok=True)
    plain.save(str(folder / "tokenizer.json"))
    ends = ("<|im_start|>", "<|im_end|>") if version == "2.6" else ("<|begin_of_text|>", "<|eot_id|>")
    tokens = dict(zip(("bos_token", "eos_token"), ends, strict=True)) | {"pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "model_max_length": 4096}))
    pictures = {"version": float(version), "scale_resolution": 56, "patch_size": 7, "image_feature_size": 4}
    pictures |= {"max_slice_nums": 6, "use_image_id": version == "2.6", "processor_class": "MiniCPMVProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    config = MiniCPMV2Config(
        version=float(version) if version == "2.6" else version,
        vocab_size=len(alphabet) + len(marks),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        query_num=4,
        vision_batch_size=3,
        vision_config={"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 3}
        | {"num_hidden_layers": 2, "image_size": 56, "patch_size": 7},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MiniCPMV2ForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
            else:
                nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> tuple[MiniCPMV2ForConditionalGeneration, MiniCPMV2Processor]:
    model = MiniCPMV2ForConditionalGeneration.from_pretrained(folder, **options).eval()
    return model, MiniCPMV2Processor.from_pretrained(folder)


def ask(pictures: list[Any], question: str = "What organ is shown?") -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


ROWS = [
    ask([picture(60, 40)], "Alone?"),
    ask([], "No picture at all, but a rather longer question that fills the row?"),
    ask([picture(150, 90, 1), picture(30, 70, 2)], "Two?"),
    ask([picture(56, 56, 3)], "Square?"),
]


def right_padded(processor: MiniCPMV2Processor, rows: list[Any]) -> Any:
    texts = processor.apply_chat_template(rows, add_generation_prompt=True, tokenize=False)
    pictures = [[p["image"] for p in row[0]["content"] if p["type"] == "image"] for row in rows]
    return processor(text=texts, images=pictures, padding_side="right")
