"""Embedded data sets, drawn from a seed at first use.

Their files have the forms of Hateful Memes and CrisisMMD; their content is harmless: cartoons with a face, and
captions. The law of the labels is known, so the best score that any model can reach is known too (`ceilings`).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from fedmllm.core.rng import stream
from fedmllm.core.types import Example, Modality, Visible
from fedmllm.data import crisismmd, hateful_memes
from fedmllm.data.base import Dataset, Rows, Split
from fedmllm.data.captions import caption, tweet
from fedmllm.data.ceilings import LawCell, many_way, two_way
from fedmllm.data.crisismmd import CrisisMMD
from fedmllm.data.hateful_memes import HatefulMemes
from fedmllm.data.scenes import COLOURS, FACES, SKIES, THINGS, Scene, draw, pick

if TYPE_CHECKING:
    import numpy as np

VERSION = 3  # part of the folder's name: raise it with any change of what is drawn

# (face, tone) -> share of the rows. The caption is ironic where its tone contradicts the face (40 % of the rows).
# Ironic rows are a little more often a frown under good words than the reverse, and never calm or plain: a weak
# signal in each modality.
_IRONY: Mapping[tuple[str, str], float] = {
    ("smile", "bad"): 0.18,
    ("frown", "good"): 0.22,
    ("smile", "good"): 0.24,
    ("frown", "bad"): 0.18,
    ("calm", "good"): 0.03,
    ("calm", "bad"): 0.03,
    ("smile", "plain"): 0.03,
    ("frown", "plain"): 0.03,
    ("calm", "plain"): 0.06,
}
_CONTRADICTIONS = {("smile", "bad"), ("frown", "good")}
_NIGHT_RATE = {True: 0.60, False: 0.25}  # by irony: a second weak signal in the picture,
_SURE_RATE = {True: 0.42, False: 0.12}  # and in the text ("sure , what a lovely day")

_KIND = {"person": "figure", "tent": "shelter", "house": "shelter", "car": "vehicle", "boat": "vehicle"}  # else goods
_KINDS = {"figure": 0.34, "shelter": 0.26, "vehicle": 0.2, "goods": 0.2}  # share of the rows
_THEMES = {"trouble": 0.3, "search": 0.25, "need": 0.25, "play": 0.2}
# (kind of thing, theme of the tweet) -> index of the class. Only "play" determines the class by itself.
_CRISIS: Mapping[tuple[str, str], int] = {
    ("figure", "trouble"): 2,
    ("shelter", "trouble"): 1,
    ("vehicle", "trouble"): 5,
    ("goods", "trouble"): 6,
    ("figure", "search"): 3,
    ("shelter", "search"): 0,
    ("vehicle", "search"): 4,
    ("goods", "search"): 4,
    ("figure", "need"): 0,
    ("shelter", "need"): 6,
    ("vehicle", "need"): 6,
    ("goods", "need"): 4,
    ("figure", "play"): 7,
    ("shelter", "play"): 7,
    ("vehicle", "play"): 7,
    ("goods", "play"): 7,
}


def cache_folder() -> Path:
    """$FEDMLLM_CACHE, or fedmllm's place in the user's cache folder of the platform."""
    if chosen := os.environ.get("FEDMLLM_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fedmllm"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fedmllm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmllm"


class Synthetic(Dataset):
    """A set that is drawn once into the cache. The first rows of a split do not depend on how many are asked for."""

    seed: NonNegativeInt = 0
    """Seed of the drawn rows."""
    num_train: PositiveInt = 800
    """Number of training rows."""
    num_validation: PositiveInt = 100
    """Number of validation rows."""
    num_test: PositiveInt = 300
    """Number of test rows."""

    def modalities(self) -> tuple[Modality, ...]:
        return ("image", "text")

    def folder(self) -> Path:
        """Return the folder of the files; they are drawn now if they are not there yet."""
        sizes = f"{self.num_train}-{self.num_validation}-{self.num_test}"
        folder = cache_folder() / self.name / f"v{VERSION}-seed{self.seed}-{sizes}{self._variant()}"
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
        try:
            self._write(draft)
            draft.chmod(0o755)  # mkdtemp's folder is private
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its files are the same as ours
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return folder

    def _variant(self) -> str:
        """Part of the folder's name for settings of the law, if the set has any."""
        return ""

    def _sizes(self) -> Mapping[Split, int]:
        return {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}

    def _rng(self, split: Split, index: int) -> np.random.Generator:
        return stream(self.seed, self.name, split, index)

    @abstractmethod
    def _write(self, folder: Path) -> None: ...


class SyntheticMemes(Synthetic):
    """A 2-way set in the files of Hateful Memes: *.jsonl with id, img, label, text, and img/*.png."""

    question: ClassVar[str]
    choices: ClassVar[tuple[str, str]]  # in the order of the prompt
    labels: ClassVar[tuple[str, str]]  # the answer of label 0, of label 1

    @abstractmethod
    def row(self, rng: np.random.Generator) -> tuple[Scene, str, bool]:
        """One row: its picture, its text and its label."""

    def metrics(self) -> Sequence[str]:
        return ("auc", "auc_hard", "accuracy")

    def load(self, split: Split) -> Rows:
        rows = HatefulMemes(root=self.folder(), on_bad_row=self.on_bad_row).load(split)
        return Rows(tuple(self._example(example) for example in rows.examples), rows.skipped)

    def frame(self) -> tuple[str, tuple[str, str], tuple[str, str]]:
        """Return the question, the choices in the order of the prompt, and the answers of labels 0 and 1."""
        return self.question, self.choices, self.labels

    def _example(self, row: Example) -> Example:
        """The same row under this set's question."""
        question, choices, labels = self.frame()
        answer = labels[hateful_memes.HATEFUL_CHOICES.index(row.answer)]
        columns = {**row.columns, "set": self.name}
        return replace(row, question=question, choices=choices, answer=answer, columns=columns)

    def _write(self, folder: Path) -> None:
        (folder / "img").mkdir()
        number = 0
        for split, size in self._sizes().items():
            with (folder / hateful_memes.FILES[split]).open("w", encoding="utf-8", newline="\n") as file:
                for index in range(size):
                    number += 1
                    rng = self._rng(split, index)
                    scene, text, label = self.row(rng)
                    name = f"img/{number:05d}.png"
                    draw(scene, rng).save(folder / name, compress_level=1)
                    row = {"id": number, "img": name, "label": int(label), "text": text}
                    file.write(json.dumps(row) + "\n")


