"""A federation of 10,000 clients with 20 rows each, 100 of them a round, next to one of 10 clients: memory, time, record.

    python benchmarks/many_clients.py [--clients 10 10000] [--rounds 3] > results/many_clients.md

Each case is a process `fedmllm run` over a CSV file of its rows, which share 600 pictures, so that the size of the data on
disk does not matter; `data show` is another. Seconds are CPU seconds of the process: other processes distort them little.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import describe
from PIL import Image

ROWS, PICTURES, COHORT = 20, 600, 100
TEXTS = ("stable", "no change", "a shadow left", "clear", "see above")


@dataclass(frozen=True)
class Spent:
    """Of one process."""

    output: str
    cpu_s: float
    peak_bytes: int


def write_rows(folder: Path, num_clients: int) -> None:
    """A CSV of all clients' rows and one of 50 test rows."""
    rng = np.random.default_rng(num_clients)
    for name, number in (("train", num_clients * ROWS), ("test", 50)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["case", "scan", "report", "label", "site"])
            pictures, labels = rng.integers(PICTURES, size=number), rng.integers(2, size=number)
            for row, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
                answer, text = ("no", "yes")[label], TEXTS[row % len(TEXTS)]
                table.writerow([f"{name}-{row}", f"{picture}.png", text, answer, f"site-{row // ROWS:05d}"])


def write_experiment(folder: Path, num_clients: int, num_rounds: int) -> Path:
    """The experiment over `folder`."""
    (folder / "many.toml").write_text(f"""
num_rounds = {num_rounds}
cohort_size = {min(COHORT, num_clients)}
[data]
name = "table"
root = "{folder}"
images = "{folder.parent}"
train = "train.csv"
test = "test.csv"
question = "Is it broken?"
choices = ["no", "yes"]
columns = {{ id = "case", image = "scan", text = "report", answer = "label", client = "site" }}
[partition]
name = "by-column"
column = "client"
[train]
lr = 3e-3
batch_size = 4
accumulation = 1
max_steps = 2
""")
    return folder / "many.toml"


def spent(*words: str) -> Spent:
    """Run `fedmllm` to its end."""
    command = [sys.executable, "-m", "fedmllm.cli", *words]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if status:
        raise SystemExit(f"{' '.join(words)}: {text[-2000:]}")
    return Spent(text, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def row_of(num_clients: int, num_rounds: int, pictures: Path) -> tuple[str, int]:
    """A line of the table and the peak memory."""
    folder = pictures / f"{num_clients}"
    folder.mkdir()
    write_rows(folder, num_clients)
    short, long = (write_experiment(folder, num_clients, number) for number in (1, num_rounds))
    listed = spent("data", "show", str(long))
    write_experiment(folder, num_clients, 1)
    first = spent("run", str(short), "--out", str(folder / "first"))
    write_experiment(folder, num_clients, num_rounds)
    whole = spent("run", str(long), "--out", str(folder / "run"))
    lines = (folder / "run" / "record.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    sizes = [len(line) for line, event in zip(lines, events, strict=True) if event["event"] == "round"]
    cohort = min(COHORT, num_clients)
    a_round = (whole.cpu_s - first.cpu_s) / (num_rounds - 1)
    cells = (
        f"{num_clients:,}", f"{num_clients * ROWS:,}", str(cohort), f"{listed.cpu_s:.1f}", f"{first.cpu_s - a_round:.1f}",
        f"{a_round:.2f}", f"{1000 * a_round / cohort:.0f}", f"{whole.peak_bytes / 2**20:.0f}",
        f"{sum(sizes) / len(sizes) / cohort:.0f}", f"{len(lines[0]) / 1000:.1f}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |", whole.peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 10_000])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print("# Many clients\n")
    print(f"`python benchmarks/many_clients.py --clients {' '.join(map(str, arguments.clients))} --rounds {arguments.rounds}`: "
          f"{ROWS} rows a client, at most {COHORT} clients a round, two steps of four rows each, embedded model.\n"
          f"{describe()}\n")  # fmt: skip
    print("CPU seconds. Start: all but the rounds, that is imports, rows, model, evaluation of 50 rows.\n")
    print("| clients | rows | a round | `data show` | start | s a round | ms a client | peak MiB "
          "| record bytes a client and round | heading, kB |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for number in range(PICTURES):
            Image.fromarray(rng.integers(256, size=(48, 48, 3), dtype=np.uint8)).save(f"{folder}/{number}.png")
        peaks = []
        for num_clients in arguments.clients:
            line, peak = row_of(num_clients, arguments.rounds, Path(folder))
            print(line, flush=True)
            peaks.append(peak)
    print(f"\nPeak memory of the last against the first: {peaks[-1] / peaks[0]:.2f}.")


if __name__ == "__main__":
    main()
