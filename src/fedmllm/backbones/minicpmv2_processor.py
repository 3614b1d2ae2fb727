"""Text and pictures for MiniCPM-V 2.6 and MiniCPM-Llama3-V 2.5: slicing, pixels, placeholders, chat text, batches.

Sources: the two hub repositories' preprocessing (openbmb/MiniCPM-V-2_6, openbmb/MiniCPM-Llama3-V-2_5), re-implemented from
their behaviour; the adaptive slicing is that of LLaVA-UHD (arXiv:2403.11703). `tests/backbones/test_minicpmv2.py` holds
token ids and pixels equal to the original's.

Shapes: B rows, L tokens, S slices of a batch (row by row, image by image, thumbnail first), n a picture's slices,
C = 3 channels, P patch side, N patches of a slice, Q placeholders of a slice (the resampler's queries).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast

from fedmllm.types import FedmllmError

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


class ImageSlices(NamedTuple):
    """What one picture becomes: a pure function of its pixels and the settings, so it may be kept and used again."""

    slices: list[Tensor]  # n of [C, P, N * P], float32; the thumbnail, then the grid's cells row by row
    tgt_sizes: Tensor  # [n, 2] (height, width) in patches, int32
    grid: tuple[int, int] | None  # (columns, rows), None for one picture


@dataclass(frozen=True)
class ImageSettings:
    """The fields of the hub's preprocessor_config.json that change a result, under the hub's names and defaults."""

    version: float = 2.6
    max_slice_nums: int = 9
    scale_resolution: int = 448  # pixels; a slice has about this side squared as its area
    patch_size: int = 14
    image_feature_size: int = 64  # placeholders of a slice
    slice_mode: bool = True
    use_image_id: bool = False
    im_start: str = "<image>"
    im_end: str = "</image>"
    slice_start: str = "<slice>"
    slice_end: str = "</slice>"
    unk: str = "<unk>"
    im_id_start: str = "<image_id>"
    im_id_end: str = "</image_id>"
    norm_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    norm_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if str(self.version) not in ("2.5", "2.6"):
            raise FedmllmError(f"preprocessor version is {self.version!r}; this port knows 2.5 and 2.6")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ImageSettings":
        """From a preprocessor_config.json; keys about the hub's own classes are left out."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
        if "version" in known:
            known["version"] = float(known["version"])
        return cls(**known)


def _to_multiple(length: float, unit: int) -> int:
    return max(round(length / unit) * unit, unit)  # Python's round: halves go to the even neighbour, as in the original


def single_size(width: float, height: float, settings: ImageSettings, upscale: bool) -> tuple[int, int]:
    """(width, height) of one picture or cell: about scale_resolution ** 2 in area, sides multiples of the patch."""
    if upscale or width * height > settings.scale_resolution**2:
        aspect = width / height
        height = int(settings.scale_resolution / math.sqrt(aspect))
        width = int(height * aspect)  # from the rounded height: that order decides ties, so it is the original's
    return _to_multiple(width, settings.patch_size), _to_multiple(height, settings.patch_size)