class SyntheticIrony(SyntheticMemes):
    """Embedded set "Is the caption ironic?": 2-way; the label is almost an interaction of picture and text alone."""

    question = "Is the content ironic?"
    choices = labels = ("sincere", "ironic")

    name: Literal["synthetic-irony"] = "synthetic-irony"

    def row(self, rng: np.random.Generator) -> tuple[Scene, str, bool]:
        return irony_row(rng)

    def ceilings(self, visible: Visible) -> Mapping[str, float]:
        return two_way(irony_cells(), visible)


class SyntheticCrisis(Synthetic):
    """Embedded set with CrisisMMD's eight classes, in a toy town after a windy day; the files of CrisisMMD v2.0."""

    name: Literal["synthetic-crisis"] = "synthetic-crisis"

    def metrics(self) -> Sequence[str]:
        return ("macro_f1", "accuracy")

    def ceilings(self, visible: Visible) -> Mapping[str, float]:
        return many_way(crisis_cells(), visible)

    def load(self, split: Split) -> Rows:
        rows = CrisisMMD(root=self.folder(), on_bad_row=self.on_bad_row).load(split)
        named = (replace(row, columns={**row.columns, "set": self.name}) for row in rows.examples)
        return Rows(tuple(named), rows.skipped)

    def _write(self, folder: Path) -> None:
        images = Path("data_image/toy_town/1_1_2025")
        (folder / images).mkdir(parents=True)
        tables = folder / "crisismmd_datasplit_all"
        tables.mkdir()
        number = 10**17  # tweet ids have 18 digits
        for split, size in self._sizes().items():
            lines = ["\t".join(_CRISISMMD_COLUMNS)]
            for index in range(size):
                number += 1
                rng = self._rng(split, index)
                scene, text, label = crisis_row(rng)
                image = (images / f"{number}_0.png").as_posix()
                draw(scene, rng).save(folder / image, compress_level=1)
                name = crisismmd.CHOICES[label]
                tweet_text = f"{text} https://t.co/{number % 10**6}"  # real tweets end so; readers drop it
                lines.append("\t".join(
                    ("toy_town", str(number), f"{number}_0", tweet_text, image, name, name, name, "Positive")
                ))  # fmt: skip
            path = tables / f"task_humanitarian_text_img_{crisismmd.SPLITS[split]}.tsv"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def irony_row(rng: np.random.Generator) -> tuple[Scene, str, bool]:
    """One row of the 2-way set: its picture, its caption, and whether they contradict each other."""
    cells = list(_IRONY)
    face, tone = cells[int(rng.choice(len(cells), p=list(_IRONY.values())))]
    ironic = (face, tone) in _CONTRADICTIONS
    night = rng.random() < _NIGHT_RATE[ironic]
    sky = "night" if night else pick(("day", "dusk"), rng)
    opening = "sure ," if rng.random() < _SURE_RATE[ironic] else ""
    return Scene(sky, pick(THINGS, rng), pick(COLOURS, rng), face), caption(tone, rng, opening), ironic


def irony_cells() -> Iterator[LawCell]:
    """The law of `irony_row`: faces and skies by tones and openings."""
    for (face, tone), share in _IRONY.items():
        ironic = (face, tone) in _CONTRADICTIONS
        for night, sure in product((False, True), repeat=2):
            of_night = _NIGHT_RATE[ironic] if night else 1 - _NIGHT_RATE[ironic]
            of_sure = _SURE_RATE[ironic] if sure else 1 - _SURE_RATE[ironic]
            looks = {"image": (face, night), "text": (tone, sure)}
            yield LawCell(looks, share * of_night * of_sure, (0.0, 1.0) if ironic else (1.0, 0.0))


def crisis_row(rng: np.random.Generator) -> tuple[Scene, str, int]:
    """One row of the 8-way set: its picture, its tweet, and the index of its class."""
    kind = list(_KINDS)[int(rng.choice(4, p=list(_KINDS.values())))]
    theme = list(_THEMES)[int(rng.choice(4, p=list(_THEMES.values())))]
    things = [thing for thing in THINGS if _KIND.get(thing, "goods") == kind]
    scene = Scene(pick(SKIES, rng), pick(things, rng), pick(COLOURS, rng), pick(FACES, rng))
    return scene, tweet(theme, rng), _CRISIS[kind, theme]


def crisis_cells() -> Iterator[LawCell]:
    """The law of `crisis_row`: kinds of things by themes."""
    for (kind, theme), label in _CRISIS.items():
        labels = tuple(float(k == label) for k in range(len(crisismmd.CHOICES)))
        yield LawCell({"image": kind, "text": theme}, _KINDS[kind] * _THEMES[theme], labels)


_CRISISMMD_COLUMNS = (
    "event_name", "tweet_id", "image_id", "tweet_text", "image", "label", "label_text", "label_image",
    "label_text_image",
)  # fmt: skip
