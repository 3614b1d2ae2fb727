"""What is made once in a process: shared by the backbones of one base, and by nobody else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmllm.backbones import FromFolder, Precision
from fedmllm.backbones.hf import TransformersBackbone, load_folder
from fedmllm.types import Conversation, DataError, Picture


@pytest.fixture
def folder(load, tmp_path_factory) -> Path:
    return Path(load("llava").spec.path)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    draw(tmp_path / "picture.png", seed=0)
    return tmp_path / "picture.png"


def draw(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (40 + seed, 40, 3), dtype=np.uint8)).save(path)


def backbone(folder: Path, keep_mb: int, base: str = "float32") -> TransformersBackbone:
    spec = FromFolder(path=str(folder), keep_image_features_mb=keep_mb, precision=Precision(base=base))
    return load_folder(spec, seed=0)


def scores(backbone: TransformersBackbone, picture: Path) -> list[list[float]]:
    return backbone.score([Conversation((Picture(picture), "Is it so?"))], [["(A) no", "(B) yes"]])


def test_a_second_backbone_of_the_base_finds_what_the_first_kept(folder: Path, picture: Path, monkeypatch) -> None:
    first = scores(backbone(folder, 8), picture)
    second = backbone(folder, 8)
    second.features._tower = lambda **_: pytest.fail("the tower ran again")
    monkeypatch.setattr("fedmllm.backbones.encode.open_image", lambda _: pytest.fail("a picture was read"))
    assert scores(second, picture) == first


def test_one_that_keeps_nothing_gives_the_same_bits_every_time(folder: Path, picture: Path) -> None:
    keeps, forgets = backbone(folder, 8), backbone(folder, 0)
    assert scores(keeps, picture) == scores(forgets, picture) == scores(forgets, picture) == scores(keeps, picture)


def test_another_precision_is_another_tower(folder: Path, picture: Path) -> None:
    wide = scores(backbone(folder, 8, "float64"), picture)
    assert scores(backbone(folder, 8), picture) != wide
    assert wide == scores(backbone(folder, 0, "float64"), picture)


def test_a_picture_that_changes_is_read_again_by_the_next_backbone(folder: Path, picture: Path) -> None:
    before = scores(backbone(folder, 8), picture)
    draw(picture, seed=1)
    after = scores(backbone(folder, 8), picture)
    assert after != before
    assert after == scores(backbone(folder, 0), picture)


def test_a_picture_that_goes_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there"):
        scores(backbone(folder, 8), tmp_path / "none.png")
