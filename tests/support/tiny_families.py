"""A model folder of each family, tiny and random, laid out as on the hub; made without any download."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from fedmllm.backbones.hf import TransformersBackbone
from support.family_configs import FAMILIES, MROPE

__all__ = ["FAMILIES", "NEEDS", "PORTS", "TWO_BILLION", "stirred", "write"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(named: Mapping[str, str], eos: str = "<|im_end|>", bos: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes as tokens, then the chat tokens, then `named` ones, which become attributes as processors expect."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    chat = ["<pad>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<bos>"]
    plain.add_special_tokens([*chat, *named.values()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=eos, pad_token="<pad>", bos_token=bos, extra_special_tokens=dict(named)
    )
    fast.add_special_tokens({"additional_special_tokens": chat[1:]}, replace_extra_special_tokens=False)
    return fast


NEEDS = {"smolvlm": "num2words"}  # what a family's processor imports
PORTS = {"minicpmv2.6": "minicpmv26", "minicpm-llama3-v2.5": "minicpmllama3v25"}  # their folders in ../shared/parity


TWO_BILLION = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 16}


def write(family: str, folder: Path, tied: bool = False, sizes: Mapping[str, int] | None = None) -> Path:
    """The folder of a random model, whose weights are large enough that every input moves its logits.

    `sizes` replaces those of the language model.
    """
    make, named = FAMILIES[family]
    words = tokenizer(named, bos="<bos>" if family == "gemma3" else None)
    ids = {key: words.convert_tokens_to_ids(token) for key, token in named.items()}
    ids |= {"size": len(words), "<pad>": words.pad_token_id, "<bos>": words.convert_tokens_to_ids("<bos>")}
    ids["\n"] = words.convert_tokens_to_ids("\u010a")  # the newline byte, as byte-level tokenizers write it
    parts = make(ids)
    if sizes:
        _resize(parts["config"], sizes)
    words.save_pretrained(folder)
    end = "<end_of_utterance>" if family == "smolvlm" else "<|im_end|>"
    template = CHATML.replace("IMAGE", parts["slot"]).replace("<|im_end|>", end)
    (folder / "chat_template.jinja").write_text(("{{ bos_token }}" if family == "gemma3" else "") + template)
    (folder / "preprocessor_config.json").write_text(json.dumps(parts["pictures"]))
    (folder / "processor_config.json").write_text(json.dumps(parts["processor"]))
    config = AutoConfig.for_model(family, **{**parts["config"], **({"tie_word_embeddings": True} if tied else {})})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        _randomize(model)
    model.save_pretrained(folder)
    return folder


def _resize(config: dict[str, Any], sizes: Mapping[str, int]) -> None:
    """In place: the language model's sizes, and those of the tower that must agree."""
    config["text_config"].update(
        sizes, vocab_size=151_936 if sizes["hidden_size"] > 1000 else config["text_config"]["vocab_size"]
    )
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    config["text_config"]["rope_parameters"] = MROPE | {"mrope_section": [head // 8, head * 3 // 16, head * 3 // 16]}
    config["vision_config"]["hidden_size"] = sizes["hidden_size"]


def _randomize(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 / math.sqrt(parameter.shape[-1]))
        else:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)


def stirred(backbone: TransformersBackbone) -> TransformersBackbone:
    """With LoRA that does something: B drawn instead of zero."""
    generator = torch.Generator().manual_seed(1)
    drawn = {
        n: torch.randn(t.shape, generator=generator) * 0.1 if ".lora_B." in n else t for n, t in backbone.lora().items()
    }
    backbone.set_lora(drawn)
    return backbone
