"""Prompts as tokens and pixels, kept in this process across evaluations and experiments: made once a row."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

from fedmllm.backbones import Row
from fedmllm.types import Conversation

KEPT_BYTES = 256 * 2**20  # of all models together; the least recently used go first

Key = tuple[Any, ...]


class PromptMemory:
    """The rows of one processor. A picture that changes on disk is another picture."""

    _kept: ClassVar[OrderedDict[Key, Row]] = OrderedDict()  # one for the process
    _num_bytes: ClassVar[int] = 0

    def __init__(self, processor: Any, *settings: Any) -> None:
        self._scope = _fingerprint(processor, settings)

    def row(self, prompt: Conversation, make: Callable[[Conversation], Row]) -> Row:
        """The kept row of the prompt, or `make(prompt)`, which is kept."""
        try:
            stats = [picture.path.stat() for picture in prompt.pictures]
        except OSError:
            return make(prompt)  # which says what is wrong with the picture
        key = (self._scope, prompt, *((s.st_size, s.st_mtime_ns) for s in stats))
        if key not in self._kept:
            self._keep(key, make(prompt))
        self._kept.move_to_end(key)
        return self._kept[key]

    @classmethod
    def _keep(cls, key: Key, row: Row) -> None:
        cls._kept[key] = row
        cls._num_bytes += row.num_bytes
        while cls._num_bytes > KEPT_BYTES and len(cls._kept) > 1:
            cls._num_bytes -= cls._kept.popitem(last=False)[1].num_bytes


def _fingerprint(processor: Any, settings: tuple[Any, ...]) -> str:
    """Equal for processors that make the same rows; a tokenizer that cannot be written down is equal to itself alone."""
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else f"object {id(processor.tokenizer)}"
    pictures = getattr(processor, "image_processor", None) or getattr(processor, "settings", None)
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    text = "\x1f".join(map(str, (type(processor), words, template, pictures, _plain_settings(processor), settings)))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain_settings(processor: Any) -> list[tuple[str, Any]]:
    """A processor's own plain settings: image_seq_length, patch_size."""
    return sorted((k, v) for k, v in vars(processor).items() if isinstance(v, int | float | str | bool))
