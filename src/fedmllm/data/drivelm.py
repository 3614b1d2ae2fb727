"""DriveLM-nuScenes: questions about keyframes of six cameras. Sima et al., arXiv:2312.14150."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from fedmllm.core.errors import DataError
from fedmllm.core.rows import Coded, LazyRows, Texts
from fedmllm.core.spec import ADDED_LATER
from fedmllm.core.types import Content, Modality
from fedmllm.data.base import Dataset, Rows, Source, Split, hint
from fedmllm.data.cells import alike
from fedmllm.data.prompts import LETTERS
from fedmllm.data.reading import (
    filled,
    find,
    half_character,
    held_out,
    is_blank,
    json_text,
    picture,
    quoted,
    take_filled,
    take_text,
)
from fedmllm.data.render import Render, check_names, readings
from fedmllm.data.vqa_rad import ANSWER_METRICS, YES_NO

CAMERAS = ("CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
Task = Literal["perception", "prediction", "planning", "behavior"]
DRIVELM_FILE = "v1_1_train_nus.json"
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
            QA_dataset_nus/{DRIVELM_FILE}            or {DRIVELM_FILE} in root itself
            nuscenes/samples/CAM_FRONT/*.jpg                and five more cameras   (`data show` needs no image)
            {{scene: {{key_frames: {{frame: {{QA: {{perception, prediction, planning, behavior: [{{Q, A, ...}}]}},
             image_paths: {{CAM_FRONT: "../nuscenes/samples/CAM_FRONT/x.jpg", ...}}}}}}}}}}
            with data.sensors, a key frame has as well:     sensors: {{speed: [12.1, 11.8, ...], ...}}""",
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
    sensors: Annotated[tuple[str, ...], ADDED_LATER] = ()
    """Series in the object `sensors` of a key frame, each a modality: ["speed", "range"]. The published file has none."""
    render: Annotated[Render, ADDED_LATER] = Render()
    """How series are written."""

    @field_validator("sensors")
    @classmethod
    def _are_no_cameras(cls, sensors: tuple[str, ...]) -> tuple[str, ...]:
        if "" in sensors or len({*sensors, *CAMERAS}) < len(sensors) + len(CAMERAS):
            raise ValueError("name each sensor once; cameras are not sensors")
        check_names(sensors, "data.sensors")
        return sensors

    @model_validator(mode="after")
    def _renders_sensors(self) -> DriveLM:
        self.render.check(self.sensors, "data.render")
        return self

    def modalities(self) -> tuple[Modality, ...]:
        return (*CAMERAS, *self.sensors)

    def picture_modalities(self) -> frozenset[Modality]:
        return frozenset(CAMERAS)

    def metrics(self) -> Sequence[str]:
        return ANSWER_METRICS

    def folders(self) -> tuple[Path, ...]:
        return (self.root,)

    def load(self, split: Split) -> Rows:
        return self.load_scenes(split, lambda scene: self._split_of(scene) == split)

    def load_scenes(self, split: Split, wanted: Callable[[str], bool]) -> Rows:
        """Read the rows of some scenes.

        Args:
            split: Which rows they are, for error messages.
            wanted: True for the name of a scene that is read.

        Returns:
            As `load` does.

        Raises:
            DataError: As by `load`.
        """
        path = find(self.root, f"QA_dataset_nus/{DRIVELM_FILE}", DRIVELM_FILE, hint=hint(self.name))
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
        ours = {name: scene for name, scene in scenes.items() if wanted(name)}
        return filled(self._collected(path, self._lists(path, ours)), path, split)

    def _collected(self, path: Path, lists: Iterator[_Questions | DataError]) -> Rows:
        """The rows of the lists, as `collect` gives them: a third of a million, so they are columns."""
        columns, faults = _Columns(path), list[tuple[int, DataError]]()  # with the number of rows before each
        for several in lists:
            if isinstance(several, DataError):
                faults.append((len(columns.codes), several))
            else:
                columns.add(several)
        rows, others = columns.rows(frozenset(self.sensors))
        faults = sorted([*faults, *others], key=lambda fault: fault[0])
        if faults and self.on_bad_row == "fail":
            raise faults[0][1]
        skipped = tuple(str(error) for _, error in faults)
        if skipped and not rows:
            raise DataError(f"{skipped[0]} (and so for every row: none of {len(skipped)} can be used)")
        return Rows(rows, skipped)

    def _split_of(self, scene: str) -> Split:
        if held_out(self.test_rate, f"test/{scene}"):
            return "test"
        return "validation" if held_out(self.validation_rate, f"validation/{scene}") else "train"

    def _lists(self, path: Path, scenes: Mapping[str, Any]) -> Iterator[_Questions | DataError]:
        """The questions of each key frame and task, or an error in their place."""
        seen = set[str]()
        for scene, frame, entry in _frames(scenes):
            name = f"{scene}/{frame}"
            place = f"{path}: {name}"
            if isinstance(entry, DataError):
                yield DataError(f"{place}: {entry}")
                continue
            if name in seen:  # "a/b" + "c" and "a" + "b/c"
                yield DataError(f"{place}: another key frame has this name")
                continue
            seen.add(name)
            try:
                fields = self._cameras(entry["image_paths"], place)
                if self.sensors:
                    fields |= self._readings(entry.get("sensors"), place)
            except DataError as error:
                yield error
                continue
            for task in self.tasks:
                asked = entry["QA"].get(task) or []
                if not isinstance(asked, list):
                    yield DataError(f"{place}: QA.{task} is {quoted(asked)}, not a list")
                    continue
                about = {"set": self.name, "scene": scene, "frame": frame, "task": task}
                yield _Questions(f"{name}/{task}/", asked, fields, about)

    def _readings(self, sensors: object, place: str) -> dict[Modality, str]:
        """The series of a key frame as text; a sensor that it lacks is a modality that its rows lack."""
        if not isinstance(sensors, dict | None):
            raise DataError(f"{place}: sensors is {quoted(sensors)}; an object of series is expected")
        one = {name: (name,) for name in self.sensors}
        return readings(sensors or {}, one, {}, self.render, lambda cell: cell is None, place)

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


