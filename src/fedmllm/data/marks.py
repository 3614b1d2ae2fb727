"""Image marks in a row's text, such as `<image>` and `<image_00>`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fedmllm.core.errors import DataError
from fedmllm.data.reading import listed, quoted

MARK = "<image>"
_MARK = re.compile(r"<image(?:[ _-]?\d+)?>", re.IGNORECASE)
_NAME = re.compile(r"<?image(?:[ _-]?\d+)?>?", re.IGNORECASE)  # of a picture, as a key of an object
_OTHER = re.compile(
    r"<img>.*?</img>|<img\b[^<>]*>|!\[[^\[\]]*\]\([^()]*\)|<(?:\s+image\s*/?|image\s*/|image\s+)>"
    r"|<(?:video|audio|ImageHere|image_placeholder|image_soft_token|start_of_image|IMG_CONTEXT)>"
    r"|<\|(?:image|image_\d+|image_pad|vision_start|video_pad)\|>",
    re.IGNORECASE | re.DOTALL,
)


def marks_in(text: str, where: str) -> list[str]:
    """Find the image marks of a text.

    Args:
        text: A question, or one turn of a conversation.
        where: Place of the row; begins the error message.

    Returns:
        The marks in their order.

    Raises:
        DataError: The text asks for a picture, film or sound in a form that is not read, such as "<img>a.png</img>".
    """
    if other := _OTHER.search(text):
        raise DataError(
            f"{where}: the text holds {quoted(other[0])}, which is not read; "
            f"write {MARK} there and put the picture's path into the row's image column"
        )
    return _MARK.findall(text)


def pictures_of(marks: Sequence[str], cell: object, column: str, where: str) -> list[object]:
    """Pair marks with pictures.

    Args:
        marks: The marks of one question, or of a whole conversation.
        cell: The row's image cell: a path, a list of paths, or an object of mark -> path.
        column: Name of the image column.
        where: Place of the row; begins the error message.

    Returns:
        One path per mark; all paths of the cell if there is no mark.

    Raises:
        DataError: The marks and the pictures do not correspond.
    """
    is_object = isinstance(cell, Mapping) and all(_NAME.fullmatch(key) for key in cell)
    named = {key.strip("<>"): path for key, path in cell.items()} if is_object and isinstance(cell, Mapping) else {}
    paths = list(named.values()) if named else as_list(cell)
    if not marks:
        return paths
    names = [mark.strip("<>") for mark in marks]
    numbers = [int(digits[0]) for name in names if (digits := re.search(r"\d+$", name))]
    if named and set(names) == set(named):
        return [named[name] for name in names]
    if not numbers and len(marks) == len(paths):
        return paths
    if len(numbers) == len(marks) and not named and {n - min(numbers) for n in numbers} == set(range(len(paths))):
        return [paths[n - min(numbers)] for n in numbers]
    amount = f"{len(marks)} picture{'s' if len(marks) > 1 else ''} ({listed(dict.fromkeys(marks))})"
    has = f"{len(paths)} ({listed(named)})" if named else len(paths)
    raise DataError(f"{where}: the text asks for {amount}, the row's {column!r} has {has}")


def as_list(cell: object) -> list[object]:
    """The non-empty elements of a list, or of a cell that stands for a list of one."""
    return [name for name in (cell if isinstance(cell, list) else [cell]) if name is not None and name != ""]


def split_at_marks(text: str) -> tuple[str, tuple[str, ...]]:
    """Take the marks out of a text.

    Returns:
        The text without marks, and its pieces between them, one more than there are marks. The pieces are () if all marks
        stand in front of the text, where pictures go by default.
    """
    pieces = _MARK.split(text)
    pieces[0], pieces[-1] = pieces[0].lstrip(), pieces[-1].rstrip()
    if not any(piece.strip() for piece in pieces[:-1]):
        return pieces[-1].strip(), ()
    return "".join(pieces), tuple(pieces)
