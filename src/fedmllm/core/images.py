"""One way to open a picture, for data sets and models alike: RGB, upright, or an error that names the row."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from fedmllm.core.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000  # a 10,000 x 10,000 picture; what is larger is a mistake or a decompression bomb


def open_image(path: Path, where: str = "") -> Image:
    """The picture as 8-bit RGB, turned upright by its EXIF tag.

    Args:
        path: The file.
        where: The row that wants it (file:line); begins the error message.

    Raises:
        DataError: the file is missing, empty, truncated, no picture, or holds more than `MAX_PIXELS`.
    """
    from PIL import Image, ImageOps

    place = f"{where}: " if where else ""
    try:
        if not path.is_file():
            raise DataError(f"{place}image {path} is not there")
        if path.stat().st_size == 0:
            raise DataError(f"{place}image {path} is empty (0 bytes)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below
            with Image.open(path) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise DataError(f"{place}image {path} has {width} x {height} pixels; at most {MAX_PIXELS} are read")
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{place}image {path} cannot be read: {error}") from error


def _rgb(image: Image) -> Image:
    """8-bit RGB. 16-bit greys are scaled by 1/256 (PIL's own conversion clips them), transparency is laid on white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        wide = image.mode.startswith("I;16") or (image.mode == "I" and (image.getextrema()[1] or 0) > 255)  # type: ignore[operator]
        return image.convert("I").point(lambda v: v * (1 / 256 if wide else 1)).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        above = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    return image.convert("RGB")
