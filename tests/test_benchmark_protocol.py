"""Rules of the benchmark: seeds draw the data, tuning reads no test row, and controls for fewer rows and more training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.types import Example
from fedmllm.data.synthetic_verdict import SyntheticVerdict
from fedmllm.runs.inputs import Inputs
from fedmllm.runs.methods import baseline_rounds, equivalent_rounds
from fedmllm.runs.run import run
from fedmllm.runs.suites.suite import Suite
from fedmllm.scenarios.assign import assign
from fedmllm.scenarios.complete_only import CompleteOnly
from fedmllm.scenarios.masks import Cross, Missing
from fedmllm.scenarios.partitions import Dirichlet

SMALL: dict[str, Any] = {
    "data": {"name": "synthetic-verdict", "num_train": 36, "num_validation": 9, "num_test": 8},
    "partition": {"name": "iid", "num_clients": 3},
    "train": {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 1},
    "num_rounds": 3,
}
MODALITIES = ("image", "text")


def examples(count: int) -> tuple[Example, ...]:
    fields = {"image": (Path("a.png"),), "text": "a"}
    return tuple(Example(i, fields, "?", ("no", "yes"), ("no", "yes")[i % 2], "x") for i in range(count))


def test_complete_only_keeps_the_complete_rows_of_the_same_masks() -> None:
    rows, partition = examples(400), Dirichlet()
    whole = assign(rows, MODALITIES, partition, Missing(rate=0.5), 3)
    control = assign(rows, MODALITIES, partition, CompleteOnly(of=Missing(rate=0.5)), 3)
    for shard, kept in zip(whole, control, strict=True):
        complete = [row for row, visible in zip(shard.rows, shard.visible, strict=True) if len(visible) == 2]
        assert list(kept.rows) == complete
        assert set(kept.visible) <= {frozenset(MODALITIES)}
    assert 70 < sum(len(shard.rows) for shard in control) < 130  # a quarter of 400


def test_complete_only_refuses_a_scenario_without_complete_rows() -> None:
    with pytest.raises(DataError, match="scenario: 'complete-only' leaves no row"):
        assign(examples(50), MODALITIES, Dirichlet(), CompleteOnly(of=Cross()), 0)
    with pytest.raises(ConfigError, match=r"scenario\.of\.name: got 'mising'.*did you mean 'missing'"):
        Experiment.parse({**SMALL, "scenario": {"name": "complete-only", "of": "mising"}})


def test_a_seed_draws_the_data_if_the_suite_asks_for_it(tmp_path: Path) -> None:
    text = 'base = { data = "synthetic-verdict" }\n[matrix]\nseeds = [4, 5]\n'
    (tmp_path / "plain.toml").write_text(text)
    (tmp_path / "paired.toml").write_text(text + 'seed_keys = ["seed", "data.seed"]\n')
    plain, paired = (Suite.load(tmp_path / f"{name}.toml").cells for name in ("plain", "paired"))
    assert [(c.experiment.seed, c.experiment.data.seed) for c in plain] == [(4, 0), (5, 0)]
    assert [(c.experiment.seed, c.experiment.data.seed) for c in paired] == [(4, 4), (5, 5)]
    assert [c.labels["seeds"] for c in paired] == ["4", "5"]
    (tmp_path / "bad.toml").write_text(text + 'seed_keys = ["data.seed"]\n')
    with pytest.raises(ConfigError, match=r'matrix\.seed_keys: got \[.data\.seed.\]; give a list with "seed"'):
        Suite.load(tmp_path / "bad.toml")


def test_tuning_reads_no_test_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    load = SyntheticVerdict.load
    monkeypatch.setattr(SyntheticVerdict, "load", lambda self, split: (asked.append(split), load(self, split))[1])
    rows = run(
        Experiment.parse({**SMALL, "method": "zero-shot", "evaluate": {"rows": "validation"}}), tmp_path / "a"
    ).rows
    assert set(asked) == {"train", "validation"}
    ceilings = {row["metric"]: row["ceiling"] for row in rows if "ceiling" in row}
    assert ceilings == SyntheticVerdict().ceilings(frozenset(MODALITIES))
    with pytest.raises(ConfigError, match='got select = "validation", the same rows'):
        Experiment.parse({**SMALL, "evaluate": {"rows": "validation", "select": "validation", "every": 1}})


def test_a_converged_baseline_trains_for_all_rounds(tmp_path: Path) -> None:
    selecting = {"evaluate": {"select": "validation", "every": 1}}
    equal = Experiment.parse({**SMALL, **selecting, "method": "local"})
    converged = Experiment.parse({**SMALL, **selecting, "method": "local", "budget": "converged"})
    rows = equal.data.load("train").examples
    shards = assign(rows, MODALITIES, equal.partition, equal.scenario, 0)
    assert equivalent_rounds(equal, shards) == baseline_rounds(equal, shards) == 2.0  # 3 rounds of 2 of 3 clients
    assert baseline_rounds(converged, shards) == 3.0
    assert equal.run_id() != converged.run_id()
    for bad, message in (
        ({"method": "federated"}, "it is for: local, centralised"),
        ({"method": "local"}, "needs eval"),
    ):
        with pytest.raises(ConfigError, match=message):
            Experiment.parse({**SMALL, **bad, "budget": "converged"})


def test_selection_on_validation_rows_leaves_the_digest_of_the_rows() -> None:
    """Reports pair runs by the digest of their rows: the test rows of both are the same."""
    last = Inputs.load(Experiment.parse(SMALL)).digests
    selected = Inputs.load(Experiment.parse({**SMALL, "evaluate": {"select": "validation", "every": 1}})).digests
    assert {key: value for key, value in selected.items() if key != "validation"} == last
    assert len(selected["validation"]) == 16
