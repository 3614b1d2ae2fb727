"""CrisisMMD v2.0, humanitarian task. Alam et al., arXiv:1805.00713; splits of arXiv:2004.11838."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from fedmllm.core.errors import DataError
from fedmllm.core.types import Example, Modality
from fedmllm.data.base import Dataset, Rows, Source, Split, hint
from fedmllm.data.delimited import tsv_rows
from fedmllm.data.reading import RawRow, collect, filled, find, picture, quoted, take_text

SPLITS: dict[Split, str] = {"train": "train", "validation": "dev", "test": "test"}
CHOICES = (
    "affected_individuals",
    "infrastructure_and_utility_damage",
    "injured_or_dead_people",
    "missing_or_found_people",
    "rescue_volunteering_or_donation_effort",
    "vehicle_damage",
    "other_relevant_information",
    "not_humanitarian",
)


class CrisisMMD(Dataset):
    """The target is `label_image`, as in FedMLLM (arXiv:2411.14717).

    A tweet of nothing but links keeps its row and its text, which is then empty: the published partition counts it.
    """

    source: ClassVar[Source] = Source(
        title="CrisisMMD v2.0",
        get="https://crisisnlp.qcri.org/crisismmd (CrisisMMD_v2.0.tar.gz and the data splits)",
        licence="CC BY-NC-SA 4.0; tweets under the terms of Twitter",
        tree="""\
            crisismmd_datasplit_all/task_humanitarian_text_img_train.tsv   13,608 rows
            crisismmd_datasplit_all/task_humanitarian_text_img_dev.tsv     validation
            crisismmd_datasplit_all/task_humanitarian_text_img_test.tsv    2,237 rows
            data_image/california_wildfires/10_10_2017/917791044158185473_0.jpg   (`data show` needs no image)
            Columns: event_name, tweet_id, image_id, tweet_text, image, label, label_text, label_image, ...""",
        paper="arXiv:1805.00713, arXiv:2004.11838",
    )

    name: Literal["crisismmd"] = "crisismmd"
    root: Path
    """Folder of the set."""

    def modalities(self) -> tuple[Modality, ...]:
        return ("image", "text")

    def metrics(self) -> Sequence[str]:
        return ("macro_f1", "accuracy")

    def folders(self) -> tuple[Path, ...]:
        return (self.root,)

    def load(self, split: Split) -> Rows:
        file = f"task_humanitarian_text_img_{SPLITS[split]}.tsv"
        path = find(self.root, f"crisismmd_datasplit_all/{file}", file, hint=hint(self.name))
        return filled(collect(tsv_rows(path), self._example, self.on_bad_row), path, split)

    def _example(self, where: str, row: RawRow) -> Example:
        number = take_text(row, "image_id", where).strip()
        where_row = f"{where}: row {quoted(number)}"
        label = take_text(row, "label_image", where_row).strip()
        if label not in CHOICES:
            raise DataError(f"{where_row}: 'label_image' is {quoted(label)}; allowed: {', '.join(CHOICES)}")
        image = picture(self.root, take_text(row, "image", where_row), where_row)
        kept = ("event_name", "tweet_id", "label_text", "label_text_image")
        return Example(
            id=number,
            fields={"image": (image,), "text": without_links(take_text(row, "tweet_text", where_row))},
            question="What is the humanitarian category?",
            choices=CHOICES,
            answer=label,
            where=where,
            columns={"set": self.name, **{name: str(row[name]).strip() for name in kept if name in row}},
        )


def without_links(tweet: str) -> str:
    """The tweet without every `http...` word, then stripped."""
    return re.sub(r"http\S+", "", tweet).strip()
