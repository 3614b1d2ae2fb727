"""A user's own rows: files of any common form, and a table in the TOML that says which column is what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.spec import Spec
from fedmllm.core.types import Content, Example, Modality
from fedmllm.data.base import Dataset, Rows, Source, Split
from fedmllm.data.cells import MAX_CHOICES, choices_of, chosen, group
from fedmllm.data.conversations import conversation_rows
from fedmllm.data.delimited import csv_rows, tsv_rows
from fedmllm.data.imagefolder import label_rows, metadata_of
from fedmllm.data.parquet_files import parquet_rows
from fedmllm.data.reading import (
    Placed,
    Row,
    as_id,
    collect,
    filled,
    find,
    held_out,
    inside,
    is_there,
    json_rows,
    jsonl_rows,
    picture,
    readable,
    take_text,
)

Form = Literal["auto", "jsonl", "csv", "tsv", "parquet", "imagefolder", "conversations"]
FORMS: Mapping[str, Form] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".json": "conversations",
    "": "imagefolder",
}
IMAGE_COLUMN: Mapping[Form, str] = {"imagefolder": "file_name", "conversations": "image"}  # fixed by the form


class Columns(Spec):
    """Which column holds what; "" = none does. "file" is the name of a row's file, if no column is called so."""

    id: str = ""  # else the column "id", else the line or index
    image: str | dict[str, str] = ""  # a path or a list of paths; or one column a camera: {CAM_FRONT = "front", ...}
    text: str | dict[str, str] = ""
    question: str = "question"
    choices: str = "choices"  # a list, or a text with `separator` between the choices
    answer: str = "answer"  # one of the choices, its number from 0, or free text
    client: str = ""  # who holds the row: the federation is real, and no partition is simulated
    keep: tuple[str, ...] = ()  # further columns, for natural splits: the scanner, the ward


@dataclass(frozen=True)
class _File:
    """One file of a split, and how its rows are to be read."""

    path: Path
    form: Form
    images: Path  # where its image paths begin
    prefix: str  # of rows without id, where several files are read
    columns: Columns

    def is_empty(self, cell: object) -> bool:
        """Does the cell hold nothing? A conversation says null; elsewhere a blank text says so too."""
        return cell is None or (self.form != "conversations" and isinstance(cell, str) and not cell.strip())


