"""Medical flashcards of MedAlpaca, for training only. Han et al., arXiv:2304.08247."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from fedmllm.core.errors import DataError
from fedmllm.core.types import Example, Modality
from fedmllm.data.base import Dataset, Rows, Source, Split, hint
from fedmllm.data.reading import RawRow, collect, filled, find, held_out, json_rows, take_filled, take_text

_FILE = "medical_meadow_wikidoc_medical_flashcards.json"


class Flashcards(Dataset):
    """A list of {instruction, input, output}: the question is the row's text, so that it can be hidden.

    The file has no ids: a row is called after its place in the list, "flashcard-0".
    """

    source: ClassVar[Source] = Source(
        title="MedAlpaca medical flashcards",
        get="https://huggingface.co/datasets/medalpaca/medical_meadow_medical_flashcards",
        licence="CC (see the page of the set)",
        tree=f"""\
            {_FILE}    33,955 rows: {{"instruction": ..., "input": ..., "output": ...}}""",
        paper="arXiv:2304.08247",
    )

    name: Literal["flashcards"] = "flashcards"
    root: Path
    """Folder of the set."""
    validation_rate: float = Field(0.0, ge=0, lt=1)
    """Share of the cards that are held out as validation rows."""

    def modalities(self) -> tuple[Modality, ...]:
        return ("text",)

    def metrics(self) -> Sequence[str]:
        return ("token_f1", "accuracy")

    def load(self, split: Split) -> Rows:
        if split == "test":
            raise DataError(f"{self.root}: {self.name} has no test rows; use it for training, as 'medical' does")
        path = find(self.root, _FILE, hint=hint(self.name))

        def make(where: str, row: RawRow) -> Example | None:
            number = f"flashcard-{where.rpartition('[')[2].removesuffix(']')}"
            if held_out(self.validation_rate, number) == (split == "train"):
                return None
            take_filled(row, "output", where)
            take_filled(row, "input", where)
            return Example(
                id=number,
                fields={"text": take_text(row, "input", where)},
                question="",
                choices=(),
                answer=take_text(row, "output", where),
                where=where,
                columns={"set": self.name, "answer_type": "OPEN"},
            )

        return filled(collect(json_rows(path), make, self.on_bad_row), path, split)
