"""A user's own rows, with their columns mapped in the TOML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.rows import columns_of_rows, different_endings, row_fields
from fedmllm.core.spec import ADDED_LATER, Spec
from fedmllm.core.types import Content, Example, Modality
from fedmllm.data.answers import as_choice, as_word, is_ambiguous, read_answer, reading_of
from fedmllm.data.base import Dataset, OnBadRow, Rows, Source, Split
from fedmllm.data.cells import MAX_CHOICES, NA_VALUES, alike, choices_of, group, hint_at, is_missing
from fedmllm.data.files import IMAGE_COLUMN, File, Form, Options, files_of, form_of, rows_of
from fedmllm.data.imagefolder import METADATA
from fedmllm.data.marks import MARK, as_list, marks_in, pictures_of, split_at_marks
from fedmllm.data.plain import MOST_KEPT, RowPart, RowPlan, plain_rows
from fedmllm.data.reading import RawRow, as_id, collect, filled, held_out, id_key, listed, picture, quoted, take_text
from fedmllm.data.render import Render, check_names, readings

SHORT_TEXT = 12  # characters of a text that may stand for a missing one
SPLIT_WORDS: Mapping[str, Split] = {
    **dict.fromkeys(("train", "training", "0", "false", "no"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "1", "true", "yes"), "test"),
}


class Columns(Spec):
    """Columns of a table by their meaning; "" = none. "file" is the name of a row's file, if no column has that name."""

    id: str = ""
    """Column of the row's id; "" = the column "id" if there is one, else the line or index."""
    image: str | dict[str, str] = ""
    """Column with a path or a list of paths; or one column per camera: { CAM_FRONT = "front", CAM_BACK = "back" }."""
    text: str | dict[str, str] = ""
    """Column with a text; or one column per kind of text: { text = "note", prior_report = "prior" }."""
    question: str = "question"
    """Column of the question; an empty cell takes `data.question`."""
    choices: str = "choices"
    """Column of the choices, a list or a text with `data.separator` between them; an empty cell takes `data.choices`."""
    answer: str = "answer"
    """Column of the answer: one of the choices, its number from 0, or free text; "" = test rows without answers."""
    client: str = ""
    """Column that names the site of each row: a real federation, for which no partition is simulated."""
    keep: tuple[str, ...] = ()
    """Further columns for natural splits and results by group: the scanner, the ward."""
    series: Annotated[dict[str, str | tuple[str, ...]], ADDED_LATER] = Field(default_factory=dict)
    """Columns of numbers or lists of numbers, one or several a modality: { labs = ["crp", "hb"], speed = "speed" }."""
    variants: Annotated[dict[str, str | tuple[str, ...]], ADDED_LATER] = Field(default_factory=dict)
    """Columns of gene variants: one for variants of any gene ("KRAS G12D; TP53 R175H"), or a column per gene."""
    announced: Annotated[tuple[str, ...], ADDED_LATER] = ()
    """Kinds of text that a prompt puts under their name, "Prior report: ...", not "Text: ...". Series and variants are."""

    def numbers(self) -> dict[Modality, tuple[str, ...]]:
        """Modality -> its columns of numbers."""
        return {m: (names,) if isinstance(names, str) else names for m, names in self.series.items()}

    def genes(self) -> dict[Modality, tuple[str, ...]]:
        """Modality -> its columns of gene variants."""
        return {m: (names,) if isinstance(names, str) else names for m, names in self.variants.items()}


