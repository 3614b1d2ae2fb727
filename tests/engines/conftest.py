"""Random models of any family, and rows for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedmllm.testing
from fedmllm.backbones.base import FromFolder, Lora, Precision, Tiny
from fedmllm.backbones.hf import TransformersBackbone, load_folder
from fedmllm.core.types import Example
from support.tiny_families import PORTS, write

Load = Callable[..., TransformersBackbone]


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Load:
    """(family or "tiny", base type, more of LoRA or precision) -> the backbone, loaded once."""
    root, kept = tmp_path_factory.mktemp("families"), {}

    def loaded(family: str, base: str = "float64", lora: Lora | None = None, **more: Any) -> TransformersBackbone:
        key = (family, base, lora, *more.items())
        if key not in kept:
            precision = Precision(base=base, **more)
            if family == "tiny":
                kept[key] = Tiny(lora=lora or Lora(), precision=precision).load(0)
                return kept[key]
            folder = root / family
            if family in PORTS:
                folder = Path(request.getfixturevalue("shared")) / "parity" / PORTS[family]
            elif not folder.is_dir():
                write(family, folder)
            spec = FromFolder(path=str(folder), lora=lora or Lora(), precision=precision, keep_image_features_mb=16)
            kept[key] = load_folder(spec, seed=0)
        return kept[key]

    return loaded


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    return fedmllm.testing.examples(tmp_path_factory.mktemp("pictures"))
