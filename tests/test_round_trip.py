"""Settings written out and read back: the same experiment, which reads the same rows, in a suite, too."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from fedmllm.config.experiment import FAMILIES, Experiment
from fedmllm.config.public import Public
from fedmllm.config.train import Checkpointing, Evaluate, Personal, Train, UpdateFilter
from fedmllm.core.errors import ConfigError
from fedmllm.core.spec import Named, Spec
from fedmllm.flower.server.experiment import over_sites
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.run import run
from fedmllm.runs.suites.scheduler import CellState, run_suite
from fedmllm.runs.suites.suite import Cell, Suite, merge_tables

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((Path(__file__).parent / "golden/run_ids.json").read_text(encoding="utf-8"))
# What a member cannot do without.
NEEDED: dict[str, dict[str, Any]] = {
    **{name: {"root": "/d"} for name in ("crisismmd", "flashcards", "hateful-memes", "medical", "slake", "vqa-rad")},
    "drivelm": {"root": "/d", "sensors": ["crp"]},
    "at-sites": {"sites": ["a", "b"], "own": {"name": "synthetic-irony", "num_train": 7}},
    "table": {
        "root": "/d",
        "train": "a.csv",
        "columns": {"text": "note", "series": {"labs": ["crp"]}},
        "choices": ["no", "yes"],
        "render": {"genes": ["KRAS"]},
    },
    "file": {"wording": "{question}\n{options}"},
    "hf": {"path": "/model"},
    "diffusion": {"path": "hub:owner/name"},
    "client-dp": {"noise_multiplier": 1.0, "clip": 0.5, "simulate_noise": True},
    "row-dp": {"noise_multiplier": 1.0, "clip": 0.5, "simulate_noise": True},
}
# Another value if its type does not imply which are allowed, with what it needs; None = the key is its own proof.
OTHER: dict[str, dict[str, Any]] = {
    "hetlora.tail_from": {"tail_from": 0.5, "tail_penalty": 0.1},
    "at-sites.sites": {"sites": ["b", "a", "c"]},
    "at-sites.own": {"own": {"name": "table", "root": "/d", "train": "b.csv", "columns": {"image": "scan"}}},
    "drivelm.sensors": {"sensors": ["speed"]},
    "drivelm.tasks": {"tasks": ["planning"]},
    "medical.tests": {"tests": ["slake"]},
    "table.form": {"form": "jsonl"},
    "easy-vqa.seed": {"seed": 1, "draw": "spread"},
    "table.test_rate": {"test_rate": 0.5},
    "table.choices": {"choices": ["a", "b", "c"]},
    "table.na_values": {"na_values": []},
    "table.judged_by": {"judged_by": ["auc"]},
    "table.separator": {"separator": ";"},
    "table.delimiter": {"delimiter": ";"},
    "cross.clients": {"num_image_clients": 0, "clients": {"image": 2, "text": 1}},
    "missing.rates": {"rates": {"image": 0.5}},
    "complete-only.of": {"of": {"name": "missing", "rates": {"text": 0.2}}},
    "file.template": {"template": "w.txt"},
    "file.wording": {"wording": "Look.\n{question}\n{options}"},
    "client-dp.simulate_noise": {"simulate_noise": False},
    "row-dp.simulate_noise": {"simulate_noise": False},
    "client-dp.clip": {"clip": "adaptive", "clip_quantile": 0.4},
    "client-dp.initial_clip": {"clip": "adaptive", "initial_clip": 0.3},
    "client-dp.clip_quantile": {"clip": "adaptive", "clip_quantile": 0.3},
    "client-dp.clip_lr": {"clip": "adaptive", "clip_lr": 0.3},
    "describe.ask": {"ask": ["What is there?"]},
    "describe.to": {"to": "report"},
    "imagine.components": {"kind": "flow", "components": 33},
    "imagine.ridge": {"kind": "mean", "ridge": 0.2},
    "flower-sites.secure": {"secure": {"drop_outs": "recover", "bits": 20}},
    "tiny.device_map": {"device_map": ["cuda:0", "cuda:1"]},
    "hf.device_map": {"device_map": ["cuda:0", "cuda:1"]},
    "stacked.devices": {"devices": ["cpu", "cpu"]},
    "lora.ranks": {"ranks": [8, 4]},
    "lora.train_extra": {"train_extra": ["resampler"]},
    "columns.image": {"image": {"CAM_FRONT": "front", "CAM_BACK": "back"}},
    "columns.text": {"text": {"text": "note", "prior_report": "prior"}},
    "columns.announced": {"text": {"text": "note", "prior": "p"}, "announced": ["prior"]},
    "columns.keep": {"keep": ["ward"]},
    "columns.series": {"series": {"labs": ["crp", "hb"]}},
    "columns.variants": {"variants": {"genes": ["kras"]}},
    "render.units": {"units": {"crp": "mg/l"}},
    "render.ranges": {"ranges": {"crp": [0, 5]}},
    "render.flags": {"flags": ["-", "=", "+"]},
    "render.step_s": {"step_s": {"crp": 0.5}},
    "render.genes": {"genes": ["TP53"]},
    "render.reference": {"reference": ["wild"]},
    "evaluate.select": {"select": "validation", "every": 2},
    "evaluate.visible": {"visible": ["all", "image"]},
    "evaluate.metrics": {"metrics": ["accuracy"]},
    "evaluate.grader": {"grader": {"url": "http://localhost:8000/v1", "model": "m"}},
    "public.rows": {"rows": 3, "client": True},
    "public.client": {"rows": 2, "client": True},
    "public.data": {"rows": 2, "client": True, "data": {"name": "synthetic-irony", "seed": 5}},
    "public.split": {"rows": 2, "client": True, "split": "train", "data": {"name": "synthetic-irony", "seed": 5}},
}
# What the rest of an experiment has to be for a member.
WITH: dict[str, dict[str, Any]] = {
    "yoco": {"num_rounds": 1, "backbone": {"name": "tiny", "lora": {"init": "principal"}}},
    "yoco-reference": {"num_rounds": 1, "backbone": {"name": "tiny", "lora": {"init": "principal-b"}}},
    "client-dp": {"update_filter": {"on_bad_update": "drop_client"}},
    "row-dp": {"train": {"clip_norm": 0}},
    "retrieve": {"public": {"rows": 4}},
    "graph-attention": {"public": {"rows": 4}},
}
SPECS: dict[str, type[Spec]] = {
    "train": Train, "evaluate": Evaluate, "update_filter": UpdateFilter, "personal": Personal, "checkpoint": Checkpointing,
    "public": Public,
}  # fmt: skip
PLUGIN = '''
from typing import Literal
from fedmllm.algorithms.server_optimizers import FedAvg
from fedmllm.core.spec import Spec

class Inner(Spec):
    tau: float = 0.25
    """A number of the nested table."""

class RoundTrip(FedAvg):
    """FedAvg with a nested table."""
    name: Literal["round-trip"] = "round-trip"
    inner: Inner = Inner()
    """The nested table."""
'''
SMALL = {"num_train": 24, "num_test": 6}
TRAIN = {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 1}


class Silent:
    def update(self, state: CellState) -> None: ...

    def finished(self, cell: Cell, seconds: float, error: str) -> None: ...


def read_back(experiment: Experiment) -> list[Experiment]:
    return [
        Experiment.parse(experiment.dump()),
        Experiment.parse(json.loads(json.dumps(experiment.model_dump(mode="json")))),
    ]


def own_rows(folder: Path) -> dict[str, Any]:
    """A table whose question and choices are settings, and whose rows name their clients."""
    lines = ["case,site,note,ill", *(f"{i},{'AB'[i % 2]},note {i},{('no', 'yes')[i % 2]}" for i in range(12))]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    columns = {"id": "case", "text": "note", "answer": "ill", "client": "site"}
    return {
        "name": "table", "root": str(folder), "train": "rows.csv", "test": "rows.csv", "question": "Is it ill?",
        "choices": ["no", "yes"], "judged_by": ["accuracy"], "columns": columns,
    }  # fmt: skip


def registry() -> list[type[Named]]:
    """Every member that is shipped, those of the server's view included."""
    return [m for family in FAMILIES.values() for _, m in sorted(family.members.items()) if m.plugin is None]


