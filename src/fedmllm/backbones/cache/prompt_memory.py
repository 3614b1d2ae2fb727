"""Cache of encoded prompts across the evaluations and experiments of a process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, ClassVar

from fedmllm.backbones.base import Row
from fedmllm.backbones.cache.bounded import RowCache
from fedmllm.core.types import Conversation

CACHE_BYTES = 256 * 2**20  # of all models together; the least recently used go first


class PromptMemory:
    """The rows of one processor. A picture that changes on disk is another picture.

    Args:
        has_features: True for a row whose pixels this model does not need any more.
        processor: The processor that makes the rows.
        settings: Further settings that rows depend on.
    """

    _cache: ClassVar[RowCache] = RowCache(CACHE_BYTES)  # one for the process

    def __init__(self, has_features: Callable[[Row], bool], processor: Any, *settings: Any) -> None:
        self._scope, self._has_features = _fingerprint(processor, settings), has_features

    def row(self, prompt: Conversation, make: Callable[[Conversation], Row]) -> Row:
        """The cached row of the prompt, without pixels if they are not needed, or `make(prompt)`, which is cached."""
        try:
            stats = [picture.path.stat() for picture in prompt.pictures]
        except OSError:
            return make(prompt)  # raises the error about the picture
        key = (self._scope, prompt, *((s.st_size, s.st_mtime_ns) for s in stats))
        row = self._cache.get(key)
        if row is None or not (row.images or self._has_features(row)):  # another model did not need the pixels
            row = make(prompt)
            self._cache.put(key, row, self._evictable)
        return row

    def _evictable(self, key: Any, row: Row) -> bool:
        return bool(key[0] == self._scope) and self._has_features(row)


def _fingerprint(processor: Any, settings: tuple[Any, ...]) -> str:
    """Equal for processors that make the same rows; a tokenizer that cannot be serialized equals itself alone."""
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else f"object {id(processor.tokenizer)}"
    pictures = getattr(processor, "image_processor", None) or getattr(processor, "settings", None)
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    text = "\x1f".join(map(str, (type(processor), words, template, pictures, _plain_settings(processor), settings)))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain_settings(processor: Any) -> list[tuple[str, Any]]:
    """A processor's own plain settings: image_seq_length, patch_size."""
    return sorted((k, v) for k, v in vars(processor).items() if isinstance(v, int | float | str | bool))
