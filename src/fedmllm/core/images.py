"""Decoding of pictures to 8-bit RGB, for data sets and models alike."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmllm.core.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000  # a 10,000 x 10,000 picture; a larger one is a mistake or a decompression bomb
MAX_NAME = 200  # characters of a path in a message
CANVAS = 224  # pixels of a side of the blank picture whose place imagined features take
FEATURES = ".features"  # ending of a file that holds features in place of a picture
_ORIENTATION = 274  # EXIF tag


def open_image(path: Path, where: str = "") -> Image:
    """Read a picture as 8-bit RGB, turned upright by its EXIF orientation.

    Of a file with several frames the first one is read. Transparency is laid on white. Values of more than 8 bits are scaled by
    `to_grey`.

    Args:
        path: The file.
        where: Place of the row (file:line); begins the error message.

    Raises:
        DataError: The file is missing, empty, truncated or not a picture, holds more than `MAX_PIXELS`, or its values cannot be
            scaled.
    """
    from PIL import Image

    place = f"{f'{where}: ' if where else ''}image {_short(path)}"
    try:
        if not path.is_file():
            raise DataError(f"{place} is not there")
        if path.stat().st_size == 0:
            raise DataError(f"{place} is empty (0 bytes)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            # By a file and not by its name: Pillow maps a named, uncompressed TIFF into memory with the turned size as that
            # of its rows, which scrambles the pixels of orientations 5 to 8.
            with path.open("rb") as file, Image.open(file) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise DataError(f"{place} has {width} x {height} pixels; at most {MAX_PIXELS} are read")
                image.load()
                return _rgb(_upright(image))
    except DataError as error:
        raise error if str(error).startswith(place) else DataError(f"{place} {error}") from None
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error.strerror or _cut(str(error))}") from error
    except Exception as error:  # decoders raise struct.error, TypeError, RuntimeError, MemoryError, ...
        raise DataError(f"{place} cannot be read: {type(error).__name__}: {_cut(str(error))}") from error


def num_frames(path: Path) -> int:
    """Number of frames or pages of a picture that `open_image` can read; 1 if the format has no frames."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # a broken directory of frames behind a sound first one
        return 1


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}..."


def _cut(text: str) -> str:
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}..."


def _upright(image: Image) -> Image:
    """The picture turned by its EXIF orientation. The EXIF data are not written back: they may be broken in other tags."""
    from PIL.Image import Transpose

    turns: Mapping[Any, Transpose] = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(_ORIENTATION))
    except Exception:  # EXIF that cannot be parsed states no orientation
        return image
    return image.transpose(turn) if turn is not None else image


def _rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        return to_grey(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        above = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    return image.convert("RGB")


def to_grey(image: Image) -> Image:
    """Scale a picture of 16-bit, 32-bit or float values to 8 bits.

    Values without a sign lose as many low bits as their largest one has above 8: full 16-bit values are divided by 256, 12-bit
    values in a 16-bit file by 16, and values up to 255 stay. Float values and values with a sign (Hounsfield units) are mapped
    linearly, from their smallest to their largest onto 0 to 255.

    Raises:
        DataError: A value is not finite, or different values would all become the same grey level.
    """
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError("has NaN or infinite values; replace them")
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" or low < 0:
        wide = values.astype(np.float64)
        span = float(high) - float(low)
        grey = np.rint((wide - float(low)) * (255 / span if span else 0)).astype(np.uint8)
    else:
        grey = (values >> max(0, int(high).bit_length() - 8)).astype(np.uint8)
    if low != high and grey.min() == grey.max():
        raise DataError(
            f"has values from {low} to {high}, which all become one grey level; rescale it to 0..255 or 0..65535"
        )
    return Image.fromarray(grey)