class Table(Dataset):
    """Your own rows: JSONL, CSV, TSV, Parquet, Excel, conversations (LLaVA's, or exported ones), or image folders.

    An empty cell is a modality that the row does not have. `question` and `choices` are for all rows that have no own ones.
    """

    source = Source(
        title="Your own rows",
        get="yours; nothing leaves this machine",
        licence="yours",
        tree="""\
            train.csv, test.csv    any names; .jsonl .csv .tsv .parquet .xlsx .json (conversations), or an imagefolder
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
    """Folder of the files."""
    form: Form = "auto"
    """Form of the files; "auto" = by the ending of the name, without an ending an image folder."""
    train: str
    """File or folder of the training rows under `root`, or a pattern: "site_*.csv"."""
    validation: str = ""
    """The same for the validation rows."""
    test: str = ""
    """The same for the test rows."""
    test_rate: Annotated[float, Field(ge=0, lt=1), ADDED_LATER] = 0.0
    """Share of the rows (of the groups, with `group`) of `train` that are held out as test rows, if `test` is not given."""
    test_column: Annotated[str, ADDED_LATER] = ""
    """Column of `train` with each row's split: "train", "validation" or "test"; or 1 for test rows and 0 for the others."""
    validation_rate: float = Field(0.0, ge=0, lt=1)
    """Share of the other rows of `train` that are held out as validation rows, if `validation` is not given."""
    group: Annotated[str, ADDED_LATER] = ""
    """Column whose values stay together when rows are held out, such as the patient."""
    images: Path | None = None
    """Folder that image paths are relative to; by default `root`, or the image folder."""
    columns: Columns = Columns()
    """Which column holds what."""
    question: str = ""
    """The question of all rows that have no own one."""
    choices: tuple[str, ...] = Field((), max_length=MAX_CHOICES)
    """The choices of all rows that have no own ones; empty = open questions, or the labels of the image folders."""
    answers: Annotated[Literal["auto", "words", "numbers"], ADDED_LATER] = "auto"
    """How answers name a choice: by its words or by its number from 0; "auto" = whichever fits the whole column."""
    separator: str = Field("|", min_length=1)
    """Between the choices of a cell."""
    delimiter: Annotated[str, Field(max_length=1), ADDED_LATER] = ""
    """Between the cells of a CSV file; "" = comma or semicolon, by the header."""
    sheet: Annotated[str, ADDED_LATER] = ""
    """Sheet of an Excel workbook; "" = the only one that has rows."""
    na_values: Annotated[tuple[str, ...], ADDED_LATER] = NA_VALUES
    """Words that mean a missing value in any mapped column but the id; a blank cell always does."""
    render: Annotated[Render, ADDED_LATER] = Render()
    """How series and variants are written."""
    judged_by: tuple[str, ...] = ("accuracy", "token_f1")
    """Names of the metrics; the first is the headline."""

    @field_validator("choices")
    @classmethod
    def _different(cls, choices: tuple[str, ...]) -> tuple[str, ...]:
        if alike(choices) or len(choices) == 1 or "" in choices:
            raise ValueError("give two or more choices, each of them once")
        return choices

    @field_validator("question")
    @classmethod
    def _without_marks(cls, question: str) -> str:
        if marks_in(question, "data.question"):
            raise ConfigError(f"data.question: holds {MARK}; leave it out: the pictures of a row come first")
        return question

    @model_validator(mode="after")
    def _is_complete(self) -> Table:
        for named in filter(None, (self.train, self.validation, self.test)):
            form_of(named, self.form)
        self._check_modalities()
        if not self.modalities():
            raise ConfigError('data.columns: name the column of the images or texts: columns = { image = "scan" }')
        ways = {"test": self.test, "test_rate": self.test_rate, "test_column": self.test_column}
        if len(given := [key for key, value in ways.items() if value]) > 1:
            raise ConfigError(f"data.{given[1]}: data.{given[0]} is given too; keep one of them")
        return self

    def _check_modalities(self) -> None:
        c = self.columns
        for modality, count in Counter(self.modalities()).items():
            if count > 1:
                raise ConfigError(f"data.columns: two kinds of columns are called {modality!r}; rename one modality")
        for modality in c.announced:
            if modality not in (allowed := by_modality(c.text, "text")):
                raise ConfigError(f"data.columns.announced: got {modality!r}; allowed: {listed(allowed)}")
        for key, columns in (("series", c.numbers()), ("variants", c.genes())):
            for modality, names in columns.items():
                if not names or "" in names or len(set(names)) < len(names):
                    raise ConfigError(f"data.columns.{key}.{modality}: name one or more columns, each once")
        for modality, names in c.genes().items():
            if len(names) == 1 and not self.render.genes:
                raise ConfigError(
                    f"data.render.genes: missing; name the genes whose variants in {names[0]!r} may be written "
                    f"(data.columns.variants.{modality})"
                )
        check_names((*c.series, *c.variants), "data.columns")
        self.render.check({name for names in c.numbers().values() for name in names}, "data.render")

    def modalities(self) -> tuple[Modality, ...]:
        c = self.columns
        return (*self.image_columns(), *by_modality(c.text, "text"), *c.series, *c.variants)

    def image_columns(self) -> dict[Modality, str]:
        """Return the columns of pictures, by modality."""
        return by_modality(self.columns.image or IMAGE_COLUMN.get(form_of(self.train, self.form), ""), "image")

    def picture_modalities(self) -> frozenset[Modality]:
        return frozenset(self.image_columns())

    def metrics(self) -> Sequence[str]:
        return self.judged_by

    def client_column(self) -> str:
        return "client" if self.columns.client else ""

    def group_column(self) -> str:
        return self.group

    def folders(self) -> tuple[Path, ...]:
        return (self.images or self.root,)

    def load(self, split: Split) -> Rows:
        own = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if not own and not (split == "validation" or self.test_rate or self.test_column):
            raise ConfigError(
                f"data.{split}: missing; name a file or folder under {self.root}, or hold out rows: data.test_rate"
            )
        if split != "test" and not self.columns.answer:
            raise ConfigError(
                f'data.columns.answer: got ""; rows of the {split} split need answers: name their column in '
                f"{self.root / (own or self.train)}"
            )
        named = own or self.train
        rows = self._read(named, split == "test" and bool(own), self.on_bad_row)
        rows = self._with_answers(rows, named) if self.columns.answer else rows
        examples = rows.examples
        if named == self.train and (split != "test" or not own) and (split != "train" or self._holds_out()):
            examples = tuple(e for e in examples if self._split_of(e) == split)
        notes = (*rows.notes, *self._short_texts(examples), *self._alike_names(examples))
        rows = replace(rows, examples=examples, notes=notes)
        return filled(rows, self.root / named, split)

    def _holds_out(self) -> bool:
        return bool(self.test_rate or self.test_column or (self.validation_rate and not self.validation))

    def _split_of(self, row: Example) -> Split:
        """The split of a row of the training file. A group, or else a row, gets the same one in every run and file order."""
        key = row.columns[self.group] if self.group else str(row.id)
        split = SPLIT_WORDS[row.columns[self.test_column].lower()] if self.test_column else "train"
        if self.test_rate and held_out(self.test_rate, f"test/{key}"):
            return "test"
        if split == "train" and not self.validation and held_out(self.validation_rate, key):
            return "validation"
        return split

    # --- reading

    def _read(self, named: str, own_test: bool, on_bad_row: OnBadRow) -> Rows:
        """All rows of a split's files, with answers as they are written.

        Args:
            named: The file, folder or pattern.
            own_test: The file is for test rows only, which may lack the columns of client and groups.
            on_bad_row: As in the settings.
        """
        files = files_of(named, self.root, self.form, self.images)
        options, seen, listed_images = self._options(files, named), {"file": ""}, set[Path]()
        loaded: list[Rows] = []
        for file in files:

            def make(where: str, row: RawRow, file: File = file) -> Example:
                seen.update(dict.fromkeys(row, where))
                if file.contents:
                    listed_images.update(_paths_in(row, options.images, file.images))
                return self._example(where, {"file": file.name, **row}, file, len(files) > 1, own_test)

            plan = self._plan(file, len(files) > 1, own_test)
            if plan and (plain := plain_rows(plan, on_bad_row)):
                loaded.append(plain[0])
                seen.update(dict.fromkeys(plain[1], ""))
            else:
                loaded.append(collect(rows_of(file, options), make, on_bad_row))
        if any(rows.examples for rows in loaded):
            self._check_columns(seen, files[0].path, own_test)
        skipped = tuple(message for rows in loaded for message in rows.skipped)
        examples, notes = _unique_ids(files, loaded)
        return Rows(examples, skipped, (*notes, *_notes_of_folders(files, listed_images)))

    def _options(self, files: Sequence[File], named: str) -> Options:
        c = self.columns
        images = tuple(self.image_columns().values())
        mapped = {
            *images,
            *by_modality(c.text, "text").values(),
            *self._readings(),
            *c.keep,
            self.group,
            self.test_column,
        }
        return Options(
            images=images,
            columns=frozenset(mapped | {c.id or "id", c.question, c.choices, c.answer, c.client}),
            answer=c.answer,
            choices=c.choices,
            labels=self._labels(files, named),
            delimiter=self.delimiter,
            sheet=self.sheet,
        )

    def _readings(self) -> dict[str, None]:
        """Columns of numbers and variants."""
        columns = (*self.columns.numbers().values(), *self.columns.genes().values())
        return dict.fromkeys(name for names in columns for name in names)

    def _labels(self, files: Sequence[File], named: str) -> tuple[str, ...]:
        """Labels of the training folders, the choices of every row; () if `choices` names them, or no file is a folder."""
        folders = [file for file in files if file.form == "imagefolder"]
        answer = self.columns.answer
        if folders and answer not in ("", Columns().answer):
            raise DataError(
                f"{folders[0].path}: a folder of pictures that has none of {', '.join(METADATA)}, so there is no column "
                f"{answer!r} (data.columns.answer); allowed: one of these files with the columns file_name and {answer}, or "
                "a subfolder of pictures per label, without data.columns.answer"
            )
        if not folders or self.choices or not answer:
            return ()
        trained = files_of(self.train, self.root, self.form, self.images) if named != self.train else folders
        labels = sorted({label for file in trained or folders if file.contents for label in file.contents.labels()})
        if len(labels) < 2:
            raise DataError(
                f"{folders[0].path}: a folder of pictures without answers; allowed: one of {', '.join(METADATA)} in it with "
                f"the columns file_name and {answer}, or its pictures in two or more subfolders called after their labels"
            )
        return tuple(labels)

    def folder_labels(self) -> tuple[str, ...]:
        """Return the labels of the training folders, where the choices are the names of subfolders; otherwise ()."""
        return self._labels(files_of(self.train, self.root, self.form, self.images), self.train)

    def _check_columns(self, seen: Mapping[str, str], path: Path, own_test: bool) -> None:
        """Raise DataError if no row has a column that is mapped: a modality's, or one that is not called as by default."""
        optional = {"image", "text", "keep", "series", "variants", "announced", *(["client"] if own_test else [])}
        default = Columns()
        named = {key: getattr(self.columns, key) for key in sorted(Columns.model_fields) if key not in optional}
        named = {key: column for key, column in named.items() if column != getattr(default, key)}
        mapped = {**self.image_columns(), **by_modality(self.columns.text, "text"), **named}
        groups = {"series": self.columns.numbers(), "variants": self.columns.genes()}
        placed = [
            (f"{key}.{m}", name) for key, columns in groups.items() for m, names in columns.items() for name in names
        ]
        for key, column in (*mapped.items(), *placed):
            if column and column not in seen:
                raise DataError(
                    f"{path}: no row has a column {column!r} (data.columns.{key}); columns: {listed(seen)}; "
                    "a column may be empty in every row, but it has to be there"
                )

    def _with_answers(self, rows: Rows, named: str) -> Rows:
        """The rows with their answers as choices, in one reading for all splits."""
        reading = self.answers
        if reading == "auto":
            examples = different_endings(rows.examples)
            if is_ambiguous(examples):
                for other in sorted({self.train, self.validation, self.test} - {named, ""}):
                    examples += self._read(other, other == self.test, "skip").examples
            reading = reading_of(examples)
        if all(as_choice(e.answer, e.choices, reading) == e.answer for e in different_endings(rows.examples)):
            return rows
        placed = ((example.where, example) for example in rows.examples)
        read = collect(placed, lambda _, example: read_answer(example, reading), self.on_bad_row)
        return replace(rows, examples=read.examples, skipped=(*rows.skipped, *read.skipped))

    def _short_texts(self, examples: Sequence[Example]) -> list[str]:
        """Notes on short texts that fill many cells: they may stand for a missing one."""
        notes = []
        for modality, column in by_modality(self.columns.text, "text").items():
            written = Counter(text for has in row_fields(examples) if isinstance(text := has.get(modality), str))
            short, number = Counter[str](), written.total()
            for text, count in written.items():
                if len(text.strip()) <= SHORT_TEXT:
                    short[text.strip()] += count
            for text, count in short.most_common(1):
                if count >= max(5, number / 10):
                    notes.append(
                        f"column {column!r}: {quoted(text)} fills {count} of {number} cells; "
                        "if it stands for a missing text, add it to data.na_values"
                    )
        return notes

    def _alike_names(self, examples: Sequence[Example]) -> list[str]:
        """Notes on clients and groups whose names differ in case alone: they count as different."""
        notes = []
        for column, key in ((self.columns.client, "client"), (self.group, self.group)):
            spellings: dict[str, str] = {}
            different = columns_of_rows(examples).used() if column else ()
            for name in dict.fromkeys(columns[key] for columns in different if key in columns):
                if (first := spellings.setdefault(name.casefold(), name)) != name:
                    notes.append(
                        f"column {column!r}: {quoted(first)} and {quoted(name)} differ in case alone and count as two"
                    )
        return notes

    # --- one row

    def _example(self, where: str, row: RawRow, file: File, is_one_of_many: bool, own_test: bool) -> Example:
        c = self.columns
        number = row.get(c.id or "id")
        if number is None and not c.id:
            number = f"{file.name}-{_index(where)}" if is_one_of_many else _index(where)
        number = as_id(number, c.id or "id", where)
        place = f"{where}: row {quoted(number)}"
        question, fields, pieces = self._asked(row, place, file)
        choices = choices_of(row.get(c.choices), c.choices, self.separator, self._na(file), place) or self.choices
        return Example(
            id=number,
            fields=fields,
            question=question,
            choices=choices,
            answer=self._answer(row, place, file, choices) if c.answer else "",
            where=where,
            columns=_one_mapping((("set", self.name), *self._groups(row, place, file, own_test).items())),
            pieces=pieces,
            announced=_one_set((*self.columns.announced, *self.columns.series, *self.columns.variants)),
        )

    def _plan(self, file: File, is_one_of_many: bool, own_test: bool) -> RowPlan | None:
        """Return how a CSV file is read column by column: by the methods that read a row, with a few of its cells."""
        if file.form != "csv" or file.contents or self._readings():
            return None
        c, images, texts = self.columns, self.image_columns(), by_modality(self.columns.text, "text")

        @lru_cache(MOST_KEPT)
        def pictures(*cells: str) -> dict[Modality, Content]:
            return self._images(dict(zip(images.values(), cells, strict=True)), "", file, [])

        def fields(row: RawRow) -> dict[Modality, Content]:
            pictured = pictures(*(row[name] for name in images.values()))
            if not texts:
                return pictured
            written = {m: take_text(row, n, "") for m, n in texts.items() if not file.is_empty(row[n], self.na_values)}
            return {**pictured, **written}

        def question(row: RawRow) -> str | None:
            if file.is_empty(row[c.question], self.na_values):
                return self.question
            text = take_text(row, c.question, "")
            return None if marks_in(text, "") else split_at_marks(text)[0]

        def answer(row: RawRow) -> tuple[tuple[str, ...], str]:
            choices = choices_of(row[c.choices], c.choices, self.separator, self._na(file), "") or self.choices
            return choices, self._answer(row, "", file, choices) if c.answer else ""

        def groups(row: RawRow) -> Mapping[str, str]:
            return _one_mapping((("set", self.name), *self._groups(row, "", file, own_test).items()))

        return RowPlan(
            file=file.path,
            delimiter=self.delimiter,
            name=file.name,
            id=c.id,
            prefix=f"{file.name}-" if is_one_of_many else "",
            fields=RowPart((*images.values(), *texts.values()), fields),
            question=RowPart((c.question,), question),
            answer=RowPart((c.choices, *filter(None, [c.answer])), answer),
            columns=RowPart(tuple(filter(None, (*c.keep, self.group, self.test_column, c.client))), groups),
            announced=_one_set(c.announced),
            make=lambda where, row: self._example(where, {"file": file.name, **row}, file, is_one_of_many, own_test),
        )

    def _na(self, file: File) -> tuple[str, ...]:
        return () if file.form == "conversations" else self.na_values

    def _asked(self, row: RawRow, place: str, file: File) -> tuple[str, dict[Modality, Content], tuple[str, ...]]:
        """Question, fields, and the pieces of the question between its pictures."""
        column = self.columns.question
        asked = not file.is_empty(row.get(column), self.na_values)
        question, pieces, marks = self.question, tuple[str, ...](), list[str]()
        if asked:
            text = take_text(row, column, place)
            marks = marks_in(text, place)
            question, pieces = split_at_marks(text)
        fields = self._images(row, place, file, marks)
        if pieces and len(self.image_columns()) > 1:
            raise DataError(f"{place}: {MARK} in the middle of a text is read for rows with one image column only")
        for modality, name in by_modality(self.columns.text, "text").items():
            if not file.is_empty(row.get(name), self.na_values):
                fields[modality] = take_text(row, name, place)
        if self._readings():
            c, na = self.columns, self._na(file)
            fields |= readings(row, c.numbers(), c.genes(), self.render, lambda cell: is_missing(cell, na), place)
        if not asked and not question and not any(isinstance(content, str) for content in fields.values()):
            raise DataError(f"{place}: no question: neither a column {column!r} nor data.question")
        return question, fields, pieces

    def _images(self, row: RawRow, place: str, file: File, marks: list[str]) -> dict[Modality, Content]:
        columns, fields = self.image_columns(), dict[Modality, Content]()
        for modality, column in columns.items():
            cell = row.get(column)
            if isinstance(cell, list):
                cell = [name for name in cell if not is_missing(name, self._na(file))]
            elif is_missing(cell, self._na(file)):
                cell = None
            names = pictures_of(marks if len(columns) == 1 else (), cell, column, place)
            if names:
                fields[modality] = tuple(picture(file.images, name, place) for name in names)
        number = sum(map(len, fields.values()))
        if marks and number != len(marks):
            raise DataError(f"{place}: the text asks for {len(marks)} pictures, the row has {number}")
        return fields

    def _answer(self, row: RawRow, place: str, file: File, choices: tuple[str, ...]) -> str:
        name = self.columns.answer
        answer = take_text(row, name, place).strip()
        if is_missing(answer, self._na(file)) and as_word(answer, choices) is None:
            raise DataError(f"{place}: {name!r} is empty{hint_at(answer)}")
        return answer

    def _groups(self, row: RawRow, place: str, file: File, own_test: bool) -> dict[str, str]:
        """Client, kept columns, group and split of a row; test rows have those that are there."""
        c, na = self.columns, self._na(file)
        wanted = {**{name: name for name in (*c.keep, self.group, self.test_column) if name}}
        wanted |= {"client": c.client} if c.client else {}
        if own_test:
            wanted = {key: name for key, name in wanted.items() if not is_missing(row.get(name), na)}
        found = {key: group(row, name, na, place) for key, name in wanted.items()}
        if self.test_column and found.get(self.test_column, "train").lower() not in SPLIT_WORDS:
            raise DataError(
                f"{place}: {self.test_column!r} is {quoted(found[self.test_column])}; allowed: {', '.join(SPLIT_WORDS)}"
            )
        return found


@lru_cache(maxsize=4096)
def _one_mapping(items: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
    """One mapping for all rows of a client, instead of one a row."""
    return dict(items)


@lru_cache(maxsize=64)
def _one_set(names: tuple[Modality, ...]) -> frozenset[Modality]:
    """One set for all rows."""
    return frozenset(names)


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


def _unique_ids(files: Sequence[File], loaded: Sequence[Rows]) -> tuple[Sequence[Example], tuple[str, ...]]:
    """The rows of all files; if an id stands in two files, every id begins with the name of its file."""
    if len(loaded) == 1:
        return loaded[0].examples, ()
    holders = Counter(id_key(e.id) for rows in loaded for e in rows.examples)
    twice = next((number for number, count in holders.items() if count > 1), None)
    if twice is None:
        return tuple(e for rows in loaded for e in rows.examples), ()
    named = (replace(e, id=f"{f.name}-{e.id}") for f, rows in zip(files, loaded, strict=True) for e in rows.examples)
    return tuple(named), (
        f"ids such as {quoted(twice)} stand in several files; each id now begins with its file's name",
    )


def _paths_in(row: RawRow, columns: Sequence[str], folder: Path) -> list[Path]:
    names = [name for column in columns for name in as_list(row.get(column))]
    return [folder / name.strip() for name in names if isinstance(name, str)]


def _notes_of_folders(files: Sequence[File], listed_images: set[Path]) -> list[str]:
    """Return notes on unread files of image folders: files of other kinds, and images that no metadata file lists."""
    notes: list[str] = []
    for contents in {id(file.contents): file.contents for file in files if file.contents}.values():
        notes += contents.notes()
        if contents.metadata:
            images = [path for path in contents.images if contents.folder / path not in listed_images]
            if images:
                notes.append(f"{contents.folder}: {len(images)} images are in no metadata file: {listed(images)}")
    return notes
