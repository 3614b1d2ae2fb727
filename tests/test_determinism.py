"""Same experiment, machine type, versions and number of threads: the same bytes, for every member of every family.

What is promised, and what is not, is said in docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedmllm.config.experiment import FAMILIES, Experiment
from fedmllm.core.rng import stream
from fedmllm.data.base import Dataset
from fedmllm.runs.checkpoint import ADAPTER_FILE
from fedmllm.runs.fingerprint import rows_digest
from fedmllm.runs.record import read
from fedmllm.runs.run import run
from support import rawsets, tiny_families

TABLE: dict[str, Any] = {
    "data": {"name": "synthetic-irony", "num_train": 60, "num_validation": 4, "num_test": 4},
    "backbone": "tiny",
    "train": {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 1},
    "num_rounds": 2,
    "cohort_size": 5,
    "partition": {"name": "iid"},
}


def own_rows(folder: Path) -> dict[str, Any]:
    rows = [f"{i},report {i % 7},{('no', 'yes')[i % 2]},site {i % 12}" for i in range(60)]
    (folder / "rows.csv").write_text("\n".join(["id,text,answer,client", *rows]))
    return {
        "data": {
            "name": "table", "root": str(folder), "train": "rows.csv", "test": "rows.csv", "question": "Broken?",
            "choices": ["no", "yes"], "columns": {"text": "text", "client": "client"},
        }
    }  # fmt: skip


def memes(folder: Path) -> dict[str, Any]:
    for split in ("train", "test_seen"):
        for row in rawsets.hateful_memes(folder, 60, split).read_text().splitlines():
            picture = folder / json.loads(row)["img"]
            picture.parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (json.loads(row)["id"] * 4, 0, 0)).save(picture)
    return {"data": {"name": "hateful-memes", "root": str(folder)}}


def model_folder(folder: Path) -> dict[str, Any]:
    return {"backbone": {"name": "hf", "path": str(tiny_families.write("llava", folder / "model"))}}


# What a member needs in addition to its name; one that is not here gets its name alone, so that a new one is tried at once.
NEEDS: dict[tuple[str, str], Callable[[Path], dict[str, Any]]] = {
    ("partition", "published"): lambda folder: {**memes(folder), "partition": "published"},
    ("partition", "by-column"): lambda folder: {**own_rows(folder), "partition": "by-column"},
    ("prompt", "file"): lambda _: {"prompt": {"name": "file", "wording": "{images}{text}\n{question}\n{options}"}},
    ("availability", "unreliable"): lambda _: {
        "availability": {"name": "unreliable", "drop_rate": 0.3, "straggle_rate": 0.3}
    },
    ("backbone", "hf"): model_folder,
    ("aggregator", "yoco"): lambda _: {
        "aggregator": "yoco",
        "num_rounds": 1,
        "backbone": {"name": "tiny", "lora": {"init": "principal"}},
    },
    ("aggregator", "yoco-reference"): lambda _: {
        "aggregator": "yoco-reference",
        "num_rounds": 1,
        "backbone": {"name": "tiny", "lora": {"init": "principal-b"}},
    },
    # Noise of secret keys differs from run to run, as it must; that of the public seed does not.
    ("privacy", "client-dp"): lambda _: {
        "privacy": {"name": "client-dp", "noise_multiplier": 1.0, "clip": 0.1, "simulate_noise": True},
        "update_filter": {"on_bad_update": "drop_client"},
    },
    ("privacy", "row-dp"): lambda _: {
        "privacy": {"name": "row-dp", "noise_multiplier": 1.0, "clip": 0.1, "simulate_noise": True},
        "train": {**TABLE["train"], "clip_norm": 0},
        "engine": "stacked",
    },
    ("completion", "retrieve"): lambda _: {
        "completion": "retrieve",
        "public": {"rows": 4},
    },
    ("relation", "graph-attention"): lambda _: {"relation": "graph-attention", "public": {"rows": 4}},
}
OTHER_TESTS = {  # where what needs processes of its own is compared byte for byte with in-process, which is tried here
    (
        "engine",
        "flower-simulation",
    ): "engines/test_flower_simulation.py::test_three_rounds_give_the_bytes_of_in_process",
    ("completion", "diffusion"): "test_diffusion.py::test_a_picture_depends_on_the_text_the_prompt_and_the_seed_alone",
    ("engine", "flower-sites"): "engines/test_flower_sites.py::test_three_sites_give_the_bytes_of_one_process",
}
MEMBERS = [
    (family, name)
    for family, kind in FAMILIES.items()
    for name in sorted(kind.members)
    if family != "data" and (family, name) not in OTHER_TESTS
]


def test_what_is_tested_elsewhere_is() -> None:
    for (family, name), place in OTHER_TESTS.items():
        assert name in FAMILIES[family].members
        file, _, test = place.partition("::")
        assert f"def {test}" in (Path(__file__).parent / file).read_text()


def train(folder: Path, **changed: Any) -> tuple[bytes, list[Any]]:
    """The final adapter's file, and what the record says that is not a time."""
    run(Experiment.parse({**TABLE, **changed}), folder)
    events = [event for event in read(folder / "record.jsonl") if event["event"] in ("round", "eval")]
    said = [[e.get("cohort"), e.get("metrics"), [c.get("loss") for c in e.get("clients", [])]] for e in events]
    return b"".join(path.read_bytes() for path in sorted(folder.glob(f"adapter*/**/{ADAPTER_FILE}"))), said


