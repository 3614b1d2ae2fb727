"""SLAKE: questions about radiology images in two languages. Liu et al., arXiv:2102.09542."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from fedmllm.core.errors import DataError
from fedmllm.core.types import Example, Modality
from fedmllm.data.base import Dataset, Rows, Source, Split, hint
from fedmllm.data.reading import (
    RawRow,
    collect,
    filled,
    find,
    json_rows,
    picture,
    quoted,
    take,
    take_filled,
    take_id,
    take_text,
)
from fedmllm.data.vqa_rad import ANSWER_METRICS, radiology_example

_FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.json",),
    "validation": ("validate.json", "validation.json"),
    "test": ("test.json",),
}
LANGUAGES = ("en", "zh")
_COLUMNS = ("location", "modality", "base_type", "content_type", "q_lang", "img_id", "img_name")


class Slake(Dataset):
    """One language at a time: each is split by image, but in another way, so both together leak 142 test images."""

    source: ClassVar[Source] = Source(
        title="SLAKE 1.0",
        get="https://www.med-vqa.com/slake (Slake1.0.zip)",
        licence="CC BY 4.0",
        tree="""\
            train.json, validate.json (or validation.json), test.json    1,061 English test rows
            imgs/xmlab1/source.jpg                                       642 images   (`data show` needs no image)""",
        paper="arXiv:2102.09542",
    )

    name: Literal["slake"] = "slake"
    root: Path
    """Folder of the set."""
    language: Literal["en", "zh"] = "en"
    """Language of the questions."""

    def modalities(self) -> tuple[Modality, ...]:
        return ("image",)

    def metrics(self) -> Sequence[str]:
        return ANSWER_METRICS

    def folders(self) -> tuple[Path, ...]:
        return (self.root,)

    def load(self, split: Split) -> Rows:
        path = find(self.root, *_FILES[split], hint=hint(self.name))
        return filled(collect(json_rows(path), self._example, self.on_bad_row), path, split)

    def _example(self, where: str, row: RawRow) -> Example | None:
        language = take_text(row, "q_lang", where).strip().lower()
        if language not in LANGUAGES:
            raise DataError(f"{where}: 'q_lang' is {quoted(row['q_lang'])}; allowed: {', '.join(LANGUAGES)}")
        if language != self.language:
            return None
        number = take_id(row, "qid", where)
        where_row = f"{where}: row {quoted(number)}"
        columns = {name: str(row[name]).strip() for name in _COLUMNS if row.get(name) is not None}
        answer_type = take_text(row, "answer_type", where_row).strip().upper()
        return radiology_example(
            id=number,
            image=picture(self.root / "imgs", take(row, "img_name", where_row), where_row),
            question=take_filled(row, "question", where_row),
            answer=take_filled(row, "answer", where_row),
            where=where,
            columns={"set": self.name, "answer_type": answer_type, **columns},
        )
