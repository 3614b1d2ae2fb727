"""Hateful Memes: pictures with words. Kiela et al., arXiv:2005.04790."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from fedmllm.core.errors import DataError
from fedmllm.core.types import Example, Modality
from fedmllm.data.base import Dataset, Rows, Source, Split, hint
from fedmllm.data.reading import RawRow, collect, filled, find, jsonl_rows, picture, quoted, take, take_id, take_text

FILES: dict[Split, str] = {"train": "train.jsonl", "validation": "dev_seen.jsonl", "test": "test_seen.jsonl"}
HATEFUL_CHOICES = ("not-hateful", "hateful")  # label 0, label 1


class HatefulMemes(Dataset):
    """The folder as it is handed out: `*.jsonl` with id, img, label, text, and `img/*.png`.

    A meme without words keeps its row and its text, which is then empty: the published partition counts every row.
    """

    source: ClassVar[Source] = Source(
        title="Hateful Memes",
        get="https://hatefulmemeschallenge.com (Meta AI; the data set licence has to be accepted there)",
        licence="Hateful Memes data set licence: research only, no redistribution; images (c) Getty Images",
        tree="""\
            train.jsonl        8,500 rows: {"id": 42953, "img": "img/42953.png", "label": 0, "text": "..."}
            dev_seen.jsonl     validation
            test_seen.jsonl    1,000 rows with labels
            img/42953.png      (`data show` needs no image)""",
        paper="arXiv:2005.04790",
    )

    name: Literal["hateful-memes"] = "hateful-memes"
    root: Path
    """Folder of the set."""

    def modalities(self) -> tuple[Modality, ...]:
        return ("image", "text")

    def metrics(self) -> Sequence[str]:
        return ("auc", "auc_hard", "accuracy")

    def folders(self) -> tuple[Path, ...]:
        return (self.root,)

    def load(self, split: Split) -> Rows:
        path = find(self.root, FILES[split], hint=hint(self.name))
        return filled(collect(jsonl_rows(path), self._example, self.on_bad_row), path, split)

    def _example(self, where: str, row: RawRow) -> Example:
        """The image is found by `img`: copies of the set differ in whether `id` keeps its leading zeros."""
        number = take_id(row, "id", where)
        where_row = f"{where}: row {quoted(number)}"
        label = take_text(row, "label", where_row).strip()
        if label not in ("0", "1"):
            raise DataError(f"{where_row}: 'label' is {quoted(row['label'])}; allowed: 0, 1")
        image = picture(self.root, take(row, "img", where_row), where_row)
        return Example(
            id=number,
            fields={"image": (image,), "text": take_text(row, "text", where_row)},
            question="Is the content hateful?",
            choices=HATEFUL_CHOICES,
            answer=HATEFUL_CHOICES[int(label)],
            where=where,
            columns={"set": self.name},
        )
