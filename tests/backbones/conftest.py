"""Tiny model folders, and rows that every family can read: pictures of several sizes, text alone, both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmllm.backbones.base import FromFolder
from fedmllm.backbones.hf import TransformersBackbone, load_folder
from fedmllm.core.types import Conversation, Picture
from support.tiny_families import NEEDS, PORTS, stirred, write

FolderOf = Callable[[str], Path]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> FolderOf:
    """The model folder of a family, written at first use; of our ports the parity checkpoints."""
    root = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        if family in PORTS:
            return Path(request.getfixturevalue("shared")) / "parity" / PORTS[family]
        if family in NEEDS:
            pytest.importorskip(NEEDS[family], reason=f"{family}'s processor needs {NEEDS[family]}")
        path = root / family
        return path if path.is_dir() else write(family, path)

    return folder


@pytest.fixture(scope="session")
def loaded(folder_of: FolderOf) -> Callable[[str], TransformersBackbone]:
    """A family's backbone, loaded once, with a B that is not zero; tests that change it put it back."""
    kept: dict[str, TransformersBackbone] = {}

    def load(family: str) -> TransformersBackbone:
        if family not in kept:
            kept[family] = stirred(load_folder(FromFolder(path=str(folder_of(family))), seed=0))
        return kept[family]

    return load


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Picture, Picture]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, size in (("small", (30, 40)), ("wide", (50, 90))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return Picture(folder / "small.png"), Picture(folder / "wide.png")


@pytest.fixture(scope="session")
def prompts(pictures: tuple[Picture, Picture]) -> list[Conversation]:
    """One picture, two pictures around a text, text alone."""
    small, wide = pictures
    return [
        Conversation((small, "What is it?")),
        Conversation((wide, "A longer question about the first, and ", small, " this one?")),
        Conversation(("No picture here; is it (A) or (B)?",)),
    ]