@pytest.mark.parametrize(("family", "name"), MEMBERS, ids=["-".join(member) for member in MEMBERS])
def test_every_member_gives_the_same_bytes_again(family: str, name: str, tmp_path: Path) -> None:
    needs = NEEDS.get((family, name), lambda _: {family: name})(tmp_path)
    once = train(tmp_path / "once", **needs)
    random.seed(99)  # what somebody else draws must not matter
    np.random.seed(99)
    torch.manual_seed(99)
    assert train(tmp_path / "again", **needs) == once


def test_the_seed_matters(tmp_path: Path) -> None:
    assert train(tmp_path / "0")[0] != train(tmp_path / "1", seed=1)[0]


def test_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    """Also with other hash seeds: no order of a set, no address, no time decides anything."""
    raw_folders(tmp_path / "raw")
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]; from test_determinism import Path, rows_of, train; "
        "train(Path(sys.argv[2])); print(rows_of(Path(sys.argv[3])))"
    )
    said = set()
    for seed in ("1", "2"):
        places = [str(Path(__file__).parent), str(tmp_path / seed), str(tmp_path / "raw")]
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(
            [sys.executable, "-c", code, *places], env=env, capture_output=True, text=True, check=True
        )
        said.add(done.stdout.splitlines()[-1])
    one, two = ((tmp_path / seed / "adapter" / ADAPTER_FILE).read_bytes() for seed in ("1", "2"))
    assert one == two == train(tmp_path / "here")[0]
    assert said == {str(rows_of(tmp_path / "raw"))}


def data_sets() -> list[tuple[str, Any]]:
    """Those of `fedmllm.data`: other tests of the same process define, or import, data sets that have no files."""
    members = FAMILIES["data"].members.items()
    return sorted((name, kind) for name, kind in members if kind.__module__.startswith("fedmllm.data."))


def raw_folders(folder: Path) -> None:
    """A made-up raw folder for each data set that reads one: `rawsets` has a maker of its name."""
    for name, kind in data_sets():
        (folder / name).mkdir(parents=True)
        if name == "table":
            own_rows(folder / name)
        elif "root" in kind.model_fields:
            getattr(rawsets, name.replace("-", "_"))(folder / name)


def rows_of(folder: Path) -> dict[str, str]:
    """Data set -> digest of its training rows, in their order."""
    found = {}
    for name, kind in data_sets():
        settings = {"name": name, "root": str(folder / name)} if "root" in kind.model_fields else {"name": name}
        table = own_rows(folder / name)["data"] if name == "table" else settings
        found[name] = rows_digest(Dataset.pick(table, "data").load("train").examples)
    return found


def test_the_record_says_what_the_bytes_depend_on(tmp_path: Path) -> None:
    train(tmp_path / "run")
    head = json.loads((tmp_path / "run" / "record.jsonl").read_text().splitlines()[0])
    assert head["device"].keys() == {"name", "machine", "python", "threads"}
    assert head["versions"].keys() >= {"fedmllm", "torch", "transformers", "peft", "numpy"}
    assert head["digests"].keys() == {"rows", "partition", "base"}


def test_streams_are_pinned() -> None:
    """Another number here would change every result that was ever recorded: give it a new name instead."""
    assert stream(7, "order", 3, "x").integers(0, 1000, 5).tolist() == [87, 151, 480, 155, 15]
