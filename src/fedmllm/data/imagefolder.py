"""The `imagefolder` form of Hugging Face datasets: a folder of images, with `metadata.*` or a subfolder for each label."""

from __future__ import annotations

from pathlib import Path

from fedmllm.core.errors import DataError
from fedmllm.data.reading import Placed, readable

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})


def metadata_of(folder: Path) -> Path | None:
    """The file that describes the images of the folder, if there is one."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def label_rows(folder: Path, answer: str, choices: str) -> Placed:
    """One row an image of `folder/LABEL/`: its path below `folder` as `file_name` and id, and its label as the answer."""
    found = sorted(path.relative_to(folder) for path in folder.glob("*/**/*") if path.suffix.lower() in IMAGES)
    labels = sorted({path.parts[0] for path in found})
    if len(labels) < 2:
        raise DataError(
            f"{folder}: neither {', '.join(METADATA)}, nor images in two or more subfolders called after labels"
        )
    for path in found:
        name = readable(path.as_posix(), str(folder))
        yield f"{folder / path}", {"id": name, "file_name": name, answer: path.parts[0], choices: labels}
