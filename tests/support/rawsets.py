"""Made-up raw folders in the forms in which the published sets lie on disk. No image is written."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fedmllm.config.experiment  # noqa: F401  (registers every data set)
from fedmllm.data.base import Dataset
from fedmllm.data.crisismmd import CHOICES as CRISIS_CLASSES

CRISIS_COLUMNS = (
    "event_name", "tweet_id", "image_id", "tweet_text", "image", "label", "label_text", "label_image",
    "label_text_image",
)  # fmt: skip


def dataset(name: str, root: Path, **settings: Any) -> Dataset:
    return Dataset.pick({"name": name, "root": str(root), **settings}, "data")


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, lines: Sequence[str], end: str = "\n", start: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((start + "".join(line + end for line in lines)).encode())
    return path


def hateful_memes(root: Path, rows: int = 40, split: str = "train", **changes: Any) -> Path:
    made = [{"id": i, "img": f"img/{i:05d}.png", "label": i % 3 // 2, "text": f"some words {i}"} for i in range(rows)]
    return write_lines(root / f"{split}.jsonl", [json.dumps({**row, **changes}) for row in made])


def crisis_row(number: int, label: str, text: str = "so much water https://t.co/x", **changes: str) -> str:
    row = {
        "event_name": "hurricane_toy", "tweet_id": str(900 + number), "image_id": f"{900 + number}_0",
        "tweet_text": text, "image": f"data_image/hurricane_toy/1_1_2017/{900 + number}_0.jpg", "label": label,
        "label_text": "not_humanitarian", "label_image": label, "label_text_image": "Negative",
    }  # fmt: skip
    return "\t".join({**row, **changes}[name] for name in CRISIS_COLUMNS)


def crisis_path(root: Path, split: str = "train") -> Path:
    return root / "crisismmd_datasplit_all" / f"task_humanitarian_text_img_{split}.tsv"


def crisismmd(root: Path, rows: int = 400, seed: int = 0, split: str = "train") -> Path:
    """Labels in a shuffled order of first appearance, the rarest with fewer rows than there are clients."""
    rng = random.Random(seed)
    order = rng.sample(CRISIS_CLASSES, len(CRISIS_CLASSES))
    weights = [3.0, *(rng.random() ** 3 for _ in order[1:])]
    labels = [order[0], *rng.choices(order, weights, k=rows - 1)]
    lines = ["\t".join(CRISIS_COLUMNS), *(crisis_row(i, label) for i, label in enumerate(labels))]
    return write_lines(crisis_path(root, split), lines)


def radiology_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "qid": number, "image_name": f"synpic{number}.jpg", "image_organ": "CHEST", "answer": "Yes",
        "answer_type": "CLOSED", "question_type": "PRES", "question": f"Is there an effusion, case {number}?",
        "phrase_type": "freeform",
    }  # fmt: skip
    return {**row, **changes}


def vqa_rad(root: Path, rows: int = 40) -> None:
    write_json(root / "trainset.json", [radiology_row(i) for i in range(rows)])
    write_json(root / "testset.json", [
        radiology_row(1000), radiology_row(1001, answer="Left lung", answer_type="OPEN", question="Where is it?"),
    ])  # fmt: skip


EASY_ROWS = [
    ["what color is the rectangle?", "blue", 0], ["is there not a red shape?", "yes", 0],
    ["what is the red shape?", "circle", 1], ["does the image contain a triangle?", "no", 1],
    ["is no triangle present?", "no", 2], ["is a teal shape present?", "yes", 2], ["is no red shape present?", "yes", 3],
    ["is there not a gray shape in the image?", "no", 4],
]  # fmt: skip


def easy_vqa(root: Path) -> None:
    write_json(root / "train" / "questions.json", EASY_ROWS)
    write_json(root / "test" / "questions.json", EASY_ROWS[:4])


def flashcards(root: Path, rows: int = 60) -> None:
    cards = [
        {"instruction": "Answer truthfully", "input": f"What is {i}?", "output": f"It is {i}."} for i in range(rows)
    ]
    write_json(root / "medical_meadow_wikidoc_medical_flashcards.json", cards)


def slake_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "img_id": number, "img_name": f"xmlab{number}/source.jpg", "question": "What modality is used?", "answer": "MRI",
        "q_lang": "en", "location": "Abdomen", "modality": "MRI", "answer_type": "OPEN", "base_type": "vqa",
        "content_type": "Modality", "triple": ["vhead", "_", "_"], "qid": number,
    }  # fmt: skip
    return {**row, **changes}


def slake(root: Path) -> None:
    rows = [slake_row(1), slake_row(2, q_lang="zh", answer="核磁共振"), slake_row(3, answer="No", answer_type="CLOSED")]
    for name in ("train.json", "validate.json", "test.json"):
        write_json(root / name, rows)


def medical(root: Path, images: int = 40, cards: int = 60) -> None:
    vqa_rad(root / "vqa_rad", images)
    flashcards(root / "flashcards", cards)
    slake(root / "slake")


CAMERAS = ("CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
DRIVE_QA = {
    "perception": [{"Q": "What are the important objects?", "A": "There is a bus.", "C": None, "tag": [2]}],
    "prediction": [{"Q": "Is <c1,CAM_BACK,1088.3,497.5> moving?", "A": "No.", "C": None}],
    "planning": [],
    "behavior": [{
        "Q": "Predict the behavior of the ego vehicle. Please select the correct answer from the following options: "
             "A. The ego vehicle is going straight. B. The ego vehicle is turning left.",
        "A": "B", "C": None,
    }],
}  # fmt: skip


def drivelm(root: Path, scenes: int = 30, cameras: Sequence[str] = CAMERAS) -> Path:
    paths = {c: f"../nuscenes/samples/{c}/n015__{c}__1.jpg" for c in cameras}
    frames = {f"scene{i}": {"key_frames": {f"frame{i}": {"QA": DRIVE_QA, "image_paths": paths}}} for i in range(scenes)}
    return write_json(root / "QA_dataset_nus" / "v1_1_train_nus.json", frames)
