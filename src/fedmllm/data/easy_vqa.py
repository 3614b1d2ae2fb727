"""easy-VQA (V. Zhou, 2019): questions about one coloured shape on a plain ground."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, model_validator

from fedmllm.core.errors import DataError
from fedmllm.core.metrics import accuracy, metric
from fedmllm.core.rng import stream_seed
from fedmllm.core.spec import ADDED_LATER
from fedmllm.core.types import Example, Modality, Prediction
from fedmllm.data.base import Dataset, Rows, Source, Split, hint
from fedmllm.data.reading import collect, filled, find, held_out, json_text, picture

PACKAGE = "easy_vqa"
_SHAPES = ("circle", "rectangle", "triangle")
_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
_YES_NO = ("no", "yes")
_CHOICES = {"colour": _COLOURS, "shape": _SHAPES, "yes-no": _YES_NO}


class EasyVqa(Dataset):
    """4,000 + 1,000 pictures of 64 x 64 pixels, 38,575 + 9,673 questions, 13 answers; the official split.

    Columns for natural splits: `colour` and `shape` of the picture, as far as its own questions reveal them ("unknown"
    otherwise), `kind` of the question (colour, shape, yes-no) and `picture`. The set has no validation rows:
    `validation_rate` of the training pictures can be held out.
    """

    source: ClassVar[Source] = Source(
        title="easy-VQA",
        get="the package easy-vqa (pip install 'fedmllm[easy-vqa]'), or https://github.com/vzhou842/easy-VQA",
        licence="MIT",
        tree="""\
            train/questions.json     38,575 rows: ["what color is the shape?", "blue", 0]; 0 is the picture's number
            train/images/0.png       4,000 pictures   (`data show` needs no image)
            test/questions.json      9,673 rows
            test/images/0.png        1,000 pictures

            In an experiment, with the package installed:
              [data]
              name = "easy-vqa"
            or with `root = "the folder"`, which is easy_vqa/data of the repository.""",
        paper="https://victorzhou.com/blog/easy-vqa",
    )

    name: Literal["easy-vqa"] = "easy-vqa"
    root: Path | None = None
    """Folder of the set; none = the installed package `easy-vqa`."""
    choices: bool = False
    """Put the colours, the shapes or no/yes as lettered options; otherwise every question is open."""
    num_train: NonNegativeInt = 0
    """Number of training rows, the first ones of the order that `draw` gives; 0 = all."""
    draw: Annotated[Literal["first", "spread"], ADDED_LATER] = "first"
    """Order of the rows, of which `num_train` and `evaluate.limit` take the first. "first": as in the file, where the
    questions of a picture follow each other, so that 1,500 rows are of 153 pictures. "spread": a random question of each
    picture, then a second one of each, and so on."""
    seed: Annotated[NonNegativeInt, ADDED_LATER] = 0
    """Seed of draw "spread"; without it, 0."""
    validation_rate: float = Field(0.0, ge=0, lt=1)
    """Share of the training pictures that is held out for validation."""

    @model_validator(mode="after")
    def _seed_has_an_effect(self) -> EasyVqa:
        if self.seed and self.draw == "first":
            raise ValueError(f'seed: got {self.seed}; draw = "first" draws nothing; allowed: 0, or draw = "spread"')
        return self

    def modalities(self) -> tuple[Modality, ...]:
        return ("image",)

    def metrics(self) -> Sequence[str]:
        return ("accuracy", "accuracy_colour", "accuracy_shape", "accuracy_closed")

    def folders(self) -> tuple[Path, ...]:
        return (self.folder(),)

    def folder(self) -> Path:
        """`root`, or the data of the installed package. Raises DataError if there is neither."""
        if self.root:
            return self.root
        spec = find_spec(PACKAGE)
        if spec is None or not spec.origin:
            raise DataError(
                "data.root: missing, and the package easy-vqa is not installed; "
                f"pip install 'fedmllm[easy-vqa]', or name the folder: {hint(self.name)}"
            )
        return Path(spec.origin).parent / "data"

    def load(self, split: Split) -> Rows:
        own = "test" if split == "test" else "train"
        path = find(self.folder(), f"{own}/questions.json", hint=hint(self.name))
        rows = list(question_rows(path))
        attributes = picture_attributes([row for _, row in rows if not isinstance(row, DataError)])

        def make(where: str, row: tuple[str, str, int]) -> Example | None:
            if split != "test" and held_out(self.validation_rate, f"easy-vqa {row[2]}") == (split == "train"):
                return None
            return self._example(where, row, path.parent / "images", attributes[row[2]])

        found = filled(collect(iter(rows), make, self.on_bad_row), path, split)
        examples = found.examples if self.draw == "first" else one_of_each_picture(found.examples, self.seed, split)
        limit = self.num_train if split == "train" and self.num_train else None
        return Rows(examples[:limit], found.skipped)

    def _example(self, where: str, row: tuple[str, str, int], images: Path, about: dict[str, str]) -> Example:
        question, answer, number = row
        kind = next((kind for kind, answers in _CHOICES.items() if answer in answers), None)
        if kind is None:
            allowed = ", ".join(a for answers in _CHOICES.values() for a in answers)
            raise DataError(f"{where}: the answer is {answer!r}; allowed: {allowed}")
        answer_type = "CLOSED" if kind == "yes-no" else "OPEN"
        return Example(
            id=int(where.rpartition("[")[2].removesuffix("]")),
            fields={"image": (picture(images, f"{number}.png", where),)},
            question=question,
            choices=_CHOICES[kind] if self.choices else (),
            answer=answer,
            where=where,
            columns={"set": self.name, "answer_type": answer_type, "kind": kind, "picture": str(number), **about},
        )


def question_rows(path: Path) -> Iterator[tuple[str, tuple[str, str, int] | DataError]]:
    """The rows of a questions.json, [question, answer, picture], each with its place."""
    try:
        rows: Any = json.loads(json_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: a JSON list of rows is expected here, not {rows!r:.60}")
    for index, row in enumerate(rows):
        where = f"{path}[{index}]"
        match row:
            case [str() as question, str() as answer, int() as number] if not isinstance(number, bool):
                yield where, (question, answer, number)
            case _:
                yield where, DataError(f"{where}: [question, answer, number of a picture] is expected, not {row!r:.60}")


def one_of_each_picture(examples: Sequence[Example], seed: int, split: Split) -> tuple[Example, ...]:
    """Return the rows in a random order in which each picture has one question, before any has a second one."""
    pictures: dict[str, int] = {}
    seen: Counter[str] = Counter()
    placed = []
    for example in sorted(examples, key=lambda e: stream_seed(seed, "easy-vqa question", split, e.id)):
        name = example.columns["picture"]
        if name not in pictures:
            # Not the place of its first question: that would put pictures of many questions in front.
            pictures[name] = stream_seed(seed, "easy-vqa picture", split, name)
        placed.append((seen[name], pictures[name], example))
        seen[name] += 1
    return tuple(example for _, _, example in sorted(placed, key=lambda row: row[:2]))


def picture_attributes(rows: Sequence[tuple[str, str, int]]) -> dict[int, dict[str, str]]:
    """Picture -> its colour and shape, from what its questions mention and how they are answered."""
    found: dict[int, dict[str, str]] = {}
    for question, answer, number in rows:
        about = found.setdefault(number, {"colour": "unknown", "shape": "unknown"})
        words = question.rstrip("?").split()
        negated = "no" in words or "not" in words
        if answer not in _YES_NO or (answer == "yes") != negated:  # the question is about something that is there
            words.append(answer)
        elif answer in _YES_NO:
            continue
        for name, values in (("colour", _COLOURS), ("shape", _SHAPES)):
            about[name] = next((word for word in words if word in values), about[name])
    return found


@metric
def accuracy_colour(predictions: Sequence[Prediction]) -> float | None:
    """Accuracy over the questions of kind "colour" of easy-VQA."""
    return accuracy([p for p in predictions if p.example.columns.get("kind") == "colour"])


@metric
def accuracy_shape(predictions: Sequence[Prediction]) -> float | None:
    """Accuracy over the questions of kind "shape" of easy-VQA."""
    return accuracy([p for p in predictions if p.example.columns.get("kind") == "shape"])