def inner_spec(annotation: Any) -> type[Spec] | None:
    """The Spec of a nested table that has no name."""
    options = [annotation, *typing.get_args(annotation)]
    specs = [kind for kind in options if isinstance(kind, type) and issubclass(kind, Spec)]
    return specs[0] if specs and not issubclass(specs[0], Named) else None


def changes_of(spec: type[Spec], name: str) -> Iterator[dict[str, Any]]:
    """For each key of a table, at any depth, changes that give it another value than its default."""
    for key, field in spec.model_fields.items():
        default, place = field.default, f"{name}.{key}"
        if key == "name" or place in OTHER:
            yield OTHER.get(place, {})
        elif (inner := inner_spec(field.annotation)) and default is not None:
            yield from ({key: changes} for changes in changes_of(inner, key))
        elif isinstance(default, bool):
            yield {key: not default}
        elif typing.get_origin(field.annotation) is Literal:
            yield {key: next(word for word in typing.get_args(field.annotation) if word != default)}
        elif isinstance(default, int):
            yield {key: default + 1}
        elif isinstance(default, float):
            yield {key: default / 2 if default else 0.25}
        elif {Path, str} & {field.annotation, *typing.get_args(field.annotation)}:
            yield {key: "other"}
        elif key == "server":  # of an aggregator
            yield {key: {"name": "fedadam", "tau": 0.5}}
        else:
            assert key in NEEDED.get(name, {}), f"{place}: which other value is allowed?"
            yield {key: NEEDED[name][key] * 2}


