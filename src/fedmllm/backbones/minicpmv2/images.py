"""Slices and patches of pictures for MiniCPM-V 2.6 and MiniCPM-Llama3-V 2.5.

Sources: the hub repositories' preprocessing, re-implemented from its behaviour; the adaptive slicing is that of LLaVA-UHD
(arXiv:2403.11703). `tests/backbones/test_minicpmv2.py` holds the pixels equal to the original's.

Shapes: n slices of a picture, C = 3 channels, P patch side, N patches of a slice.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedmllm.core.errors import FedmllmError


class ImageSlices(NamedTuple):
    """Slices of one picture: a pure function of its pixels and the settings, so they may be cached."""

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


def preprocess(image: Image.Image, settings: ImageSettings) -> ImageSlices:
    """Cut, scale and normalise one picture."""
    pictures, grid = slice_image(image.convert("RGB"), settings)
    patches = [to_patches(picture, settings) for picture in pictures]
    sizes = torch.tensor([size for _, size in patches], dtype=torch.int32)
    return ImageSlices([pixels for pixels, _ in patches], sizes, grid)
