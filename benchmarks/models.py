"""A random LLaVA of about 124 million weights with the embedded model's tokenizer: speed does not ask for sense."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from fedmllm.backbones.tiny import CHECKPOINTS

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def hundred_million(folder: Path) -> None:
    """SigLIP of 12 x 384 on 112 x 112 pictures (64 tokens) and Qwen2 of 12 x 768, vocabulary 32,000."""
    words = PreTrainedTokenizerFast(
        tokenizer_file=str(CHECKPOINTS[1] / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>"]})
    words.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    pictures = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 112, "width": 112}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    processor = {"processor_class": "LlavaProcessor", "patch_size": 14, "vision_feature_select_strategy": "full"}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    text = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    text |= {"num_key_value_heads": 12, "vocab_size": 32000, "tie_word_embeddings": False}
    vision = {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 12, "num_attention_heads": 6}
    config = AutoConfig.for_model(
        "llava",
        vision_config={"model_type": "siglip_vision_model", **vision, "image_size": 112, "patch_size": 14},
        text_config={"model_type": "qwen2", **text},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=64,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
