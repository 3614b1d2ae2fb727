"""Kill runs with SIGKILL at random moments, resume them, and compare every byte with runs that nothing stopped.

    python scripts/kill_trial.py            # 50 kills, about ten minutes on one core; writes results/kill_trial.json

Half of the kills come at a moment drawn over the whole of a run, loading included; half while a checkpoint is being written.
A third of the resumed runs is killed again. One process imports everything and forks a child for each run, so that a trial is
short; a child is killed as any process would be. Exit code 1 unless every killed run ended bit-equal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # one thread: a process with more may not fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from fedmllm.config.experiment import Experiment
from fedmllm.core.storage import write_atomically
from fedmllm.runs.checkpoint import newest
from fedmllm.runs.inputs import versions
from fedmllm.runs.record import read
from fedmllm.runs.run import run

SMALL: dict[str, Any] = {
    "data": {"name": "synthetic-irony", "num_train": 40, "num_validation": 4, "num_test": 4},
    "partition": {"name": "dirichlet", "alpha": 0.5, "num_clients": 5},
    "backbone": "tiny",
    "train": {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 1},
    "num_rounds": 6,
}
CASES: dict[str, dict[str, Any]] = {
    "fedavg": {"aggregator": "fedavg"},
    "fedadam": {"aggregator": "fedadam"},
    "fedyogi, best on validation": {"aggregator": "fedyogi", "evaluate": {"every": 2, "select": "validation"}},
    "median, clients that drop out": {
        "aggregator": "median",
        "cohort_size": 4,
        "availability": {"name": "unreliable", "drop_rate": 0.2, "straggle_rate": 0.3},
    },
    "scaffold": {"aggregator": "scaffold"},
    "local": {"method": "local", "cohort_size": 3},
}


def start(experiment: Experiment, folder: Path) -> int:
    """Run or resume it in a child -> its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run(experiment, folder, resume=True)
        code = 0
    finally:
        os._exit(code)


def finish(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"a run failed by itself: status {status}")


def kill(child: int, folder: Path, after_s: float, while_writing: bool) -> str:
    """Wait, kill, reap -> what the folder looked like; "" if the run was already over."""
    checkpoints = folder / "checkpoints"
    deadline = time.monotonic() + after_s
    while time.monotonic() < deadline:
        time.sleep(0.001)
    while while_writing and not list(checkpoints.glob(".*.partial")):
        if os.waitpid(child, os.WNOHANG)[0]:
            return ""
    if while_writing:
        time.sleep(random.random() * 0.03)
    if os.waitpid(child, os.WNOHANG)[0]:
        return ""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    last = newest(checkpoints)
    half = " and one half written" if list(checkpoints.glob(".*.partial")) else ""
    return (last.name if last else "no checkpoint") + half


def fingerprint(folder: Path) -> dict[str, Any]:
    """Everything about a finished run that must not depend on whether it was stopped."""
    last = newest(folder / "checkpoints")
    assert last is not None
    places = ("adapter*/**/*.safetensors", "client_state/**/*.safetensors")
    files = [*(path for place in places for path in folder.glob(place)), *last.glob("*.safetensors")]
    events = [e for e in read(folder / "record.jsonl") if e["event"] in ("round", "eval", "validation", "end")]
    compared = (
        "event",
        "round",
        "cohort",
        "dropped_out",
        "visible",
        "metrics",
        "value",
        "best_round",
        "up_bytes",
        "client",
    )
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    return {
        "bytes": {str(path.relative_to(folder)): path.read_bytes() for path in files},
        "events": [{key: e[key] for key in compared if key in e} for e in events],
        "losses": [[c["loss"] for c in e["clients"]] for e in events if e["event"] == "round"],
        "rows": [{k: v for k, v in row.items() if not k.endswith("_s") and "peak" not in k} for row in rows],
    }


def note(kills: list[dict[str, Any]], began: float, out: Path) -> None:
    """Write the results so far, which a trial that is itself stopped leaves."""
    equal = sum(entry["equal"] for entry in kills)
    about = {"machine": platform.machine(), "python": platform.python_version(), "versions": versions(), "threads": 1}
    result = {"kills": len(kills), "equal": equal, "seconds": round(time.monotonic() - began), **about, "log": kills}
    write_atomically(out, json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "kill_trial.json")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    torch.set_num_threads(1)
    Experiment.parse(SMALL).backbone.load(0)  # imports all that a run imports
    place = Path(tempfile.mkdtemp(prefix="kill-trial-"))
    whole: dict[str, tuple[dict[str, Any], float]] = {}
    kills: list[dict[str, Any]] = []
    began, trial = time.monotonic(), 0
    while len(kills) < arguments.kills:
        trial += 1
        name = list(CASES)[trial % len(CASES)]
        experiment = Experiment.parse(SMALL | CASES[name])
        if name not in whole:
            before = time.monotonic()
            finish(start(experiment, place / name))
            whole[name] = fingerprint(place / name), time.monotonic() - before
        expected, whole_s = whole[name]
        folder = place / f"trial-{trial}"
        chain = []
        for _ in range(1 + (random.random() < 1 / 3)):
            while_writing = random.random() < 0.5
            moment = kill(start(experiment, folder), folder, random.random() * whole_s, while_writing)
            if moment and len(kills) + len(chain) < arguments.kills:
                chain.append({"case": name, "trial": trial, "found": moment, "while_writing": while_writing})
        finish(start(experiment, folder))
        found = fingerprint(folder)
        odd = [key for key in expected if found[key] != expected[key]]
        shutil.rmtree(folder)
        kills += [{**entry, "equal": not odd, "differs": odd} for entry in chain]
        note(kills, began, arguments.out)
        print(
            f"{len(kills):3} {name}: {', '.join(e['found'] for e in chain) or 'was over'}; {odd or 'equal'}", flush=True
        )
    shutil.rmtree(place)
    equal = sum(entry["equal"] for entry in kills)
    print(f"{equal} of {len(kills)} killed runs ended bit-equal; {arguments.out}")
    sys.exit(equal != len(kills))


if __name__ == "__main__":
    main()
