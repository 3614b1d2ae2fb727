"""Least CPU time of `data show --json` on DriveLM's 339,000 questions, next to the time it takes.

python benchmarks/drivelm_floor.py

The floor is a program that only imports the settings, parses the file, names the rows, hashes the names, reads questions and
answers as columns and prints the names with one flag per camera: no row, no partition, no mask, no check of a cell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe

from data import SHOW, drivelm

REPEATS = 5
FLOOR = """
import gc, hashlib, json, sys, time
from pathlib import Path
gc.disable()
laps, began = {}, time.process_time()
def lap(name):
    global began
    now = time.process_time()
    laps[name], began = now - began, now
import fedmllm.config.experiment, fedmllm.reports.data, fedmllm.cli.main
lap("imports")
scenes = json.loads(Path(sys.argv[1]).read_text("utf-8"))
lap("read and parse")
tasks = ("perception", "prediction", "planning", "behavior")
lists = [(f"{s}/{f}/{t}/", e["QA"].get(t) or []) for s, c in scenes.items() for f, e in c["key_frames"].items() for t in tasks]
ids = [f"{name}{i}" for name, rows in lists for i in range(len(rows))]
lap("names")
digest = hashlib.sha256("\\x1e".join(ids).encode()).hexdigest()
lap("hash of the names")
questions = [row["Q"].strip() for _, rows in lists for row in rows]
closed = [row["A"].lower().rstrip(".") in ("yes", "no") for _, rows in lists for row in rows]
lap("questions and answers as columns")
print(json.dumps({"ids": ids, **{c: "1" * len(ids) for c in "abcdef"}}))
lap("JSON out")
print(json.dumps({"rows": len(ids), "total": time.process_time(), **laps}), file=sys.stderr)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        drivelm(root)
        (file,) = root.rglob("v1_1_train_nus.json")
        toml = root / "x.toml"
        toml.write_text(f'data = {{ name = "drivelm", root = {json.dumps(str(root))} }}\nscenario = "missing"\n')
        floors, shows = [], []
        for _ in range(REPEATS):  # in turn, so that a busy machine slows both
            done = subprocess.run([sys.executable, "-c", FLOOR, str(file)], capture_output=True, text=True, check=True)
            floors.append(json.loads(done.stderr.splitlines()[-1]))
            before = os.times()
            show = [sys.executable, "-c", SHOW, "data", "show", str(toml), "--json"]
            subprocess.run(show, capture_output=True, check=True)
            after = os.times()
            shows.append(after.children_user + after.children_system - before.children_user - before.children_system)
    best = min(floors, key=lambda lap: lap["total"])
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in best.items() if name not in ("rows", "total"))
    show_s, floor_s = min(shows), best["total"]
    print(describe())
    print(
        f"{best['rows']:,} rows, least of {REPEATS}: `data show --json` {show_s:.2f} s, floor {floor_s:.2f} s ({parts})."
    )
    print(f"Ratio: {show_s / floor_s:.2f}.")


if __name__ == "__main__":
    main()
