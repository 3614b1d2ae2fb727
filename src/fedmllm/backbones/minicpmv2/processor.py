"""Processor of MiniCPM-V 2.6 and MiniCPM-Llama3-V 2.5.

Sources: the processors of the hub repositories, re-implemented from their behaviour; `tests/backbones/test_minicpmv2.py`
holds the token ids equal to the original's.

Shapes: B rows, L tokens, S slices of a batch (row by row, image by image, thumbnail first), C = 3 channels, P patch side,
N patches of a slice.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast

from fedmllm.backbones.minicpmv2.images import ImageSettings, ImageSlices, preprocess
from fedmllm.core.errors import FedmllmError

IMAGE_MARK = (
    "(<image>./</image>)"  # stands for a picture in chat text until its slices are known; the original's own mark
)

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_PROMPT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{{ '" + LLAMA3_PROMPT + "' }}"
)


def build_tokenizer(folder: Path, version: float) -> PreTrainedTokenizerFast:
    """The tokenizer of a hub folder as a plain fast tokenizer: the hub's own class loses its merges under transformers 5.

    Raises:
        FedmllmError: tokenizer.json or tokenizer_config.json is missing.
    """
    file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    for path in (file, config_file):
        if not path.is_file():
            raise FedmllmError(
                f"{path} is missing: a MiniCPM-V 2 folder holds tokenizer.json and tokenizer_config.json"
            )
    config = json.loads(config_file.read_text("utf-8"))

    def content(token: Any) -> Any:
        return token["content"] if isinstance(token, dict) else token

    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: content(config[name]) for name in names if config.get(name) is not None}
    backend = Tokenizer.from_file(str(file))
    # The file has more special tokens than the hub's config lists: without them <|eot_id|> would not end a turn of 2.5.
    more = {token.content: None for token in backend.get_added_tokens_decoder().values() if token.special}
    listed = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more.update(dict.fromkeys(map(content, listed.values() if isinstance(listed, dict) else listed)))
    template_file = folder / "chat_template.jinja"  # where transformers 5 saves it
    template = template_file.read_text("utf-8") if template_file.is_file() else config.get("chat_template")
    # add_bos_token and the like stay out: given them, transformers 5 rewrites the file's post-processor.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=[token for token in more if token not in special.values()],
        chat_template=template or (CHATML if version > 2.5 else LLAMA3),
        model_max_length=config.get("model_max_length", 32768),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **special,
    )


class MiniCPMV2Processor:
    """Conversations or text with pictures -> a batch of plain tensors, in the manner of a transformers processor.

    A batch holds `input_ids`, `attention_mask` and `mm_token_type_ids` [B, L] (1 where an image feature goes, 0 for text: pad
    it with 0) and, where the batch has a picture, `pixel_values` [S, C, P, max N * P] (zeros behind the shorter ones) and
    `tgt_sizes` [S, 2]. Pictures are PIL images, or `ImageSlices` of `preprocess_image`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: ImageSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.placeholders = [IMAGE_MARK]  # of `__call__`, in addition to the tokenizer's special tokens
        tokens = [settings.im_start, settings.im_end, settings.slice_start, settings.slice_end, settings.unk]
        tokens += [settings.im_id_start, settings.im_id_end] if settings.use_image_id else []
        vocabulary = tokenizer.get_vocab()
        self.placeholders += tokens
        if absent := [token for token in tokens if token not in vocabulary]:
            raise FedmllmError(
                f"tokenizer.json has no token {absent}; preprocessor_config.json names them for pictures"
            )
        starts, ends = [settings.im_start], [settings.im_end]
        if settings.version > 2.5:  # in 2.5 <slice> wraps all slices, and each of them is an <image>
            starts, ends = [*starts, settings.slice_start], [*ends, settings.slice_end]
        self._starts = torch.tensor([vocabulary[token] for token in starts])
        self._ends = torch.tensor([vocabulary[token] for token in ends])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MiniCPMV2Processor":
        """From a folder in the hub's layout (or one that `save_pretrained` wrote)."""
        path = Path(folder) / "preprocessor_config.json"
        if not path.is_file():
            raise FedmllmError(f"{path} is missing: it has the settings for pictures; copy it from the hub folder")
        settings = ImageSettings.from_dict(json.loads(path.read_text("utf-8")))
        return cls(build_tokenizer(Path(folder), settings.version), settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json and the tokenizer's files."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self.settings), indent=2) + "\n"
        (Path(folder) / "preprocessor_config.json").write_text(text, "utf-8")
        self.tokenizer.save_pretrained(str(folder))

    @property
    def chat_template(self) -> str | None:
        template: str | None = self.tokenizer.chat_template
        return template

    def preprocess_image(self, image: Image.Image) -> ImageSlices:
        """Cut, scale and normalise one picture."""
        if not isinstance(image, Image.Image):
            raise FedmllmError(f"a picture must be a PIL image or ImageSlices, not {type(image).__name__}")
        return preprocess(image, self.settings)

    def placeholder(self, grid: tuple[int, int] | None, index: int) -> str:
        """The text of one picture, the `index`th (from 0) of its row."""
        s = self.settings
        thumbnail = s.im_start + s.unk * s.image_feature_size + s.im_end
        columns, rows = grid or (0, 0)
        if s.version > 2.5:
            cell = s.slice_start + s.unk * s.image_feature_size + s.slice_end
            number = f"{s.im_id_start}{index}{s.im_id_end}" if s.use_image_id else ""
            return number + thumbnail + "\n".join([cell * columns] * rows)
        cells = "\n".join([thumbnail * columns] * rows)
        return thumbnail + (s.slice_start + cells + s.slice_end if grid else "")

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """A conversation [{"role", "content"}, ...] or a batch of them -> text (a list for a batch) or model inputs.

        `content` is a string or parts {"type": "text", "text"} and {"type": "image", "image"}; the model was trained with
        the parts on lines of their own, so they are joined by newlines.
        """
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = conversation if batched else [conversation]
        pictures: list[list[Any]] = [[] for _ in conversations]
        texts = [
            self._render([self._flatten(message, row) for message in messages], add_generation_prompt)
            for messages, row in zip(conversations, pictures, strict=True)
        ]
        if not tokenize:
            return texts if batched else texts[0]
        inputs = self(text=texts, images=pictures, **kwargs)
        return inputs if return_dict else inputs["input_ids"]

    def _flatten(self, message: Mapping[str, Any], pictures: list[Any]) -> dict[str, str]:
        content = message["content"]
        parts: list[str] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append(part["text"])
            elif part["type"] == "image":
                parts.append(IMAGE_MARK)
                pictures.extend([part["image"]] if "image" in part else [])
            else:
                raise FedmllmError(f"a content part has type {part['type']!r}; MiniCPM-V 2 takes 'text' and 'image'")
        return {"role": message["role"], "content": "\n".join(parts)}

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        if self.settings.version <= 2.5 and not add_generation_prompt:
            text = text.removesuffix(LLAMA3_PROMPT)  # the hub's template of 2.5 always appends it
        return text

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[Any] | None = None,
        *,
        padding: bool = True,
        padding_side: str | None = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Text with one IMAGE_MARK for each picture. `images` is one list a row; for a single row a flat list will do."""
        if kwargs or padding is not True or return_tensors != "pt":
            raise FedmllmError(
                f"MiniCPM-V 2's processor pads and returns torch tensors, always, and has no other options: got "
                f"padding={padding!r}, return_tensors={return_tensors!r}, {sorted(kwargs)}"
            )
        texts = [text] if isinstance(text, str) else list(text)
        cut = [[self._cut(picture) for picture in row] for row in self._rows(images, len(texts), isinstance(text, str))]
        encoded = [self._encode(row_text, pictures) for row_text, pictures in zip(texts, cut, strict=True)]
        batch = self._pad(encoded, padding_side or self.tokenizer.padding_side)
        slices = [pixels for row in cut for picture in row for pixels in picture.slices]
        if slices:
            longest = max(pixels.shape[-1] for pixels in slices)
            padded = [torch.nn.functional.pad(pixels, (0, longest - pixels.shape[-1])) for pixels in slices]
            batch["pixel_values"] = torch.stack(padded)
            batch["tgt_sizes"] = torch.cat([picture.tgt_sizes for row in cut for picture in row])
        return BatchFeature(batch)

    def _rows(self, images: Sequence[Any] | None, num_rows: int, flat: bool) -> list[Sequence[Any]]:
        """The pictures of each row; where `flat`, one row's may come without a list of rows around them."""
        lists = (list, tuple)
        rows = [[] for _ in range(num_rows)] if images is None else [[] if row is None else row for row in images]
        if flat and not (len(rows) == 1 and type(rows[0]) in lists):  # ImageSlices are tuples too, but no rows
            rows = [rows]
        if len(rows) != num_rows or any(type(row) not in lists for row in rows):
            raise FedmllmError(
                f"{num_rows} texts need as many lists of pictures, got {[type(row).__name__ for row in rows]}"
            )
        return rows

    def _cut(self, picture: Any) -> ImageSlices:
        return picture if isinstance(picture, ImageSlices) else self.preprocess_image(picture)

    def _encode(self, text: str, pictures: Sequence[ImageSlices]) -> tuple[Tensor, Tensor]:
        """Token ids [L] and where features go [L] of one row."""
        chunks = text.split(IMAGE_MARK)
        if len(chunks) - 1 != len(pictures):
            raise FedmllmError(f"a row's text has {len(chunks) - 1} marks {IMAGE_MARK!r} but {len(pictures)} pictures")
        for index, picture in enumerate(pictures):
            chunks[index] += self.placeholder(picture.grid, index)
        # With whatever tokenizer.json's post-processor adds, also where the template has written a BOS: as the original.
        ids = torch.tensor(self.tokenizer("".join(chunks))["input_ids"], dtype=torch.long)
        starts = torch.isin(ids, self._starts).nonzero().flatten() + 1
        ends = torch.isin(ids, self._ends).nonzero().flatten()
        expected = sum(len(picture.slices) for picture in pictures)
        spans = list(zip(starts.tolist(), ends.tolist(), strict=False))
        if not len(starts) == len(ends) == expected or any(b - a != self.settings.image_feature_size for a, b in spans):
            raise FedmllmError(
                f"a row has {len(starts)} image starts and {len(ends)} ends for {expected} slices of "
                f"{self.settings.image_feature_size} placeholders: its own text must not hold "
                f"{self.settings.im_start!r} or {self.settings.slice_start!r}"
            )
        features = torch.zeros_like(ids)
        for start, end in spans:
            features[start:end] = 1
        return ids, features

    def _pad(self, rows: Sequence[tuple[Tensor, Tensor]], side: str) -> dict[str, Tensor]:
        longest = max(len(ids) for ids, _ in rows)
        pad_id = self.tokenizer.pad_token_id
        batch: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "mm_token_type_ids": []}
        for ids, features in rows:
            gap = longest - len(ids)
            edges = (gap, 0) if side == "left" else (0, gap)
            pad = torch.nn.functional.pad
            batch["input_ids"].append(pad(ids, edges, value=pad_id if pad_id is not None else 0))
            batch["attention_mask"].append(pad(torch.ones_like(ids), edges))
            batch["mm_token_type_ids"].append(pad(features, edges))
        return {key: torch.stack(values) for key, values in batch.items()}

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """The tokenizer's."""
        text: str = self.tokenizer.decode(*args, **kwargs)
        return text

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's."""
        texts: list[str] = self.tokenizer.batch_decode(*args, **kwargs)
        return texts
