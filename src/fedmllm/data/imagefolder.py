"""Image folders, with metadata files or a subfolder per label."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedmllm.core.errors import DataError
from fedmllm.data.cells import same_form
from fedmllm.data.reading import Placed, listed, readable

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
OTHER_METADATA = tuple(f"metadata.{ending}" for ending in ("json", "tsv", "txt", "xls", "xlsx"))
_ENDINGS = """
    apng avif avifs bmp dib gif ico j2c j2k jfif jp2 jpe jpeg jpf jpg jpx mpo pbm pcx pgm png pnm ppm qoi sgi tga tif tiff webp
"""
IMAGES = frozenset(f".{ending}" for ending in _ENDINGS.split())


@dataclass
class Contents:
    """Everything that lies in an image folder, as paths below it."""

    folder: Path
    images: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    def labels(self) -> set[str]:
        """Names of the subfolders that hold images."""
        return {label_of(path) for path in self.images if len(path.parts) > 1}

    def notes(self) -> tuple[str, ...]:
        """Files that are left out, counted and named."""
        kinds = {"hidden": self.hidden, "neither images nor metadata": self.others}
        return tuple(
            f"{self.folder}: {len(paths)} file{'s' if len(paths) > 1 else ''} left out ({kind}): {listed(paths)}"
            for kind, paths in kinds.items()
            if paths
        )


def contents_of(folder: Path) -> Contents:
    """List a folder. Files and folders that begin with "." and `__MACOSX` are hidden, as for other readers of the form.

    Raises:
        DataError: A folder has two metadata files or one in another form, or the name of an image is not UTF-8.
    """
    found = Contents(folder)
    for path in sorted(_files_below(folder, folder)):
        if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
            found.hidden.append(path)
        elif path.name.lower() in METADATA:
            found.metadata.append(path)
        elif path.name.lower() in OTHER_METADATA:  # the answers would be the names of the folders
            raise DataError(f"{folder / path}: metadata is not read in this form; allowed: {', '.join(METADATA)}")
        elif path.suffix.lower() in IMAGES:
            readable(path.as_posix(), str(folder))
            found.images.append(path)
        else:
            found.others.append(path)
    for path in found.metadata:
        if twice := [other for other in found.metadata if other.parent == path.parent and other != path]:
            raise DataError(f"{folder / path}: stands next to {twice[0].name}; keep one of them")
    return found


def is_bare(path: Path) -> bool:
    """True for a folder of pictures without metadata."""
    contents = contents_of(path) if path.is_dir() else None
    return contents is not None and bool(contents.images) and not contents.metadata


def _files_below(top: Path, folder: Path) -> Iterator[Path]:
    """Paths relative to `folder` of all files below `top`; folders may be links."""
    try:
        names = os.listdir(top)  # noqa: PTH208  (Path.iterdir makes a path of every name first)
    except OSError as error:
        raise DataError(f"{top}: cannot be read: {error.strerror}") from None
    for name in names:
        path = top / name
        if not path.is_dir():
            yield path.relative_to(folder)
        elif not _leads_up(path):
            yield from _files_below(path, folder)


def _leads_up(folder: Path) -> bool:
    """True for a link to a folder that the link lies in: walking it would never end."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def refuse_metadata_above(folder: Path, root: Path) -> None:
    """Raise DataError if a folder between `root` and `folder` has a metadata file, which would not be read."""
    for above in folder.parents:
        if not above.is_relative_to(root):
            return
        for name in sorted(os.listdir(above)):  # noqa: PTH208  (a name alone is enough)
            if name.lower() in METADATA:
                raise DataError(
                    f"{above / name}: is not read, since it lies above {folder}; "
                    "move it there, or name its own folder in data.train or data.test"
                )


def label_of(path: Path) -> str:
    """Label of an image: the name of its topmost subfolder, in Unicode's composed form."""
    return same_form(path.parts[0])


def label_rows(contents: Contents, answer: str, choices: str, labels: Sequence[str]) -> Placed:
    """Yield one row per image: its path below the folder as `file_name` and id, and its label as the answer.

    Args:
        contents: The folder.
        answer: Column of the label; "" = rows without answers, from any folder.
        choices: Column of the labels of the whole federation.
        labels: These labels, in order.
    """
    for path in contents.images:
        place = f"{contents.folder / path}"
        name = path.as_posix()
        if not answer:
            yield place, {"id": name, "file_name": name}
        elif len(path.parts) == 1:
            yield place, DataError(f"{place}: an image without a label: it lies in no subfolder")
        else:
            yield place, {"id": name, "file_name": name, answer: label_of(path), choices: list(labels) or None}