@dataclass(frozen=True)
class _Questions:
    """The questions of one key frame and task. Their rows share pictures and columns."""

    name: str  # beginning of the ids
    asked: list[Any]
    fields: Mapping[Modality, Content]
    about: Mapping[str, str]


class _Endings(dict[object, int]):
    """Answer as in the file -> the code of the choices and the answer, or -1 if the row has to be read as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[tuple[str, ...], str]] = []

    def __missing__(self, written: object) -> int:
        answer = written.strip() if isinstance(written, str) else ""
        plain = answer.lower().rstrip(".")
        self[written] = -1
        if len(plain) > 1 and not is_blank(plain):  # neither an option's letter nor nothing
            self[written] = self.add((YES_NO, plain) if plain in YES_NO else ((), answer))
        return self[written]

    def add(self, ending: tuple[tuple[str, ...], str]) -> int:
        """Return the code of a further ending."""
        self.found.append(ending)
        return len(self.found) - 1


class _Columns:
    """Columns of the rows that are read."""

    def __init__(self, path: Path) -> None:
        self.path, self.endings = path, _Endings()
        self.lists: list[_Questions] = []
        self.questions: list[str] = []
        self.codes: list[int] = []  # of the endings

    def add(self, several: _Questions) -> None:
        """Add rows."""
        try:
            questions = [row["Q"].strip() for row in several.asked]
            codes = [self.endings[row["A"]] for row in several.asked]
        except (AttributeError, KeyError, TypeError):
            questions, codes = [""] * len(several.asked), [-1] * len(several.asked)
        self.lists.append(several)
        self.questions += questions
        self.codes += codes

    def rows(self, announced: frozenset[Modality]) -> tuple[LazyRows, list[tuple[int, DataError]]]:
        """The rows, and the index and the fault of each that is not among them."""
        sizes = np.array([len(several.asked) for several in self.lists], np.int64)
        list_of = np.repeat(np.arange(len(sizes)), sizes)
        within = np.arange(len(list_of)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # index of a row in its list
        numbers = list(map(str, range(max(sizes, default=0))))
        text = "".join(several.name.join(["", *numbers[: len(several.asked)]]) for several in self.lists)
        of_name = np.array([len(several.name) for several in self.lists], np.int64)
        ids = Texts(text, of_name[list_of] + np.array(list(map(len, numbers)), np.int64)[within])
        codes, faults = np.array(self.codes, np.int32), dict[int, DataError]()
        for row in np.flatnonzero(codes < 0).tolist():
            try:
                asked = self.lists[list_of[row]].asked[within[row]]
                self.questions[row], choices, answer = _asked(_place(self.path, ids, row), asked)
                codes[row] = self.endings.add((choices, answer))
            except DataError as error:
                faults[row] = error
        if faults:
            kept = [row for row in range(len(codes)) if row not in faults]
            ids, codes, list_of = Texts.of(ids.at(kept)), codes[kept], list_of[kept]
            self.questions = [self.questions[row] for row in kept]
        closed = np.array([bool(choices) for choices, _ in self.endings.found], np.int64)
        kinds = ("OPEN", "CLOSED")
        columns = [{**several.about, "answer_type": kind} for several in self.lists for kind in kinds]
        found = LazyRows(
            ids=ids,
            fields=Coded([several.fields for several in self.lists], list_of),
            questions=self.questions,
            endings=Coded(self.endings.found, codes),
            columns=Coded(columns, 2 * list_of + closed[codes]),
            place=partial(_place, self.path, ids),
            announced=announced,
        )
        return found, list(faults.items())


def _place(path: Path, ids: Texts, row: int) -> str:
    list_, _, index = ids[row].rpartition("/")
    return f"{path}: {list_}[{index}]"


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
    question, answer = take_text(row, "Q", where).strip(), take_filled(row, "A", where)
    choices: tuple[str, ...] = ()
    plain = answer.lower().rstrip(".")
    if plain in YES_NO:
        choices, answer = YES_NO, plain
    elif len(plain) == 1 and ASK in question:
        question, options = _options(question, where)
        if plain.upper() not in options:
            raise DataError(f"{where}: the answer {quoted(answer)} is none of {', '.join(options)}")
        choices, answer = tuple(options.values()), options[plain.upper()]
    elif plain.upper() in (letters := _LETTER.findall(question)) and {"A", "B"} <= set(letters):
        raise DataError(f"{where}: the answer {quoted(answer)} is an option's letter; options come after {ASK!r}")
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