class Table(Dataset):
    """JSONL, CSV, TSV, Parquet, `imagefolder`, or conversations (LLaVA's, or those of `fedmllm data export`).

    `train`, `validation` and `test` name files under `root` (imagefolder: folders); a pattern such as "client_*.json" means
    several. `question` and `choices` say it for all rows where no column does. An empty cell is a modality that the row
    does not have.
    """

    source = Source(
        title="Your own rows",
        get="yours; nothing leaves this machine",
        licence="yours",
        tree="""\
            train.csv, test.csv    any names; .jsonl .csv .tsv .parquet .json (conversations), or an imagefolder
            scans/17.png           image paths are relative to data.root, or to data.images

            [data]
            name = "table"
            root = "hospital"
            train = "train.csv"
            test = "test.csv"
            question = "Is there a fracture?"
            choices = ["no", "yes"]
            columns = { image = "scan", text = "report", answer = "label", client = "site" }""",
    )

    name: Literal["table"] = "table"
    root: Path
    form: Form = "auto"  # by the ending of the name; without an ending it is an imagefolder
    train: str
    validation: str = ""
    test: str = ""
    validation_rate: float = Field(
        0.0, ge=0, lt=1
    )  # share of the training rows kept out, where `validation` is not given
    images: Path | None = None  # the folder where image paths begin; default: root, or the imagefolder
    columns: Columns = Columns()
    question: str = ""
    choices: tuple[str, ...] = Field((), max_length=MAX_CHOICES)
    separator: str = Field("|", min_length=1)
    judged_by: tuple[str, ...] = ("accuracy", "token_f1")  # names of metrics

    @field_validator("choices")
    @classmethod
    def _different(cls, choices: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(choices)) < len(choices) or len(choices) == 1 or "" in choices:
            raise ValueError("give two or more choices, each of them once")
        return choices

    @model_validator(mode="after")
    def _shows_something(self) -> Table:
        for named in filter(None, (self.train, self.validation, self.test)):
            self.form_of(named)
        if not self.modalities():
            raise ConfigError('data.columns: name the column of the images or texts: columns = { image = "scan" }')
        return self

    def form_of(self, name: str) -> Form:
        """The form of a file, as set or by its ending."""
        form = self.form if self.form != "auto" else FORMS.get(Path(name).suffix.lower(), "auto")
        if form == "auto":
            raise ConfigError(f"data.form: of which form is {name!r}? Endings known: {' '.join(filter(None, FORMS))}")
        return form

    def modalities(self) -> tuple[Modality, ...]:
        return (*self._image_columns(), *by_modality(self.columns.text, "text"))

    def _image_columns(self) -> dict[Modality, str]:
        return by_modality(self.columns.image or IMAGE_COLUMN.get(self.form_of(self.train), ""), "image")

    def metrics(self) -> Sequence[str]:
        return self.judged_by

    def client_column(self) -> str:
        return "client" if self.columns.client else ""

    def folders(self) -> tuple[Path, ...]:
        return (self.images or self.root,)

    def load(self, split: Split) -> Rows:
        named = {"train": self.train, "validation": self.validation or self.train, "test": self.test}[split]
        if not named:
            raise ConfigError(f"data.{split}: missing; name a file or folder under {self.root}")
        paths, known, seen = self._paths(named), dict[str | int, str](), {"file": ""}
        loaded = [self._load(self._file(path, split, len(paths) > 1), known, seen) for path in paths]
        for key, column in self._mapped(split).items():
            if known and column not in seen:
                has = ", ".join(seen)
                raise DataError(f"{paths[0]}: no row has a column {column!r} (data.columns.{key}); columns: {has}")
        examples = [example for rows in loaded for example in rows.examples]
        if split != "test" and not self.validation:
            held = split == "validation"
            examples = [e for e in examples if held_out(self.validation_rate, str(e.id)) == held]
        rows = Rows(tuple(examples), tuple(message for rows in loaded for message in rows.skipped))
        return filled(rows, self.root / named, split)

    def _paths(self, named: str) -> list[Path]:
        inside(self.root / named, self.root, f"data: {named!r}")
        if is_there(self.root / named) or not any(mark in named for mark in "*?["):  # a name may hold a "["
            return [find(self.root, named, hint="data.train, data.validation and data.test name files in data.root")]
        try:
            paths = sorted(self.root.glob(named), key=lambda path: (len(path.name), path.name))
        except (ValueError, NotImplementedError) as error:  # "a**", or a pattern that begins with "/"
            raise ConfigError(f"data: {named!r} is no pattern of files below {self.root}: {error}") from None
        if not paths:
            raise DataError(f"{self.root}: no file is called like {named!r}")
        return paths

    def _file(self, path: Path, split: Split, is_one_of_many: bool) -> _File:
        form, metadata, images = self.form_of(path.name), None, self.images or self.root
        if form == "imagefolder":
            metadata, images = metadata_of(path), self.images or path
        prefix = f"{self._name(path)}-" if is_one_of_many else ""
        without = {"client": "", "keep": ()} if split == "test" else {}  # test rows belong to no client
        columns = self.columns.model_copy(update=without)
        if metadata:
            return _File(metadata, FORMS[metadata.suffix], images, prefix, columns)
        return _File(path, form, images, prefix, columns)

    def _name(self, path: Path) -> str:
        """What a file's rows are called after: its path below the root without the ending, so that no two are alike."""
        below = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        return readable(below.with_suffix("").as_posix(), str(self.root))

    def _load(self, file: _File, known: dict[str | int, str], seen: dict[str, str]) -> Rows:
        """The rows of one file. `known` gathers their ids, `seen` their columns, each with its place."""

        def make(where: str, row: Row) -> Example:
            seen.update(dict.fromkeys(row, where))
            return self._example(where, {"file": self._name(file.path), **row}, file)

        return collect(self._read(file), make, self.on_bad_row, known)

    def _mapped(self, split: Split) -> dict[str, str]:
        """Columns that some row must have: those of the modalities, and those that the user named."""
        optional = {"image", "text", "keep", *(["client"] if split == "test" else [])}
        named = {key: getattr(self.columns, key) for key in sorted(self.columns.model_fields_set - optional)}
        mapped = {**self._image_columns(), **by_modality(self.columns.text, "text"), **named}
        return {key: column for key, column in mapped.items() if column}

    def _read(self, file: _File) -> Placed:
        c, path = file.columns, file.path
        match file.form:
            case "jsonl":
                return jsonl_rows(path)
            case "csv":
                return csv_rows(path)
            case "tsv":
                return tsv_rows(path)
            case "conversations":
                return conversation_rows(json_rows(path))
            case "imagefolder":
                return label_rows(path, c.answer, c.choices)
            case _:
                mapped = {*self._image_columns().values(), *by_modality(c.text, "text").values(), *c.keep}
                return parquet_rows(path, mapped | {c.id or "id", c.question, c.choices, c.answer, c.client})

    def _example(self, where: str, row: Row, file: _File) -> Example:
        c = file.columns
        number = row.get(c.id or "id")
        if number is None and not c.id:
            number = f"{file.prefix}{_index(where)}" if file.prefix else _index(where)
        number = as_id(number, c.id or "id", where)
        place = f"{where}: row {number!r}"
        fields = self._fields(row, place, file)
        asked = not file.is_empty(row.get(c.question))
        question = take_text(row, c.question, place).strip() if asked else self.question
        if not asked and not question and "text" not in fields:
            raise DataError(f"{place}: no question: neither a column {c.question!r} nor data.question")
        choices = choices_of(row.get(c.choices), c.choices, self.separator, place) or self.choices
        if row.get(c.answer) is not None and file.is_empty(row[c.answer]):
            raise DataError(f"{place}: {c.answer!r} is empty")
        kept = {name: group(row, name, place) for name in c.keep}
        client = {"client": group(row, c.client, place)} if c.client else {}
        return Example(
            id=number,
            fields=fields,
            question=question,
            choices=choices,
            answer=chosen(take_text(row, c.answer, place).strip(), choices, place),
            where=where,
            columns={"set": self.name, **kept, **client},
        )

    def _fields(self, row: Row, place: str, file: _File) -> dict[Modality, Content]:
        fields: dict[Modality, Content] = {}
        for modality, column in self._image_columns().items():
            cell = row.get(column)
            names = [name for name in (cell if isinstance(cell, list) else [cell]) if name not in (None, "")]
            if names:
                fields[modality] = tuple(picture(file.images, name, place) for name in names)
        for modality, column in by_modality(self.columns.text, "text").items():
            if not file.is_empty(row.get(column)):
                fields[modality] = take_text(row, column, place)
        return fields


def by_modality(column: str | dict[str, str], modality: Modality) -> dict[Modality, str]:
    """Modality -> column."""
    if isinstance(column, dict):
        return column
    return {modality: column} if column else {}


def _index(where: str) -> int | str:
    """A row without id is called after its place: the index in a list ("3#2": its second question), else the line."""
    place, _, turn = where.rpartition("#")
    if place.endswith("]") and turn.isdigit():
        return f"{_index(place)}#{turn}"
    return int(where.rpartition("[")[2][:-1]) if where.endswith("]") else int(where.rpartition(":")[2])
