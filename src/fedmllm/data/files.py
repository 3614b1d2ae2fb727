"""Files of a user's own rows: names, patterns, forms, readers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedmllm.core.errors import ConfigError, DataError
from fedmllm.data.cells import is_missing
from fedmllm.data.conversations import conversation_rows
from fedmllm.data.delimited import csv_rows, tsv_rows
from fedmllm.data.excel import excel_rows
from fedmllm.data.imagefolder import Contents, contents_of, label_rows, refuse_metadata_above
from fedmllm.data.parquet_files import parquet_rows
from fedmllm.data.reading import Placed, find, inside, is_there, json_rows, jsonl_rows, readable

Form = Literal["auto", "jsonl", "csv", "tsv", "parquet", "excel", "imagefolder", "conversations"]
FORMS: Mapping[str, Form] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".xlsx": "excel",
    ".json": "conversations",
    "": "imagefolder",
}
IMAGE_COLUMN: Mapping[Form, str] = {"imagefolder": "file_name", "conversations": "image"}  # fixed by the form


@dataclass(frozen=True)
class File:
    """One file of rows."""

    path: Path
    form: Form
    name: str  # path below the root without the ending; no two files of a split have the same
    images: Path  # folder that its image paths are relative to
    contents: Contents | None = None  # of the image folder that it is, or belongs to

    def is_empty(self, cell: object, na_values: Collection[str]) -> bool:
        """True if the cell has no value. In a conversation only null has none: a blank text is a text there."""
        return cell is None if self.form == "conversations" else is_missing(cell, na_values)


def form_of(name: str, form: Form) -> Form:
    """The form of a file: the given one, or by its ending.

    Raises:
        ConfigError: The ending is not known.
    """
    form = form if form != "auto" else FORMS.get(Path(name).suffix.lower(), "auto")
    if form == "auto":
        raise ConfigError(f"data.form: of which form is {name!r}? Endings known: {' '.join(filter(None, FORMS))}")
    return form


def files_of(named: str, root: Path, form: Form, images: Path | None) -> list[File]:
    """The files that a name or a pattern under `root` means, in order: site_2 before site_10.

    Args:
        named: A file or folder, or a pattern such as "site_*.csv".
        root: The data set's folder.
        form: As in the settings.
        images: Folder that image paths are relative to; None = `root`, or the image folder itself.

    Raises:
        DataError: There is no such file, or it lies outside of `root`.
        ConfigError: The pattern or the form is not valid.
    """
    files: list[File] = []
    for path in _paths(named, root):
        found = form_of(path.name, form)
        if found != "imagefolder":
            files.append(File(path, found, "", images or root))
            continue
        contents = contents_of(path)
        if not contents.metadata:
            refuse_metadata_above(path, root)
            files.append(File(path, "imagefolder", "", images or path, contents))
        for below in contents.metadata:
            metadata = path / below
            files.append(File(metadata, FORMS[metadata.suffix.lower()], "", images or metadata.parent, contents))
    return _with_names(files, root)


def _paths(named: str, root: Path) -> list[Path]:
    inside(root / named, root, f"data: {named!r}")
    if is_there(root / named) or not any(mark in named for mark in "*?["):  # a name may hold a "["
        return [find(root, named, hint="data.train, data.validation and data.test name files in data.root")]
    try:
        paths = sorted(root.glob(named), key=lambda path: (len(path.name), path.name))
    except (ValueError, NotImplementedError) as error:  # "a**", or a pattern that begins with "/"
        raise ConfigError(f"data: {named!r} is not a pattern of files below {root}: {error}") from None
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths:
        raise DataError(f"{root}: no file is called like {named!r}")
    return paths


def _with_names(files: list[File], root: Path) -> list[File]:
    """Name every file after its path, without the ending unless two names would be the same."""
    whole, short = [], []
    for file in files:
        is_metadata = file.contents is not None and file.path != file.contents.folder
        path = file.path.parent if is_metadata else file.path  # a metadata file is called after its folder
        below = readable((path.relative_to(root) if path.is_relative_to(root) else path).as_posix(), str(root))
        whole.append(below)
        short.append(below if file.contents else below.removesuffix(path.suffix))
    counts = Counter(short)
    names = [name if counts[name] == 1 else full for name, full in zip(short, whole, strict=True)]
    return [replace(file, name=name) for file, name in zip(files, names, strict=True)]


@dataclass(frozen=True)
class Options:
    """Settings of the readers."""

    images: tuple[str, ...]  # columns that hold pictures
    columns: frozenset[str]  # all columns that are mapped
    answer: str
    choices: str
    labels: tuple[str, ...]  # of label folders, over the whole federation
    delimiter: str
    sheet: str


def rows_of(file: File, options: Options) -> Placed:
    """The rows of a file, by the reader of its form."""
    match file.form:
        case "jsonl":
            return jsonl_rows(file.path)
        case "csv":
            return csv_rows(file.path, options.delimiter)
        case "tsv":
            return tsv_rows(file.path)
        case "excel":
            return excel_rows(file.path, options.sheet)
        case "conversations":
            return conversation_rows(json_rows(file.path), options.images)
        case "imagefolder":
            assert file.contents is not None
            return label_rows(file.contents, options.answer, options.choices, options.labels)
        case _:
            return parquet_rows(file.path, options.columns)
