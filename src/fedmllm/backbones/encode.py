"""Conversations as tokens and pixels, by the processor of any family.

The prompt alone goes through the processor, with the generation prompt; the answer's ids and the token that ends a
turn are appended. So training, scoring and generation share one boundary, and labels need no search.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import ProcessorMixin

from fedmllm.backbones.base import Row
from fedmllm.backbones.cache.prompt_memory import PromptMemory
from fedmllm.backbones.plain_text import PlainText
from fedmllm.core.errors import DataError, FedmllmError
from fedmllm.core.images import CANVAS, FEATURES, open_image
from fedmllm.core.types import Conversation, Picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

IGNORED = -100  # the label of a token that is not learned
_PROBE = "zqxj"  # an answer that no chat template contains


class Encoder:
    """Encoder of one model's rows.

    Args:
        model: Its signatures say which inputs its tower and its language model read.
        processor: The family's processor, with a tokenizer and a chat template.
        max_tokens: Longest row.
        has_features: True for a row whose image features are cached, so that its pixels may be evicted.
        num_vectors: Number of vectors that the tower gives for a row's pictures.

    Raises:
        FedmllmError: The chat template and the tokenizer have no token that ends an answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        max_tokens: int,
        has_features: Callable[[Row], bool],
        num_vectors: Callable[[Row], int],
    ) -> None:
        self.processor, self.max_tokens, self._num_vectors = processor, max_tokens, num_vectors
        self.tokenizer = processor.tokenizer
        self.family = str(model.config.model_type)
        inner = model.base_model
        self.image_arguments = set(inspect.signature(inner.get_image_features).parameters) - {"kwargs"}
        self.token_arguments = set(inspect.signature(inner.forward).parameters) & {
            "mm_token_type_ids",
            "token_type_ids",
        }
        # M-RoPE positions (Qwen-VL, GLM-V, ...) depend on the pictures' grids: found once a row, not once a pass
        self.rope_index: Callable[..., tuple[Tensor, Tensor]] | None = getattr(inner, "get_rope_index", None)
        self._plain = PlainText(processor)
        self._doubles_bos = self._bos() if isinstance(processor, ProcessorMixin) else ""
        template = str(getattr(processor, "chat_template", None) or self.tokenizer.chat_template)
        # the answer is learned and scored, not thoughts before it: thinking is switched off
        self._direct = {"enable_thinking": False} if "enable_thinking" in template else {}
        self.end_of_turn = self._end_of_turn()
        self._memory = PromptMemory(has_features, processor, max_tokens, model.config.to_json_string())

    def prompt(self, prompt: Conversation) -> Row:
        """The row up to where the model would begin to answer; `labels` ignore all of it.

        Raises:
            DataError: A picture cannot be read.
            FedmllmError: It is longer than `max_tokens`, or the template has no slot for a picture.
        """
        return self._memory.row(prompt, self._prompt)

    def _prompt(self, prompt: Conversation) -> Row:
        paths = [picture.path for picture in prompt.pictures]
        pictures = [_canvas() if _is_imagined(path) else open_image(path) for path in paths]
        output = self._process(prompt, pictures)
        ids = output["input_ids"][0]
        images = {k: v for k, v in output.items() if k in self.image_arguments and isinstance(v, Tensor)}
        if pictures and not images:
            raise FedmllmError(
                f"the chat template of {self.family} has no slot for the {len(pictures)} pictures of this prompt"
            )
        per_token = {k: output[k][0] for k in self.token_arguments if k in output}
        if self.rope_index is not None:
            per_token["position_ids"] = self._positions(ids, images, per_token)
        self._check_length(len(ids), prompt)
        imagined = self._imagined(paths)
        made = {f"imagined.{i}": part for i, part in enumerate(imagined) if isinstance(part, Tensor)}
        digest = _digest({**images, **made})
        return Row(ids, torch.full_like(ids, IGNORED), images, digest, per_token, imagined)

    def answered(self, row: Row, answer_ids: list[int]) -> Row:
        """`row` with `answer_ids` behind it, and labels on them."""
        answer = torch.tensor(answer_ids, dtype=torch.int64)
        return Row(
            torch.cat([row.input_ids, answer]),
            torch.cat([row.labels, answer]),
            row.images,
            row.image_key,
            {key: _extend(key, value, len(answer_ids)) for key, value in row.per_token.items()},
            row.imagined,
        )

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of an answer; a string in it that looks like a control token stays text."""
        return self._plain.ids(answer)

    def encode(self, prompt: Conversation, answer: str) -> Row:
        """The row of `prompt` with its answer and the end of the turn as labels. Raises as `prompt` does."""
        row = self.answered(self.prompt(prompt), [*self.answer_ids(answer), self.end_of_turn])
        self._check_length(row.num_tokens, prompt)
        return row

    def decode(self, ids: list[int]) -> str:
        """Text of generated tokens, without control tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    # --- the parts

    def _imagined(self, paths: Sequence[Path]) -> tuple[Tensor | int, ...]:
        """For each picture its imagined features [Q, D], or the number of its own; () if none is imagined."""
        if not any(map(_is_imagined, paths)):
            return ()
        return tuple(
            load_file(path)["vectors"]
            if _is_imagined(path)
            else self._num_vectors(self.prompt(Conversation((Picture(path), "?"))))
            for path in paths
        )

    def _text(self, prompt: Conversation) -> str:
        parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in prompt.parts]
        return self._render([{"role": "user", "content": parts}], add_generation_prompt=True)

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "tokenize": False, **self._direct}
        return str(self.processor.apply_chat_template(messages, **options))

    def _process(self, prompt: Conversation, pictures: list[Image]) -> dict[str, Any]:
        hidden_prompt, hidden = self._plain.hide(prompt)
        text = self._text(hidden_prompt)
        options = {"add_special_tokens": False} if self._doubles_bos and text.startswith(self._doubles_bos) else {}
        images = {"images": [pictures]} if pictures else {}
        try:
            output = self._plain.processor(hidden)(text=[text], **images, return_tensors="pt", **options)
        except ValueError as error:
            names = [str(picture.path) for picture in prompt.pictures]
            raise DataError(f"{self.family} cannot read this prompt, pictures {names}: {error}") from error
        return self._plain.restore(dict(output), hidden)

    def _bos(self) -> str:
        """The token that the tokenizer writes before every text, as the template may have done already; "" = none."""
        written = self.tokenizer("?")["input_ids"][0] == self.tokenizer.bos_token_id
        return str(self.tokenizer.bos_token) if written else ""

    def _positions(self, ids: Tensor, images: dict[str, Tensor], per_token: dict[str, Tensor]) -> Tensor:
        """[3, L]: temporal, height, width."""
        if not images:
            return torch.arange(len(ids)).expand(3, -1)
        assert self.rope_index is not None
        wanted = set(inspect.signature(self.rope_index).parameters)
        extra = {k: v for k, v in {**images, **{k: v[None] for k, v in per_token.items()}}.items() if k in wanted}
        return self.rope_index(input_ids=ids[None], **extra)[0][:, 0]

    def _check_length(self, length: int, prompt: Conversation) -> None:
        if length > self.max_tokens:
            raise FedmllmError(
                f"a row has {length} tokens, over max_tokens = {self.max_tokens}; it is never cut (its pictures: "
                f"{[p.path.name for p in prompt.pictures]}, its text begins {prompt.text[:60]!r}): "
                "raise backbone.max_tokens, or shorten the text"
            )

    def _end_of_turn(self) -> int:
        """The special token that the chat template writes behind an answer, otherwise the tokenizer's EOS."""
        user = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": _PROBE}]}
        text = self._render([user, answer], add_generation_prompt=False)
        after = self.tokenizer(text[text.rfind(_PROBE) + len(_PROBE) :].lstrip(), add_special_tokens=False)["input_ids"]
        if _PROBE in text and after and after[0] in self.tokenizer.all_special_ids:
            return int(after[0])
        if self.tokenizer.eos_token_id is None:
            raise FedmllmError(
                f"{self.family}: neither its chat template nor its tokenizer names a token that ends an answer"
            )
        return int(self.tokenizer.eos_token_id)


def _extend(key: str, value: Tensor, num: int) -> Tensor:
    """Token types of an answer are 0 (text); positions count on from the largest."""
    tail = (
        value.new_zeros(num)
        if key != "position_ids"
        else value.max() + 1 + torch.arange(num).expand(*value.shape[:-1], -1)
    )
    return torch.cat([value, tail], dim=-1)


def _is_imagined(path: Path) -> bool:
    """True for a file that holds features in place of a picture."""
    return path.suffix == FEATURES


def _canvas() -> Image:
    from PIL import Image

    return Image.new("RGB", (CANVAS, CANVAS), "white")


def _digest(images: dict[str, Tensor]) -> str:
    if not images:
        return ""
    h = hashlib.sha256()
    for name in sorted(images):
        tensor = images[name].contiguous()
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        h.update(tensor.view(torch.uint8).numpy().data if tensor.ndim else tensor.numpy().tobytes())
    return h.hexdigest()
