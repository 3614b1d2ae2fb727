"""Row text as plain tokens, so that data cannot write control tokens.

Tokenizers match their special tokens anywhere in a text, and processors replace the placeholders of pictures in it. So a row
whose text holds `<|im_end|>` would end its own turn, and one whose answer holds `<image>` would ask for a picture. Here such
a string becomes the tokens of its characters. Rows without one are tokenized as ever.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from fedmllm.core.errors import DataError
from fedmllm.core.types import Conversation

SENTINEL = "\ue000fedmllm\ue001"  # stands for a control string until the processor is done; private-use characters


def control_strings(processor: Any) -> list[str]:
    """Strings that this processor or its tokenizer turns into control tokens, the longest first.

    Args:
        processor: Its tokenizer's special tokens count, the placeholders that it names in attributes that end in `_token`,
            and those that it lists in `placeholders`.
    """
    tokenizer = processor.tokenizer
    found = {SENTINEL, *tokenizer.all_special_tokens, *getattr(processor, "placeholders", ())}
    found |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = [getattr(v, "content", v) for name, v in vars(processor).items() if name.endswith("_token")]
    found |= {value for value in named if isinstance(value, str)}
    return sorted((text for text in found if len(text) > 1), key=lambda text: (-len(text), text))


class PlainText:
    """Tokenization of row text in which no string is special.

    Args:
        processor: A family's processor with a `tokenizer`; neither is changed.
    """

    def __init__(self, processor: Any) -> None:
        self._processor, self._tokenizer = processor, processor.tokenizer
        strings = control_strings(processor)
        vocabulary = self._tokenizer.get_vocab()
        self._control_ids = frozenset(vocabulary[text] for text in strings if text in vocabulary)
        self._pattern = re.compile("|".join(map(re.escape, strings)))
        self._with_sentinel: Any = None

    def ids(self, text: str) -> list[int]:
        """The tokens of `text`, without those that a tokenizer puts around a text."""
        if not self._pattern.search(text):
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        if self._control_ids.isdisjoint(ids):
            return ids
        # A placeholder that the tokenizer does not list as special is matched all the same: cut it in two.
        pieces: list[int] = []
        end = 0
        for found in self._pattern.finditer(text):
            for piece in (text[end : found.start()], found[0][0], found[0][1:]):
                pieces += self.ids(piece) if piece else []
            end = found.end()
        return pieces + (self.ids(text[end:]) if text[end:] else [])

    def hide(self, prompt: Conversation) -> tuple[Conversation, list[str]]:
        """`prompt` with a sentinel for each control string in its texts, and these strings in order."""
        hidden: list[str] = []

        def replace(found: re.Match[str]) -> str:
            hidden.append(found[0])
            return SENTINEL

        parts = tuple(self._pattern.sub(replace, p) if isinstance(p, str) else p for p in prompt.parts)
        return Conversation(parts), hidden

    def processor(self, hidden: list[str]) -> Any:
        """The processor for a prompt that `hide` returned: if it holds sentinels, one that reads each as one token."""
        if not hidden:
            return self._processor
        if self._with_sentinel is None:
            self._with_sentinel = copy.copy(self._processor)
            self._with_sentinel.tokenizer = copy.deepcopy(self._tokenizer)
            self._with_sentinel.tokenizer.add_tokens([AddedToken(SENTINEL, normalized=False)])
        return self._with_sentinel

    def restore(self, output: dict[str, Any], hidden: list[str]) -> dict[str, Any]:
        """`output` of `processor(hidden)` with plain tokens in place of the sentinels.

        Args:
            output: Tensors of one row; those of the shape of `input_ids` [1, L] grow with it, by zeros.
            hidden: The strings that the sentinels stand for.

        Raises:
            DataError: The chat template did not write each sentinel once.
        """
        if not hidden:
            return output
        ids = output["input_ids"]
        sentinel = self._with_sentinel.tokenizer.convert_tokens_to_ids(SENTINEL)
        places = (ids[0] == sentinel).nonzero()[:, 0].tolist()
        if len(places) != len(hidden):
            raise DataError(
                f"a text holds the control strings {hidden}, and its chat template writes {len(places)} of {len(hidden)}: "
                "remove them from the row"
            )
        plain = [torch.tensor(self.ids(text), dtype=ids.dtype) for text in hidden]
        grown = dict(output)
        for name, value in output.items():
            if isinstance(value, Tensor) and value.shape == ids.shape:
                fill = plain if name == "input_ids" else [_fill(name, tokens).to(value.dtype) for tokens in plain]
                grown[name] = _spliced(value[0], places, fill)[None]
        return grown


def _fill(name: str, tokens: Tensor) -> Tensor:
    return torch.ones_like(tokens) if name == "attention_mask" else torch.zeros_like(tokens)


def _spliced(row_L: Tensor, places: list[int], pieces: list[Tensor]) -> Tensor:
    """`row_L` with the element at each place replaced by a piece."""
    parts, end = [], 0
    for place, piece in zip(places, pieces, strict=True):
        parts += [row_L[end:place], piece]
        end = place + 1
    return torch.cat([*parts, row_L[end:]])
