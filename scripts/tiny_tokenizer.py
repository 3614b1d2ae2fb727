"""The byte-level BPE of the embedded model, trained on its own corpus, in the layout of MiniCPM-V 2.6's tokenizer.

Any text can be written with it (every byte is a token); the words of the corpus are one token each, and so are the fixed
phrases of the prompt frames: a row's length in tokens is what the embedded world's speed hangs on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<image>", "</image>", "<slice>", "</slice>",
    "<image_id>", "</image_id>",
)  # fmt: skip
PHRASES = (
    r"user\n", r"assistant\n", r"Select the best answer", r" based on the text and image\.\n", r" based on the text\.\n",
    r" based on the image\.\n", r", without considering the modality", r"\nQuestion:", r"Question:", r"\?\nOptions:\n",
    r"\nThe best answer is:", r"Text:", r"\([A-Z]\)",
)  # fmt: skip
# Qwen2's own rule for everything else: words with the space before them, single digits, marks, line ends.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2's template without its system turn, which would be ten tokens that say nothing.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Everyday words, and those of the public sets' class names, so that a user's own questions are not spelt letter by letter.
ENGLISH = """ the a an of in on at to for from by with and or not is are was were be been has have had do does did can this
 that these those there here it its what What which Which where Where who when why how How many much any some all no yes
 left right upper lower side large small normal abnormal seen show shows shown image picture photo text question answer
 type kind part present evidence visible located content category belong people information other relevant damage best
 most more less than between over under near humanitarian affected _individuals infrastructure _and _utility _damage
 injured _or _dead _people missing _found rescue _volunteering _donation _effort vehicle _relevant _information _humanitarian"""


def words(text: str) -> list[str]:
    """Each word as it is met in running text: after a space, unless it continues one with "_"."""
    return [word if word.startswith("_") else f" {word}" for word in text.split()]


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """BPE merges over the corpus, inside phrases, words and marks; never over their edges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join((*PHRASES, QWEN2))), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *words(ENGLISH) * 40], trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json as in the hub's folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "additional_special_tokens": list(SPECIAL[4:]),
        "model_max_length": 2048,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