def choose_grid(width: int, height: int, settings: ImageSettings) -> tuple[int, int] | None:
    """(columns, rows) of the slices of a picture, or None where one picture is enough."""
    wanted = min(math.ceil(width * height / settings.scale_resolution**2), settings.max_slice_nums)
    if wanted <= 1 or not settings.slice_mode:
        return None
    counts = [count for count in (wanted - 1, wanted, wanted + 1) if 1 < count <= settings.max_slice_nums]
    grids = [(columns, count // columns) for count in counts for columns in range(1, count + 1) if count % columns == 0]
    aspect = math.log(width / height)
    return min(grids, key=lambda grid: abs(aspect - math.log(grid[0] / grid[1])))  # min keeps the first of equals


def slice_image(image: Image.Image, settings: ImageSettings) -> tuple[list[Image.Image], tuple[int, int] | None]:
    """The thumbnail and the grid's cells, row by row. Without a grid: the picture alone, scaled to one slice's area.

    (The original leaves a picture as it is when `slice_mode` is off and drops the pixels beyond the last whole patch; here
    it is scaled as an unsliced picture always is, so that its cost is bounded.)
    """
    width, height = image.size
    grid = choose_grid(width, height, settings)
    thumbnail = image.resize(single_size(width, height, settings, upscale=grid is None), Image.Resampling.BICUBIC)
    if grid is None:
        return [thumbnail], None
    columns, rows = grid
    cell = (_to_multiple(width, columns) / columns, _to_multiple(height, rows) / rows)
    cell_width, cell_height = single_size(*cell, settings, upscale=True)
    refined = image.resize((cell_width * columns, cell_height * rows), Image.Resampling.BICUBIC)
    corners = [(column * cell_width, row * cell_height) for row in range(rows) for column in range(columns)]
    return [thumbnail] + [refined.crop((x, y, x + cell_width, y + cell_height)) for x, y in corners], grid


def to_patches(image: Image.Image, settings: ImageSettings) -> tuple[Tensor, tuple[int, int]]:
    """Pixels [C, P, N * P] (patches side by side, row by row) and the size (height, width) in patches."""
    patch = settings.patch_size
    pixels = np.asarray(image, dtype=np.float32) / 255
    mean, std = np.array(settings.norm_mean, np.float32), np.array(settings.norm_std, np.float32)
    pixels = (pixels - mean) / std
    height, width = image.height // patch, image.width // patch
    grid = torch.from_numpy(pixels).permute(2, 0, 1).reshape(3, height, patch, width, patch)
    return grid.permute(0, 2, 1, 3, 4).reshape(3, patch, height * width * patch), (height, width)


def build_tokenizer(folder: Path, version: float) -> PreTrainedTokenizerFast:
    """The tokenizer of a hub folder as a plain fast tokenizer: the hub's own class loses its merges under transformers 5."""
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
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    template_file = (
        folder / "chat_template.jinja"
    )  # where transformers 5 saves what the hub keeps in tokenizer_config.json
    template = template_file.read_text("utf-8") if template_file.is_file() else config.get("chat_template")
    # add_bos_token and its kin stay out: given them, transformers 5 rewrites the file's post-processor.
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        extra_special_tokens=[content(token) for token in more],
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
    `tgt_sizes` [S, 2]. Pictures are PIL images, or `ImageSlices` kept from `preprocess_image`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: ImageSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        tokens = [settings.im_start, settings.im_end, settings.slice_start, settings.slice_end, settings.unk]
        tokens += [settings.im_id_start, settings.im_id_end] if settings.use_image_id else []
        vocabulary = tokenizer.get_vocab()
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
            raise FedmllmError(f"{path} is missing: it says how MiniCPM-V 2 cuts pictures; copy it from the hub folder")
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
        pictures, grid = slice_image(image.convert("RGB"), self.settings)
        patches = [to_patches(picture, self.settings) for picture in pictures]
        sizes = torch.tensor([size for _, size in patches], dtype=torch.int32)
        return ImageSlices([pixels for pixels, _ in patches], sizes, grid)

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
            text = text.removesuffix(LLAMA3_PROMPT)  # the hub's template of 2.5 appends it whether asked or not
        return text

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[Any] | None = None,
        *,
        padding: bool | str = True,
        padding_side: str | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Text with one IMAGE_MARK for each picture. `images` is one list a row; for a single row a flat list will do."""
        if kwargs:
            raise FedmllmError(f"MiniCPM-V 2's processor has no option {sorted(kwargs)}")
        texts = [text] if isinstance(text, str) else list(text)
        if isinstance(images, Image.Image | ImageSlices):
            images = [images]
        rows: list[Any] = list(images) if images is not None else [[] for _ in texts]
        if isinstance(text, str) and not (len(rows) == 1 and type(rows[0]) in (list, tuple)):
            rows = [rows]
        if len(rows) != len(texts):
            raise FedmllmError(f"{len(texts)} texts but pictures for {len(rows)} rows; give one list of pictures a row")
        cut = [[item if isinstance(item, ImageSlices) else self.preprocess_image(item) for item in row] for row in rows]
        encoded = [self._encode(row_text, pictures) for row_text, pictures in zip(texts, cut, strict=True)]
        batch = self._pad(encoded, padding_side or self.tokenizer.padding_side)
        slices = [pixels for row in cut for picture in row for pixels in picture.slices]
        if slices:
            longest = max(pixels.shape[-1] for pixels in slices)
            padded = [torch.nn.functional.pad(pixels, (0, longest - pixels.shape[-1])) for pixels in slices]
            batch["pixel_values"] = torch.stack(padded)
            batch["tgt_sizes"] = torch.cat([picture.tgt_sizes for row in cut for picture in row])
        return BatchFeature(batch)

    def _encode(self, text: str, pictures: Sequence[ImageSlices]) -> tuple[Tensor, Tensor]:
        """Token ids [L] and where features go [L] of one row."""
        chunks = text.split(IMAGE_MARK)
        if len(chunks) - 1 != len(pictures):
            raise FedmllmError(f"a row's text has {len(chunks) - 1} marks {IMAGE_MARK!r} but {len(pictures)} pictures")
        for index, picture in enumerate(pictures):
            chunks[index] += self.placeholder(picture.grid, index)
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
