"""Rows a second of `fedmllm predict` after loading, on the embedded model.

    python benchmarks/predict.py [--rows 4000] [--repeats 3] > results/predict.md

New rows with a picture and a short text, two choices, pictures of 48 px on disk. A process predicts 40 rows and another one all
of them: the difference of their seconds is without imports and loading. Every picture belongs to one row, or to seven as in a
table of questions.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe
from many_clients import TEXTS, write_experiment, write_rows
from PIL import Image

FEW = 40


def write_new_rows(path: Path, number: int, rows_a_picture: int) -> None:
    """A CSV file of rows without answers."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["case", "scan", "report"])
        for row in range(number):
            table.writerow([row, f"{row // rows_a_picture}.png", f"{TEXTS[row % len(TEXTS)]} {row // 10}"])


def seconds(run: Path, rows: Path, out: Path, threads: int) -> float:
    """Of one process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    command = [sys.executable, "-m", "fedmllm.cli", "predict", str(run), str(rows), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    out.unlink()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    print("# Rows a second of `fedmllm predict`\n")
    print(f"`python benchmarks/predict.py --rows {arguments.rows} --repeats {arguments.repeats}`: median (least to greatest) "
          f"of the repeats, after loading.\n{describe()}\n")  # fmt: skip
    print("| threads | rows a picture | file | rows/s |\n|---:|---:|---|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        for number in range(max(600, arguments.rows)):
            Image.fromarray(rng.integers(256, size=(48, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / "data").mkdir()
        write_rows(folder / "data", 4)
        experiment = write_experiment(folder / "data", 4, 1)
        command = [sys.executable, "-m", "fedmllm.cli", "run", str(experiment), "--out", str(folder / "run")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for threads, rows_a_picture, ending in (
            (cores, 1, "jsonl"),
            (1, 1, "jsonl"),
            (cores, 7, "jsonl"),
            (cores, 1, "parquet"),
        ):
            rates = []
            for _ in range(arguments.repeats):
                spent = []
                for number in (FEW, arguments.rows):
                    write_new_rows(folder / "new.csv", number, rows_a_picture)
                    spent.append(seconds(folder / "run", folder / "new.csv", folder / f"out.{ending}", threads))
                rates.append((arguments.rows - FEW) / (spent[1] - spent[0]))
            span = f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"
            print(f"| {threads} | {rows_a_picture} | .{ending} | {span} |", flush=True)


if __name__ == "__main__":
    main()
