"""Caches of one process, shared by the backbones of one base only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedmllm.backbones.base import FromFolder, Precision, Row
from fedmllm.backbones.cache.bounded import RowCache
from fedmllm.backbones.cache.prompt_memory import PromptMemory
from fedmllm.backbones.hf import TransformersBackbone, load_folder
from fedmllm.core.errors import DataError
from fedmllm.core.types import Conversation, Picture
from support.small_federation import assert_same, federation, stirred, together


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
    caching, plain = backbone(folder, 8), backbone(folder, 0)
    assert scores(caching, picture) == scores(plain, picture) == scores(plain, picture) == scores(caching, picture)


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


# --- pixels are let go before rows are

PIXELS = 3 * 56 * 56 * 4  # bytes of a picture, of the size that the small towers look at; tokens take far less


def test_rows_lose_their_pixels_and_then_go() -> None:
    def row(i: int) -> Row:
        ids = torch.full((10,), i)
        return Row(ids, ids, {"pixels": torch.zeros(1000)}, f"picture {i}")  # 4,160 bytes; 160 without pixels

    rows = RowCache(limit=9000)
    for i in range(40):
        rows.put(i, row(i), lambda key, old: key not in (5, 39))  # the pixels of these are needed still
    assert [i for i in range(40) if (kept := rows.get(i)) and kept.images] == [39]
    assert [i for i in range(40) if (kept := rows.get(i)) and not kept.images] == list(range(9, 39))  # 4,160 + 30 * 160


def test_a_row_is_encoded_once_though_the_pixels_of_all_rows_fit_nowhere(
    load, examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds under a memory of two pictures: where features are kept, the second encodes nothing."""
    seen: list[object] = []
    for keep_mb, times in ((8, 1), (0, 2)):
        monkeypatch.setattr("fedmllm.federation.client.ROWS_KEPT_BYTES", 2 * PIXELS)
        monkeypatch.setattr(PromptMemory, "_cache", RowCache(2 * PIXELS))
        model = backbone(Path(load("llava").spec.path), keep_mb)
        clients, make = federation(model, examples), model.encoder._prompt
        monkeypatch.setattr(model.encoder, "_prompt", lambda prompt, make=make: (seen.append(prompt), make(prompt))[1])
        seen.clear()
        rounds = [together(clients, stirred(model)) for _ in range(2)]
        with_picture = [prompt for prompt in seen if prompt.pictures]
        assert len(with_picture) == times * len({*with_picture})
        assert_same(*rounds, largest=0.0)


def test_another_model_s_row_without_pixels_is_made_anew(folder: Path, picture: Path, monkeypatch) -> None:
    """Both have one processor and so one memory of prompts, but only the first keeps features."""
    first, second = backbone(folder, 8), backbone(folder, 0)
    expected = scores(first, picture)
    conversation = Conversation((Picture(picture), "Is it so?"))
    monkeypatch.setattr(PromptMemory, "_cache", RowCache(PIXELS))
    lean = replace(first.encoder.prompt(conversation), images={})
    key = next(iter(PromptMemory._cache._cache))
    PromptMemory._cache.put(key, lean, lambda *_: False)
    assert not first.encoder.prompt(conversation).images
    assert scores(first, picture) == expected
    assert scores(second, picture) == expected
