"""The medical federation of FedMLLM: VQA-RAD and flashcards. arXiv:2411.14717."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from fedmllm.core.types import Example, Modality
from fedmllm.data.base import Dataset, Rows, Source, Split
from fedmllm.data.flashcards import Flashcards
from fedmllm.data.slake import Slake
from fedmllm.data.vqa_rad import ANSWER_METRICS, VqaRad


class Medical(Dataset):
    """Trained on VQA-RAD and the flashcards, tested on VQA-RAD and SLAKE; `columns["set"]` names the set of each row."""

    source: ClassVar[Source] = Source(
        title="The medical federation of FedMLLM: VQA-RAD, MedAlpaca flashcards, SLAKE",
        get="`fedmllm data where vqa-rad`, `... flashcards` and `... slake` say where to get the three sets",
        licence="each set's own",
        tree="""\
            vqa_rad/       as in `data where vqa-rad`
            flashcards/    as in `data where flashcards`
            slake/         as in `data where slake`; not needed with tests = ["vqa-rad"]
            Other folders: data.vqa_rad, data.flashcards and data.slake name them, absolute or under data.root.""",
        paper="arXiv:2411.14717",
    )

    name: Literal["medical"] = "medical"
    root: Path
    """Folder of the three sets."""
    vqa_rad: Path = Path("vqa_rad")
    """Folder of VQA-RAD, absolute or under `root`."""
    flashcards: Path = Path("flashcards")
    """Folder of the flashcards."""
    slake: Path = Path("slake")
    """Folder of SLAKE."""
    tests: tuple[Literal["vqa-rad", "slake"], ...] = Field(("vqa-rad", "slake"), min_length=1)
    """Sets that are tested on."""
    validation_rate: float = Field(0.0, ge=0, lt=1)
    """Share of the training images and cards that are held out as validation rows."""

    def modalities(self) -> tuple[Modality, ...]:
        return ("image", "text")

    def metrics(self) -> Sequence[str]:
        return ANSWER_METRICS

    def folders(self) -> tuple[Path, ...]:
        return (self.root / self.vqa_rad, self.root / self.slake)

    def load(self, split: Split) -> Rows:
        """VQA-RAD first, then flashcards or SLAKE; SLAKE's ids become "slake-17", since both sets count from 1."""
        rate, policy = self.validation_rate, self.on_bad_row
        images = VqaRad(root=self.root / self.vqa_rad, validation_rate=rate, on_bad_row=policy)
        if split != "test":
            cards = Flashcards(root=self.root / self.flashcards, validation_rate=rate, on_bad_row=policy)
            return _joined(images.load(split), cards.load(split))
        loaded = []
        if "vqa-rad" in self.tests:
            loaded.append(images.load("test"))
        if "slake" in self.tests:
            rows = Slake(root=self.root / self.slake, on_bad_row=policy).load("test")
            loaded.append(Rows(tuple(map(_with_set_in_id, rows.examples)), rows.skipped))
        return _joined(*loaded)


def _joined(*loaded: Rows) -> Rows:
    return Rows(tuple(e for r in loaded for e in r.examples), sum((r.skipped for r in loaded), ()))


def _with_set_in_id(example: Example) -> Example:
    return dataclasses.replace(example, id=f"{example.columns['set']}-{example.id}")
