"""Embedded clinic: four modalities and a known label law."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedmllm.core.types import Modality, Visible
from fedmllm.data.base import Rows, Split
from fedmllm.data.captions import caption
from fedmllm.data.ceilings import LawCell, two_way
from fedmllm.data.scenes import COLOURS, SKIES, THINGS, Scene, draw, pick
from fedmllm.data.synthetic import Synthetic
from fedmllm.data.table import Table

if TYPE_CHECKING:
    import numpy as np

QUESTION = "Is the patient at risk?"
_CHOICES = ("no", "yes")
FINDING = {"smile": -1.0, "calm": 0.0, "frown": 1.0}  # in the picture: the face
REPORT = {"good": -1.0, "plain": 0.0, "bad": 1.0}  # tone of the words
LAB = {"low": -1.0, "normal": 0.0, "high": 1.0}  # of the marker; the other value means nothing
GENE = {"guards": -1.0, "none": 0.0, "harms": 1.0}
# The substances and genes do not exist: nothing here may be taken for medicine. Their names and the flags are words that the
# embedded model has met, one token each.
MARKER, OTHER = "amber", "birch"
LEVELS = {"low": (0.5, 4.4), "normal": (5.1, 19.0), "high": (22.0, 90.0)}  # of the marker; normal is 5 to 20
GENES = ("heron", "flint", "coral")  # the first harms, the second guards, the third means nothing
_COLUMNS: dict[str, Any] = {
    "id": "case",
    "image": "scan",
    "text": "report",
    "answer": "risk",
    "series": {"labs": (MARKER, OTHER)},
    "variants": {"genes": GENES},
}
RENDER: dict[str, Any] = {
    "units": {MARKER: "mg/l", OTHER: "g/l"},
    "ranges": {MARKER: (5.0, 20.0)},
    "flags": ("small", "normal", "large"),
}
_FILES: Mapping[Split, str] = {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"}


@dataclass(frozen=True)
class Patient:
    """One row: what each modality says, and the label."""

    face: str
    tone: str
    lab: str
    gene: str
    at_risk: bool


class SyntheticClinic(Synthetic):
    """Embedded set "Is the patient at risk?": four modalities, each of which can be missing, with uniform independent levels.

    With f, t, l, g the values of face, tone, marker and gene (-1, 0 or 1),

        P(y = 1) = sigmoid(image_weight f + text_weight t + labs_weight l + genes_weight g + interaction_weight (f t + l g))

    so no modality suffices, and pairs of them have to be read together. The files are a hospital's: CSV with a picture's path,
    a report, a column per lab value and one per gene, read by the data set `table`.
    """

    name: Literal["synthetic-clinic"] = "synthetic-clinic"
    image_weight: float = 1.6
    """Weight of the picture in the log odds."""
    text_weight: float = 1.6
    """Weight of the report in the log odds."""
    labs_weight: float = 1.6
    """Weight of the lab values in the log odds."""
    genes_weight: float = 1.6
    """Weight of the gene variants in the log odds."""
    interaction_weight: float = 1.0
    """Weight of the products picture x report and lab values x gene variants in the log odds."""

    def modalities(self) -> tuple[Modality, ...]:
        return ("image", "text", "labs", "genes")

    def picture_modalities(self) -> frozenset[Modality]:
        return frozenset({"image"})

    def metrics(self) -> Sequence[str]:
        return ("auc", "auc_hard", "accuracy")

    def table_settings(self) -> dict[str, Any]:
        return {"columns": {**_COLUMNS, "answer": ""}, "render": RENDER, "question": QUESTION, "choices": _CHOICES}

    def load(self, split: Split) -> Rows:
        table = {
            "name": "table",
            "root": self.folder(),
            **self.table_settings(),
            "columns": _COLUMNS,
            "na_values": ("",),
        }
        files = {str(key): name for key, name in _FILES.items()}
        rows = Table.pick({**table, **files, "on_bad_row": self.on_bad_row}, self.name).load(split)
        named = (replace(row, columns={**row.columns, "set": self.name}) for row in rows.examples)
        return replace(rows, examples=tuple(named))

    def row(self, rng: np.random.Generator) -> Patient:
        """Draw what a row says, and its label."""
        face, tone, lab, gene = (pick(tuple(levels), rng) for levels in (FINDING, REPORT, LAB, GENE))
        return Patient(face, tone, lab, gene, bool(rng.random() < self.probability(face, tone, lab, gene)))

    def probability(self, face: str, tone: str, lab: str, gene: str) -> float:
        """P(y = 1) of such a row."""
        f, t, v, g = FINDING[face], REPORT[tone], LAB[lab], GENE[gene]
        odds = self.image_weight * f + self.text_weight * t + self.labs_weight * v + self.genes_weight * g
        odds += self.interaction_weight * (f * t + v * g)
        return 0.5 * (1 + math.tanh(odds / 2))  # the sigmoid, without overflow

    def ceilings(self, visible: Visible) -> Mapping[str, float]:
        return two_way(self._cells(), visible)

    def _cells(self) -> Iterator[LawCell]:
        levels = (FINDING, REPORT, LAB, GENE)
        mass = 1 / math.prod(map(len, levels))
        for looks in product(*levels):
            positive = self.probability(*looks)
            yield LawCell(dict(zip(self.modalities(), looks, strict=True)), mass, (1 - positive, positive))

    def _variant(self) -> str:
        weights = (
            self.image_weight,
            self.text_weight,
            self.labs_weight,
            self.genes_weight,
            self.interaction_weight,
        )
        return f"-{hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:8]}"

    def _write(self, folder: Path) -> None:
        (folder / "scans").mkdir()
        number = 0
        for split, size in self._sizes().items():
            with (folder / _FILES[split]).open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(("case", "scan", "report", MARKER, OTHER, *GENES, "risk"))
                for index in range(size):
                    number += 1
                    rng = self._rng(split, index)
                    patient = self.row(rng)
                    scan = f"scans/{number:05d}.png"
                    scene = Scene(pick(SKIES, rng), pick(THINGS, rng), pick(COLOURS, rng), patient.face)
                    draw(scene, rng).save(folder / scan, compress_level=1)
                    cells = (*_lab_values(patient.lab, rng), *_variants(patient.gene, rng))
                    writer.writerow((number, scan, caption(patient.tone, rng), *cells, _CHOICES[patient.at_risk]))


def _lab_values(level: str, rng: np.random.Generator) -> tuple[str, str]:
    return f"{rng.uniform(*LEVELS[level]):.1f}", f"{rng.uniform(60, 90):.1f}"


def _variants(kind: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Variants of the three genes; half of all rows have one of the third, which means nothing."""
    harms, guards = f"R{rng.integers(10, 99)}H", f"G{rng.integers(10, 99)}D"
    third = f"L{rng.integers(10, 99)}P" if rng.random() < 0.5 else "wt"
    return harms if kind == "harms" else "wt", guards if kind == "guards" else "wt", third
