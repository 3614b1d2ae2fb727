"""Milliseconds of a picture's features: from the tower, from the folder that processes share, from memory.

python benchmarks/features.py > results/features.md

Each line is the median of passes over all rows by new backbones, in turns; the system has the files in its memory by then.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
from machine import describe
from models import hundred_million
from stacked import MODALITIES, federation

from fedmllm.backbones.base import FromFolder, Row, Tiny
from fedmllm.backbones.cache import features
from fedmllm.backbones.cache.prompt_memory import PromptMemory
from fedmllm.backbones.hf import TransformersBackbone

ROWS = {"tiny": 120, "100M": 40}


def load(model: Path | None, folder: str) -> TransformersBackbone:
    """With an empty memory of features."""
    features._KEPT.clear()
    spec = FromFolder(path=str(model), image_features_folder=folder) if model else Tiny(image_features_folder=folder)
    backbone = spec.load(0)
    assert isinstance(backbone, TransformersBackbone)
    assert backbone.features._scope  # the digest of the base, once a process
    return backbone


def milliseconds(rows: list[Row], backbone: TransformersBackbone) -> tuple[float, float]:
    """(wall, CPU) a row."""
    wall, cpu = time.perf_counter(), time.process_time()
    for row in rows:
        backbone.features.arguments([row])
    return (time.perf_counter() - wall) / len(rows) * 1e3, (time.process_time() - cpu) / len(rows) * 1e3


def encoded(backbone: TransformersBackbone, count: int) -> tuple[list[Row], tuple[float, float]]:
    PromptMemory._cache.clear()
    store = federation(backbone, 1, count).store
    wall, cpu = time.perf_counter(), time.process_time()
    rows = [store.row(i, frozenset(MODALITIES)) for i in range(count)]
    return rows, ((time.perf_counter() - wall) / count * 1e3, (time.process_time() - cpu) / count * 1e3)


def measure(name: str, model: Path | None, repeats: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for file in Path(folder).iterdir():
                file.unlink()
            rows, times = encoded(load(model, ""), ROWS[name])
            found.setdefault("tokens and pixels (either way)", []).append(times)
            found.setdefault("tower", []).append(milliseconds(rows, load(model, "")))
            found.setdefault("tower, and written to the folder", []).append(milliseconds(rows, load(model, folder)))
            reader = load(model, folder)
            found.setdefault("read from the folder", []).append(milliseconds(rows, reader))
            found.setdefault("from memory", []).append(milliseconds(rows, reader))
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / ROWS[name]
    for what, times_ in found.items():
        wall, cpu = (statistics.median(column) for column in zip(*times_, strict=True))
        print(f"| {name} | {what} | {wall:.2f} | {cpu:.2f} |")
    print(f"| {name} | bytes of a file: {size:,.0f} | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    logging.disable(logging.WARNING)
    print(f"# Features of a picture: milliseconds a row\n\nMachine: {describe()}. Medians of {a.repeats}, in turns.\n")
    print("| model | | wall ms | CPU ms |\n|---|---|---|---|")
    measure("tiny", None, a.repeats)
    with tempfile.TemporaryDirectory() as folder:
        hundred_million(Path(folder))
        measure("100M", Path(folder), a.repeats)


if __name__ == "__main__":
    main()