def at_sites(experiment: Experiment) -> dict[str, Any] | str:
    """The server's view of an experiment over real sites, or why there is none."""
    try:
        return over_sites(experiment, tuple("abcdef"), test=True).identity()
    except ConfigError as error:
        return str(error)


def behaves_as(one: Experiment, two: Experiment) -> None:
    assert two == one
    assert (two.identity(), two.run_id()) == (one.identity(), one.run_id())
    assert (two.method_name(), two.setting(), two.metrics()) == (one.method_name(), one.setting(), one.metrics())
    assert at_sites(two) == at_sites(one)


@pytest.mark.parametrize("member", registry(), ids=lambda m: f"{m.family}-{m.model_fields['name'].default}")
def test_every_key_of_every_member_is_read_back(
    member: type[Named], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, as it was set and with every default named, at any depth."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.txt").write_text("{question}\n{options}")
    name = member.model_fields["name"].default
    family = FAMILIES[next(key for key, family in FAMILIES.items() if issubclass(member, family))]
    changes = list(changes_of(member, name))
    assert len(changes) >= len(member.model_fields)
    default = family.pick({"name": name, **NEEDED.get(name, {})}, "x")
    for change in changes:
        table = merge_tables({"name": name, **NEEDED.get(name, {})}, change)
        one = family.pick(table, "x")
        assert not change or one != default, f"{change} is the default"
        for written in (one.dump(), json.loads(json.dumps(one.model_dump(mode="json")))):
            two = family.pick(written, "x")
            assert two == one
            assert two.identity() == one.identity()


@pytest.mark.parametrize("member", registry(), ids=lambda m: f"{m.family}-{m.model_fields['name'].default}")
def test_every_member_is_read_back_in_an_experiment(member: type[Named]) -> None:
    """In one process, in a suite's worker, from a record, and over real sites, where a default is another one."""
    name = member.model_fields["name"].default
    if name == "diffusion":
        pytest.importorskip("diffusers")
    key = next(key for key, family in FAMILIES.items() if issubclass(member, family))
    base = {"data": "synthetic-irony", "partition": {"name": "iid", "num_clients": 6}, "cohort_size": 5}
    one = Experiment.parse(merge_tables({**base, key: {"name": name, **NEEDED.get(name, {})}}, WITH.get(name, {})))
    for two in read_back(one):
        behaves_as(one, two)
    for changes in changes_of(member, name):
        with contextlib.suppress(ConfigError):  # of several families, which other tests are about
            other = Experiment.parse(merge_tables(one.dump(), {key: {"name": name, **changes}}))
            for two in read_back(other):
                behaves_as(other, two)


