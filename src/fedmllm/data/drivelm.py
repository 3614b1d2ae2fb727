"""DriveLM-nuScenes: questions about keyframes of six cameras. Sima et al., arXiv:2312.14150."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedmllm.core.errors import DataError
from fedmllm.core.types import Content, Example, Modality
from fedmllm.data.base import Dataset, Rows, Source, Split, hint
from fedmllm.data.cells import alike
from fedmllm.data.prompts import LETTERS
from fedmllm.data.reading import (
    collect,
    filled,
    find,
    half_character,
    held_out,
    json_text,
    picture,
    quoted,
    take_answer,
    take_text,
)
from fedmllm.data.vqa_rad import METRICS, YES_NO

CAMERAS = ("CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
Task = Literal["perception", "prediction", "planning", "behavior"]
FILE = "v1_1_train_nus.json"
ASK = "Please select the correct answer from the following options:"
_LETTER = re.compile(r"(?:^|(?<=\s))([A-Z])\.(?=\s|$)")


class DriveLM(Dataset):
    """A modality is a camera; a row is one question about one keyframe and shows up to six images.

    The answers of the public test split are not public, so a share of the training scenes is kept for the test.
    """

    source: ClassVar[Source] = Source(
        title="DriveLM-nuScenes v1.1",
        get="https://github.com/OpenDriveLab/DriveLM (questions, and keyframe images of nuScenes)",
        licence="CC BY-NC-SA 4.0; images under the terms of nuScenes (non-commercial)",
        tree=f"""\
            QA_dataset_nus/{FILE}            or {FILE} in root itself
            nuscenes/samples/CAM_FRONT/*.jpg                and five more cameras   (`data show` needs no image)
            {{scene: {{key_frames: {{frame: {{QA: {{perception, prediction, planning, behavior: [{{Q, A, ...}}]}},
             image_paths: {{CAM_FRONT: "../nuscenes/samples/CAM_FRONT/x.jpg", ...}}}}}}}}}}""",
        paper="arXiv:2312.14150",
    )

    name: Literal["drivelm"] = "drivelm"
    root: Path
    """Folder of the set."""
    tasks: tuple[Task, ...] = Field(("perception", "prediction", "planning", "behavior"), min_length=1)
    """Kinds of questions."""
    test_rate: float = Field(0.1, gt=0, lt=1)
    """Share of the scenes that are held out as test rows."""
    validation_rate: float = Field(0.0, ge=0, lt=1)
    """Share of the other scenes that are held out as validation rows."""

    def modalities(self) -> tuple[Modality, ...]:
        return CAMERAS

    def metrics(self) -> Sequence[str]:
        return METRICS

    def folders(self) -> tuple[Path, ...]:
        return (self.root,)

    def load(self, split: Split) -> Rows:
        path = find(self.root, f"QA_dataset_nus/{FILE}", FILE, hint=hint(self.name))
        try:
            scenes = json.loads(text := json_text(path))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} in column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON of scenes: {error}") from None
        if not isinstance(scenes, dict):
            raise DataError(f"{path}:1: an object of scenes is expected here")
        if half := half_character(scenes, text):
            raise DataError(f"{path}: {half} is half of a character; write the other half too, or leave it out")
        ours = {name: scene for name, scene in scenes.items() if self._split_of(name) == split}
        return filled(collect(self._rows(path, ours), lambda _, row: row, self.on_bad_row), path, split)

    def _split_of(self, scene: str) -> Split:
        if held_out(self.test_rate, f"test/{scene}"):
            return "test"
        return "validation" if held_out(self.validation_rate, f"validation/{scene}") else "train"

    def _rows(self, path: Path, scenes: Mapping[str, Any]) -> Iterator[tuple[str, Example | DataError]]:
        """Rows of a keyframe share their pictures and columns: there are hundreds of thousands of them."""
        for scene, frame, entry in _frames(scenes):
            place = f"{path}: {scene}/{frame}"
            if isinstance(entry, DataError):
                yield place, DataError(f"{place}: {entry}")
                continue
            try:
                fields = self._cameras(entry["image_paths"], place)
            except DataError as error:
                yield place, error
                continue
            for task in self.tasks:
                about = {"set": self.name, "scene": scene, "frame": frame, "task": task}
                about_open, about_closed = ({**about, "answer_type": kind} for kind in ("OPEN", "CLOSED"))
                before, name = f"{place}/{task}[", f"{scene}/{frame}/{task}/"
                asked = entry["QA"].get(task) or []
                if not isinstance(asked, list):
                    yield place, DataError(f"{place}: QA.{task} is {quoted(asked)}, not a list")
                    continue
                for index, row in enumerate(asked):
                    where = f"{before}{index}]"
                    try:
                        question, choices, answer = _asked(where, row)
                    except DataError as error:
                        yield where, error
                        continue
                    columns = about_closed if choices else about_open
                    yield where, Example(f"{name}{index}", fields, question, choices, answer, where, columns)

    def _cameras(self, paths: Mapping[str, object], place: str) -> dict[Modality, Content]:
        """The published paths begin with "../nuscenes/", as seen from the questions' folder."""
        fields: dict[Modality, Content] = {}
        for camera in CAMERAS:
            if camera in paths:
                name = paths[camera]
                name = name.removeprefix("../") if isinstance(name, str) and name.startswith("../nuscenes/") else name
                fields[camera] = (picture(self.root, name, place),)
        if odd := sorted(paths.keys() - fields.keys()):
            raise DataError(f"{place}: unknown camera {quoted(odd[0])}; allowed: {', '.join(CAMERAS)}")
        return fields


def _frames(scenes: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(scene, frame, entry), or a DataError in the entry's place."""
    for scene, content in scenes.items():
        frames = content.get("key_frames") if isinstance(content, dict) else None
        if not isinstance(frames, dict):
            yield scene, "", DataError("no 'key_frames' in this scene")
            continue
        for frame, entry in frames.items():
            fine = isinstance(entry, dict) and all(isinstance(entry.get(key), dict) for key in ("QA", "image_paths"))
            yield scene, frame, entry if fine else DataError("a keyframe with 'QA' and 'image_paths' is expected")


def _asked(where: str, row: object) -> tuple[str, tuple[str, ...], str]:
    """Question, choices and answer."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: an object with Q and A is expected, not {quoted(row)}")
    question, answer = take_text(row, "Q", where).strip(), take_answer(row, "A", where)
    choices: tuple[str, ...] = ()
    plain = answer.lower().rstrip(".")
    if plain in YES_NO:
        choices, answer = YES_NO, plain
    elif len(plain) == 1 and ASK in question:
        question, options = _options(question, where)
        if plain.upper() not in options:
            raise DataError(f"{where}: the answer {quoted(answer)} is none of {', '.join(options)}")
        choices, answer = tuple(options.values()), options[plain.upper()]
    return question, choices, answer


def _options(question: str, where: str) -> tuple[str, dict[str, str]]:
    """Split "Why? Please select ... options: A. x B. y" into the question and {"A": "x", "B": "y"}, in order of the letters.

    Raises:
        DataError: The letters are not A, B, ..., each once, or two options have the same text: the options cannot be
            distinguished from letters inside their texts.
    """
    head, _, tail = question.partition(ASK)
    before, *rest = _LETTER.split(tail.strip())
    options = {letter: text.strip() for letter, text in sorted(zip(rest[::2], rest[1::2], strict=True))}
    letters, texts = "".join(options), list(options.values())
    if before or len(rest) != 2 * len(options) or not LETTERS.startswith(letters) or "" in texts or alike(texts):
        raise DataError(
            f"{where}: options {quoted(tail.strip())}; expected: A, B, ..., each once, with different texts"
        )
    return head.strip(), options
