"""Seconds to split the published sets and to print the clients' rows: made-up files of the published sizes.

python benchmarks/data.py > results/data.md

Targets of issue 3: 13,608 CrisisMMD rows partitioned and masked in under 1 s; `data show` on any set under 2 s on 2 cores.
On a machine that others use too, wall times say little: the CPU time of the same process is given next to them.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from machine import describe

from fedmllm.scenarios.assign import assign, shards_digest
from fedmllm.scenarios.masks import Aligned, Cross, Hybrid, Missing
from fedmllm.scenarios.partitions import Dirichlet
from fedmllm.scenarios.published import Published
from support import rawsets

REPEATS = 3
CORES = 2
SHOW = """
import sys
from pathlib import Path
from fedmllm.cli.main import app
app(standalone_mode=False)
status = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM")), file=sys.stderr)
"""


def slake(root: Path) -> None:
    """9,835 training rows in two languages, 4,919 of them English."""
    rows = [rawsets.slake_row(i, q_lang="en" if i % 2 == 0 else "zh") for i in range(9835)]
    rawsets.write_json(root / "train.json", rows)


def drivelm(root: Path) -> None:
    """v1.1 train: 4,072 keyframes of 696 scenes, 377,983 questions: about 93 a keyframe."""
    frame = json.loads(rawsets.drivelm(root, 1).read_text())["scene0"]["key_frames"]["frame0"]
    qa = frame["QA"]
    qa["planning"] = qa["prediction"] = qa["prediction"] * 31
    qa["perception"] *= 30
    scenes: dict[str, dict[str, dict[str, object]]] = {}
    for i in range(4072):
        scenes.setdefault(f"scene{i % 696}", {"key_frames": {}})["key_frames"][f"frame{i}"] = frame
    rawsets.write_json(root / "QA_dataset_nus" / "v1_1_train_nus.json", scenes)


SETS: dict[str, Callable[[Path], object]] = {
    "hateful-memes": lambda root: rawsets.hateful_memes(root, 8500),
    "crisismmd": lambda root: rawsets.crisismmd(root, 13_608),
    "vqa-rad": lambda root: rawsets.vqa_rad(root, 3064),
    "slake": slake,
    "flashcards": lambda root: rawsets.flashcards(root, 33_955),
    "medical": lambda root: rawsets.medical(root, 1797, 33_955),
    "drivelm": drivelm,
}


def best(work: Callable[[], object]) -> float:
    """The least CPU time of several runs, in seconds."""
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def partitions(root: Path) -> None:
    rawsets.crisismmd(root, 13_608)
    data = rawsets.dataset("crisismmd", root)
    examples = data.load("train").examples
    print("| CrisisMMD, 13,608 rows | ours | published |\n|---|---|---|")
    print(f"| read the file | {best(lambda: data.load('train')):.2f} s | the same |")
    for scenario in (Aligned(), Missing(rate=0.5), Cross(), Hybrid(keep_rate=0.6)):
        spent = []
        for partition in (Dirichlet(), Published()):
            spent.append(
                best(
                    lambda p=partition, s=scenario: shards_digest(
                        assign(examples, data.modalities(), p, s, 0), examples
                    )
                )
            )
        print(f"| partition, {scenario.name}, digest | {spent[0]:.2f} s | {spent[1]:.2f} s |")


def shows(root: Path) -> None:
    print("\n| `fedmllm data show --json` | rows | CPU time | wall time | peak memory |\n|---|---|---|---|---|")
    for name, make in SETS.items():
        make(root / name)
        toml = root / name / "experiment.toml"
        toml.write_text(f'scenario = "missing"\n[data]\nname = "{name}"\nroot = {json.dumps(str(root / name))}\n')
        walls, processors, rows, memory = [], [], 0, 0
        for _ in range(REPEATS):
            began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-c", SHOW, "data", "show", str(toml), "--json"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            walls.append(time.perf_counter() - began)
            processors.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            rows = sum(len(client["ids"]) for client in json.loads(done.stdout)["clients"])
            memory = int(done.stderr)
        wall = f"{statistics.median(walls):.2f} s ({min(walls):.2f} to {max(walls):.2f})"
        print(f"| {name} | {rows:,} | {min(processors):.2f} s | {wall} | {memory / 1024:.0f} MiB |")


def main() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    print(f"# Data: splitting and showing\n\n`python benchmarks/data.py`. {describe()}. Pinned to {CORES} cores.")
    print(f"CPU time: the least of {REPEATS} runs; wall time: their median and range. Others worked on the machine:")
    print(f"{os.getloadavg()[1]:.0f} processes wanted its {os.cpu_count()} cores in the five minutes before.\n")
    with tempfile.TemporaryDirectory() as folder:
        partitions(Path(folder) / "crisismmd")
        shows(Path(folder))


if __name__ == "__main__":
    main()