@pytest.mark.parametrize("key", SPECS)
def test_every_key_of_every_table_is_read_back_in_an_experiment(key: str) -> None:
    base: dict[str, Any] = {"data": "synthetic-irony", **({"method": "personal"} if key == "personal" else {})}
    for changes in changes_of(SPECS[key], key):
        one = Experiment.parse({**base, key: changes})
        assert getattr(one, key) != getattr(Experiment.parse(base), key), f"{changes} is the default"
        for two in read_back(one):
            behaves_as(one, two)


def test_a_plug_in_is_read_back_with_its_own_nested_table(tmp_path: Path) -> None:
    """In another process, which has not loaded it: both forms name the file."""
    (tmp_path / "mine.py").write_text(PLUGIN)
    table = {
        "data": "synthetic-irony", "imports": str(tmp_path / "mine.py"),
        "aggregator": {"name": "round-trip", "inner": {"tau": 0.5}},
    }  # fmt: skip
    code = (
        "import json, sys; from fedmllm.config.experiment import Experiment; "
        "e = Experiment.parse(json.loads(sys.argv[1])); "
        "print(json.dumps([e.dump(), e.model_dump(mode='json'), e.run_id(), e.aggregator.inner.tau]))"
    )

    def in_a_process(table: dict[str, Any]) -> list[Any]:
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(table)], capture_output=True, text=True, check=True
        )
        found: list[Any] = json.loads(done.stdout)
        return found

    dump, full, run_id, tau = in_a_process(table)
    assert tau == 0.5
    for written in (dump, full):
        assert in_a_process(written) == [written if written is dump else full, full, run_id, 0.5]


def test_nothing_but_dump_asks_which_keys_were_set() -> None:
    """A full dump sets them all: what depends on it would change on the way through a file."""
    found = {
        path.relative_to(ROOT / "src/fedmllm").as_posix()
        for path in (ROOT / "src").rglob("*.py")
        if re.search(r"fields_set|exclude_unset", path.read_text(encoding="utf-8"))
    }
    assert found == {"core/spec.py", "config/experiment.py"}  # the latter adds "imports" to the keys that were set


@pytest.mark.parametrize("case", GOLDEN["experiments"], ids=lambda case: json.dumps(case["table"])[:80])
def test_settings_read_back_are_the_same_experiment(case: dict[str, Any]) -> None:
    one = Experiment.parse(case["table"])
    for two in read_back(one):
        assert two == one
        assert (two.identity(), two.run_id()) == (one.identity(), case["run_id"])


@pytest.mark.parametrize("name", ["synthetic-irony", "synthetic-crisis", "table"])
def test_settings_read_back_read_the_same_rows(name: str, tmp_path: Path) -> None:
    one = Experiment.parse({"data": own_rows(tmp_path) if name == "table" else {"name": name, **SMALL}})
    for two in read_back(one):
        for split in ("train", "test"):
            assert two.data.load(split).examples == one.data.load(split).examples
        assert two.partition == one.partition


def test_a_suite_gives_what_single_runs_give_for_every_data_set_without_a_download(tmp_path: Path) -> None:
    data = {
        "own": own_rows(tmp_path),
        **{name: {"name": name, **SMALL} for name in ("synthetic-irony", "synthetic-crisis")},
    }
    cells = []
    for name, table in data.items():
        partition = {} if name == "own" else {"partition": {"name": "iid", "num_clients": 2}}
        e = Experiment.parse({"data": table, "num_rounds": 1, "train": TRAIN, **partition})
        cells.append(Cell({"data": name, "seeds": "0"}, e, e.run_id()))
    state = run_suite(Suite("data", tuple(cells)), tmp_path / "out", 1, 1, 10**12, Silent())
    assert (state.finished, state.failed) == (3, {})
    for cell in cells:
        alone = run(cell.experiment, tmp_path / "alone" / cell.run_id)
        in_suite = RunFolder(tmp_path / "out" / cell.run_id).read_rows()
        assert [row["value"] for row in in_suite] == [row["value"] for row in alone]
