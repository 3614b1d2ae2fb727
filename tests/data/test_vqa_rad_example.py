"""The reduced copy of VQA-RAD in the repository: complete, small, and as `scripts/reduce_vqa_rad.py` makes it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from PIL import Image

from fedmllm.data.vqa_rad import VqaRad

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "vqa_rad"
ORIGINAL = ROOT.parent / "shared" / "data" / "vqa_rad"


def test_every_row_has_its_picture() -> None:
    train, test = (VqaRad(root=EXAMPLE).load(split).examples for split in ("train", "test"))
    assert (len(train), len(test)) == (1797, 451)
    for path in {row.fields["image"][0] for row in (*train, *test)}:
        with Image.open(path) as image:
            assert max(image.size) <= 336


def test_the_question_files_are_the_stated_ones() -> None:
    stated = dict(re.findall(r"^- (\w+\.json): ([0-9a-f]{64})$", (EXAMPLE / "SOURCE.md").read_text(), re.MULTILINE))
    assert stated.keys() == {"trainset.json", "testset.json"}
    for name, digest in stated.items():
        assert hashlib.sha256((EXAMPLE / name).read_bytes()).hexdigest() == digest


def test_the_script_makes_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ORIGINAL.is_dir():
        pytest.skip("the full-resolution pictures are not here")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from reduce_vqa_rad import reduce_picture

    for path in sorted((EXAMPLE / "images").iterdir())[::60]:
        reduce_picture(ORIGINAL / "images" / path.name, tmp_path / path.name)
        with Image.open(tmp_path / path.name) as made, Image.open(path) as kept:
            assert (made.size, made.mode) == (kept.size, kept.mode)
            assert made.tobytes() == kept.tobytes()
