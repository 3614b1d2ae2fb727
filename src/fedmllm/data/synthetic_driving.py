"""Embedded driving set: six cameras and two sensors, files in DriveLM's form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedmllm.core.types import Example, Modality, Visible
from fedmllm.data.base import Rows, Split
from fedmllm.data.drivelm import ASK, CAMERAS, DRIVELM_FILE, DriveLM
from fedmllm.data.prompts import LETTERS
from fedmllm.data.scenes import COLOURS, FACES, SKIES, THINGS, Scene, draw, pick
from fedmllm.data.synthetic import Synthetic

if TYPE_CHECKING:
    import numpy as np

SENSORS = ("speed", "range")
_RENDER = {"units": {"speed": "m/s", "range": "m"}, "step_s": dict.fromkeys(SENSORS, 0.5)}
NUM_SAMPLES = 8
NUM_OPTIONS = 4  # of a question about the thing in a camera
OTHER_SKIES = tuple(sky for sky in SKIES if sky != "night")
OTHER_FACES = tuple(face for face in FACES if face != "frown")
# Question -> the modalities that decide its answer; a question about a thing needs the camera that it names.
NIGHT, SLOWER, NEARER, DANGER = (
    "Is it night?",
    "Does the car slow down?",
    "Does the thing in front come nearer?",
    "Is there danger in front: a frown that comes nearer?",
)
NEEDS: Mapping[str, str] = {NIGHT: "any camera", SLOWER: "speed", NEARER: "range", DANGER: "CAM_FRONT+range"}
TASKS: Mapping[str, str] = {NIGHT: "perception", SLOWER: "behavior", NEARER: "prediction", DANGER: "planning"}
NUM_QUESTIONS = 1 + len(NEEDS)  # of a key frame


@dataclass(frozen=True)
class Moment:
    """One key frame: the surroundings of the car, and whether it slows down and nears the thing in front of it."""

    cameras: Mapping[Modality, Scene]
    slower: bool
    nearer: bool

    @property
    def danger(self) -> bool:
        return self.nearer and self.cameras["CAM_FRONT"].face == "frown"


class SyntheticDriving(Synthetic):
    """Questions about six cameras, a speed and a distance series; a row needs a particular camera or sensor.

    A key frame is one scene: one sky, and around the car a thing with a face in each camera. It has five questions: what is in
    a camera (of four things; each camera as often), is it night (any camera), does the car slow down (speed), does the thing in
    front come nearer (range), is there danger (front camera and range together). Skies are night, front faces a frown, and
    series falling in half of the key frames. The column `needs` names the modalities that decide the row's answer.
    """

    name: Literal["synthetic-driving"] = "synthetic-driving"

    def modalities(self) -> tuple[Modality, ...]:
        return (*CAMERAS, *SENSORS)

    def picture_modalities(self) -> frozenset[Modality]:
        return frozenset(CAMERAS)

    def metrics(self) -> Sequence[str]:
        return ("accuracy",)

    def ceilings(self, visible: Visible) -> Mapping[str, float]:
        cameras = visible & frozenset(CAMERAS)
        things = sum(1.0 if camera in cameras else 1 / NUM_OPTIONS for camera in CAMERAS) / len(CAMERAS)
        even = [bool(cameras), "speed" in visible, "range" in visible]
        danger = (
            1.0 if {"CAM_FRONT", "range"} <= visible else 0.75
        )  # a quarter is dangerous; one part alone leaves "no" best
        return {"accuracy": (things + sum(1.0 if known else 0.5 for known in even) + danger) / NUM_QUESTIONS}

    def table_settings(self) -> dict[str, Any]:
        columns = {"image": {camera: camera for camera in CAMERAS}, "series": {sensor: sensor for sensor in SENSORS}}
        return {"columns": columns, "render": _RENDER}

    def load(self, split: Split) -> Rows:
        form = {"name": "drivelm", "root": self.folder(), "sensors": SENSORS, "render": _RENDER}
        reader = DriveLM.pick({**form, "on_bad_row": self.on_bad_row}, self.name)
        assert isinstance(reader, DriveLM)
        rows = reader.load_scenes(split, lambda scene: scene.startswith(split))
        return replace(rows, examples=tuple(self._example(example) for example in rows.examples))

    def _example(self, row: Example) -> Example:
        return replace(row, columns={**row.columns, "set": self.name, "needs": needs(row.question)})

    def moment(self, rng: np.random.Generator) -> Moment:
        """Draw a key frame without its questions."""
        sky = "night" if rng.random() < 0.5 else pick(OTHER_SKIES, rng)
        cameras = {}
        for camera in CAMERAS:
            face = pick(FACES, rng)
            if camera == "CAM_FRONT":
                face = "frown" if rng.random() < 0.5 else pick(OTHER_FACES, rng)
            cameras[camera] = Scene(sky, pick(THINGS, rng), pick(COLOURS, rng), face)
        return Moment(cameras, slower=bool(rng.random() < 0.5), nearer=bool(rng.random() < 0.5))

    def questions(self, moment: Moment, rng: np.random.Generator) -> Iterator[tuple[str, str, str]]:
        """(task, question, answer) as DriveLM writes them."""
        camera = pick(CAMERAS, rng)
        truth = moment.cameras[camera].thing
        others = [thing for thing in THINGS if thing != truth]
        options = [truth, *(others[i] for i in rng.permutation(len(others))[: NUM_OPTIONS - 1])]
        options = [options[i] for i in rng.permutation(NUM_OPTIONS)]
        listed = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        yield (
            "perception",
            f"What is the thing in the {spoken_camera(camera)}? {ASK} {listed}",
            LETTERS[options.index(truth)],
        )
        night = moment.cameras["CAM_FRONT"].sky == "night"
        answers = {
            NIGHT: night,
            NEARER: moment.nearer,
            DANGER: moment.danger,
            SLOWER: moment.slower,
        }  # in the reader's order
        for question, answer in answers.items():
            yield TASKS[question], question, "Yes." if answer else "No."

    def _write(self, folder: Path) -> None:
        for camera in CAMERAS:
            (folder / "nuscenes/samples" / camera).mkdir(parents=True)
        scenes: dict[str, Any] = {}
        for split, size in self._sizes().items():
            for index in range(-(-size // NUM_QUESTIONS)):
                rng = self._rng(split, index)
                moment, frame = self.moment(rng), f"{split}-{index:05d}"
                paths = {camera: f"nuscenes/samples/{camera}/{frame}.png" for camera in CAMERAS}
                for camera, scene in moment.cameras.items():
                    draw(scene, rng).save(folder / paths[camera], compress_level=1)
                sensors = {
                    "speed": _series(moment.slower, (6, 20), rng),
                    "range": _series(moment.nearer, (15, 60), rng),
                }
                asked: dict[str, list[dict[str, str]]] = {}
                for task, question, answer in [*self.questions(moment, rng)][: size - index * NUM_QUESTIONS]:
                    asked.setdefault(task, []).append({"Q": question, "A": answer})
                entry = {"QA": asked, "image_paths": {c: f"../{path}" for c, path in paths.items()}, "sensors": sensors}
                scenes[frame] = {"key_frames": {frame: entry}}
        (folder / DRIVELM_FILE).write_text(json.dumps(scenes), encoding="utf-8", newline="\n")


def spoken_camera(camera: Modality) -> str:
    """ "CAM_FRONT_LEFT" -> "front left camera"."""
    return f"{camera.removeprefix('CAM_').replace('_', ' ').lower()} camera"


def needs(question: str) -> str:
    """The modalities that decide the answer of a question: "CAM_BACK", "any camera", "CAM_FRONT+range"."""
    return NEEDS.get(question) or next(c for c in CAMERAS if f" {spoken_camera(c)}?" in question)


def _series(falls: bool, first: tuple[float, float], rng: np.random.Generator) -> list[float]:
    """Samples from a start in the range `first` that fall by 30 to 60 %, or else rise as much or stay about the same."""
    start, change = rng.uniform(*first), rng.uniform(0.3, 0.6)
    end = start * (1 - change if falls else 1 + (change if rng.random() < 0.5 else rng.uniform(-0.02, 0.02)))
    wobble = rng.uniform(-0.01, 0.01, NUM_SAMPLES) * start
    wobble[[0, -1]] = 0  # the ends decide the trend
    return [round(start + (end - start) * i / (NUM_SAMPLES - 1) + float(w), 1) for i, w in enumerate(wobble)]
