"""VQA-RAD: clinicians' questions about radiology images. Lau et al., doi:10.1038/sdata.2018.251."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedmllm.core.errors import DataError
from fedmllm.core.spec import ADDED_LATER
from fedmllm.core.types import Example, Modality
from fedmllm.data.base import Dataset, Rows, Source, Split, hint
from fedmllm.data.reading import (
    RawRow,
    collect,
    filled,
    find,
    held_out,
    json_rows,
    picture,
    quoted,
    take,
    take_filled,
    take_id,
    take_text,
)

_PUBLIC = "VQA_RAD Dataset Public.json"
YES_NO = ("yes", "no")
PHRASES = ("freeform", "para", "frame", "test_freeform", "test_para", "test_frame")
ANSWER_METRICS = ("accuracy", "accuracy_open", "accuracy_closed", "token_f1")
_COLUMNS = ("image_organ", "question_type", "phrase_type", "image_name", "evaluation")


class VqaRad(Dataset):
    """Both forms on disk: the one public file, or trainset.json + testset.json (as MEVF and later work use it).

    "frame" rows are left out. There is no validation split: `validation_rate` of the training images can be held out. In the
    official split, 446 of the 451 test rows have a picture that training rows have too; `split = "picture"` keeps all rows of a
    picture together.
    """

    source: ClassVar[Source] = Source(
        title="VQA-RAD",
        get="https://osf.io/89kps (VQA_RAD Dataset Public.json and VQA_RAD Image Folder)",
        licence="CC0 1.0",
        tree="""\
            VQA_RAD Dataset Public.json    2,248 rows; or: trainset.json (3,064 rows) and testset.json (451 rows)
            VQA_RAD Image Folder/*.jpg     315 images; or: images/*.jpg   (`data show` needs no image)""",
        paper="doi:10.1038/sdata.2018.251",
    )

    name: Literal["vqa-rad"] = "vqa-rad"
    root: Path
    """Folder of the set."""
    split: Annotated[Literal["official", "picture"], ADDED_LATER] = "official"
    """Test rows of the published split, or all rows of a share of the pictures."""
    test_rate: Annotated[float, Field(gt=0, lt=1), ADDED_LATER] = 0.2
    """Share of the pictures that are held out as test rows, with `split = "picture"`."""
    validation_rate: float = Field(0.0, ge=0, lt=1)
    """Share of the (other) training images that are held out as validation rows."""

    def modalities(self) -> tuple[Modality, ...]:
        return ("image",)

    def metrics(self) -> Sequence[str]:
        return ANSWER_METRICS

    def folders(self) -> tuple[Path, ...]:
        return (self.root,)

    def load(self, split: Split) -> Rows:
        by_picture = self.split == "picture"
        of_test = split == "test"
        names = ("trainset.json", "testset.json") if by_picture else ("testset.json" if of_test else "trainset.json",)
        paths = list(dict.fromkeys(find(self.root, name, _PUBLIC, hint=hint(self.name)) for name in names))
        images = next((self.root / n for n in ("images", "VQA_RAD Image Folder") if (self.root / n).is_dir()), None)
        folder = images or self.root / "images"
        prefixes = ("", "test_") if by_picture else ("test_" if of_test and paths[0].name == _PUBLIC else "",)
        wanted = {f"{prefix}{phrase}" for prefix in prefixes for phrase in ("freeform", "para")}

        def make(where: str, row: RawRow) -> Example | None:
            phrase = str(row.get("phrase_type", "")).strip().lower()
            if phrase not in (*PHRASES, ""):
                raise DataError(f"{where}: 'phrase_type' is {quoted(phrase)}; allowed: {', '.join(PHRASES)}")
            if phrase not in wanted:
                return None
            example = self._example(where, row, folder)
            return example if self._split_of(example, of_test) == split else None

        known: dict[str, str] = {}
        loaded = [collect(json_rows(path), make, self.on_bad_row, known) for path in paths]
        rows = Rows(tuple(e for r in loaded for e in r.examples), sum((r.skipped for r in loaded), ()))
        return filled(rows, paths[0], split)

    def _split_of(self, example: Example, is_official_test: bool) -> Split:
        image = example.columns["image_name"]
        if self.split == "picture" and held_out(self.test_rate, f"test/{image}"):
            return "test"
        if self.split == "official" and is_official_test:
            return "test"
        return "validation" if held_out(self.validation_rate, image) else "train"

    def _example(self, where: str, row: RawRow, folder: Path) -> Example:
        number = take_id(row, "qid", where)
        where_row = f"{where}: row {quoted(number)}"
        image = picture(folder, take(row, "image_name", where_row), where_row)
        answer_type = take_text(row, "answer_type", where_row).strip().upper()
        columns = {name: str(row[name]).strip() for name in _COLUMNS if row.get(name) is not None}
        return radiology_example(
            id=number,
            image=image,
            question=take_filled(row, "question", where_row),
            answer=take_filled(row, "answer", where_row),
            where=where,
            columns={"set": self.name, "answer_type": answer_type, **columns},
        )


def radiology_example(
    id: int | str, image: Path, question: str, answer: str, where: str, columns: dict[str, str]
) -> Example:
    """Closed questions answered by yes or no are scored as two choices; all others are open, whatever their type says."""
    plain = answer.lower().rstrip(".")
    closed = columns["answer_type"] == "CLOSED" and plain in YES_NO
    return Example(
        id=id,
        fields={"image": (image,)},
        question=question,
        choices=YES_NO if closed else (),
        answer=plain if closed else answer,
        where=where,
        columns=columns,
    )
