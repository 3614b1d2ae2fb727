"""Same experiment, machine type, versions and number of threads: the same bytes, for every member of every family.

What is promised, and what is not, is said in docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmllm.checkpoint import ADAPTER
from fedmllm.config import FAMILIES, Experiment
from fedmllm.record import read
from fedmllm.rng import stream
from fedmllm.runs import run

TABLE: dict[str, Any] = {
    "data": {"name": "synthetic-irony", "num_train": 60, "num_validation": 4, "num_test": 4},
    "backbone": "tiny",
    "train": {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 1},
    "num_rounds": 2,
    "cohort_size": 5,
    "partition": {"name": "iid"},
}
ELSEWHERE = {
    "published",
    "by-column",
    "file",
    "flower-simulation",
    "flower-sites",
}  # need a set's columns, a file, processes
MEMBERS = [
    (family, name)
    for family in ("aggregator", "objective", "scenario", "partition", "prompt", "availability", "engine")
    for name in sorted(FAMILIES[family].members)
    if name not in ELSEWHERE
]


def train(folder: Path, **changed: Any) -> tuple[bytes, list[Any]]:
    """The final adapter's file, and what the record says that is not a time."""
    run(Experiment.parse({**TABLE, **changed}), folder)
    events = [event for event in read(folder / "record.jsonl") if event["event"] in ("round", "eval")]
    said = [[e.get("cohort"), e.get("metrics"), [c["loss"] for c in e.get("clients", [])]] for e in events]
    return (folder / "adapter" / ADAPTER).read_bytes(), said


@pytest.mark.parametrize(("family", "name"), MEMBERS, ids=["-".join(member) for member in MEMBERS])
def test_every_member_gives_the_same_bytes_again(family: str, name: str, tmp_path: Path) -> None:
    once = train(tmp_path / "once", **{family: name})
    random.seed(99)  # what somebody else draws must not matter
    np.random.seed(99)
    torch.manual_seed(99)
    assert train(tmp_path / "again", **{family: name}) == once


def test_the_seed_matters(tmp_path: Path) -> None:
    assert train(tmp_path / "0")[0] != train(tmp_path / "1", seed=1)[0]


def test_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    """Also with other hash seeds: no order of a set, no address, no time decides anything."""
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]; from test_determinism import Path, train; train(Path(sys.argv[2]))"
    )
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / seed)]
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run(command, env=env, capture_output=True, check=True)
    one, two = ((tmp_path / seed / "adapter" / ADAPTER).read_bytes() for seed in ("1", "2"))
    assert one == two == train(tmp_path / "here")[0]


def test_the_record_says_what_the_bytes_depend_on(tmp_path: Path) -> None:
    train(tmp_path / "run")
    head = json.loads((tmp_path / "run" / "record.jsonl").read_text().splitlines()[0])
    assert head["device"].keys() == {"name", "machine", "python", "threads"}
    assert head["versions"].keys() >= {"fedmllm", "torch", "transformers", "peft", "numpy"}
    assert head["digests"].keys() == {"rows", "partition", "base"}


def test_streams_are_pinned() -> None:
    """Another number here would change every result that was ever recorded: give it a new name instead."""
    assert stream(7, "order", 3, "x").integers(0, 1000, 5).tolist() == [87, 151, 480, 155, 15]
