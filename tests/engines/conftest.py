"""Random models of any family, and rows for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "backbones"))
from small_federation import SIZES, TEXTS
from tiny_families import PORTS, write

from fedmllm.backbones.base import FromFolder, Lora, Precision, Tiny
from fedmllm.backbones.hf import TransformersBackbone, load_folder
from fedmllm.core.types import Example

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
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows = []
    for i in range(sum(SIZES)):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (30 + 10 * (i % 3), 40, 3), dtype=np.uint8)).save(path)
        fields = {"image": (path,), "text": TEXTS[i % len(TEXTS)]}
        rows.append(Example(i, fields, "Is it so?", ("no", "yes"), ("no", "yes")[i % 2], f"made up:{i}"))
    return rows
