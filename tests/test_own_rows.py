"""Metrics on each client's own test rows: the split, the setting, the summary, the report."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError
from fedmllm.core.types import Example, Shard
from fedmllm.reports.own_rows import own_markdown, own_table
from fedmllm.reports.reading import DatasetResults, read_run
from fedmllm.reports.tables import result_table
from fedmllm.reports.write import write_report
from fedmllm.runs.own_rows import split_test_rows
from fedmllm.runs.record import read
from fedmllm.runs.run import run
from fedmllm.scenarios.partitions import ByColumn, Dirichlet, Iid
from fedmllm.scenarios.published import Published

SMALL: dict[str, Any] = {
    "data": {"name": "synthetic-irony", "num_train": 32, "num_validation": 4, "num_test": 40},
    "partition": {"name": "iid", "num_clients": 3},
    "train": {"lr": 1e-2, "batch_size": 4, "accumulation": 1, "max_steps": 1},
    "num_rounds": 1,
    "cohort_size": 0,
}


def rows(number: int, answers: str = "ab", **columns: str) -> list[Example]:
    return [Example(i, {}, "", tuple(answers), answers[i % len(answers)], f"r:{i}", columns) for i in range(number)]


def test_test_rows_have_the_shares_of_the_training_rows() -> None:
    """Per label and client, Dirichlet shares of one seed are equal up to one row at each border."""
    law, train, test = Dirichlet(alpha=0.3, num_clients=5), rows(4000), rows(400)
    of_train, of_test = law.split(train, 7), law.split_test(train, test, 7)
    assert sorted(row for own in of_test for row in own) == list(range(400))
    for one, other in zip(of_train, of_test, strict=True):
        counts, tested = (Counter(examples[i].answer for i in own) for examples, own in ((train, one), (test, other)))
        assert all(abs(counts[label] / 10 - tested[label]) <= 1.1 for label in "ab")
    assert law.split_test(train, test, 8) != of_test


def test_a_natural_split_goes_by_name_whatever_sites_the_test_rows_have() -> None:
    train = [*rows(2, client="north"), *rows(2, client="south")]
    test = [*rows(3, client="south"), *rows(1, client="west"), *rows(1, client="north")]
    assert ByColumn().split_test(train, test, 0) == [[4], [0, 1, 2]]


def test_auto_is_for_personal_models_and_says_why_rows_are_left_out() -> None:
    test, shards = rows(9), [Shard(k, (k,), (frozenset(),)) for k in range(2)] + [Shard(2, (), ())]
    local = Experiment.parse({**SMALL, "method": "local"})
    own, note = split_test_rows(local, shards, rows(3), test)
    assert [len(one) for one in own] == [3, 3, 0]  # no model of a client without training rows
    assert not note
    assert split_test_rows(Experiment.parse(SMALL), shards, rows(3), test) == ([], "")
    odd = local.model_copy(update={"partition": Published()})
    own, note = split_test_rows(odd, shards, rows(3), test)
    assert own == []
    assert "published" in note
    forced = odd.model_copy(update={"evaluate": local.evaluate.model_copy(update={"own_rows": "on"})})
    with pytest.raises(ConfigError, match=r"evaluate\.own_rows: .*allowed: dirichlet"):
        split_test_rows(forced, shards, rows(3), test)
    assert Iid(num_clients=3).split_test(rows(3), test, 0) == Iid(num_clients=3).split(test, 0)


def test_the_run_id_stays_unless_the_setting_differs() -> None:
    one, same, other = (
        Experiment.parse({**SMALL, "evaluate": table}) for table in ({}, {"own_rows": "auto"}, {"own_rows": "on"})
    )
    assert one.run_id() == same.run_id() != other.run_id()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[DatasetResults, dict[str, Path]]:
    """Federated with the setting, alone, fine-tuned, and personal factors."""
    folder = tmp_path_factory.mktemp("own")
    tables: dict[str, dict[str, Any]] = {
        "global": {"evaluate": {"own_rows": "on"}},
        "local": {"method": "local"},
        "personal": {"method": "personal"},
        "fedsa": {"aggregator": "fedsa-lora"},
        "plain": {"aggregator": "fedadam"},
    }
    for name, changes in tables.items():
        run(Experiment.parse({**SMALL, **changes}), folder / name)
    found = DatasetResults("synthetic-irony", tuple(read_run(folder / name) for name in tables))
    return found, {name: folder / name for name in tables}


def test_the_record_and_the_summary_have_them(dataset: tuple[DatasetResults, dict[str, Path]]) -> None:
    _, folders = dataset
    for name, folder in folders.items():
        events = [event for event in read(folder / "record.jsonl") if event["event"] == "eval"]
        assert all(("own" in event) == (name != "plain") for event in events)
        if name != "plain":
            assert sum(one["num_rows"] for event in events[-3:] for one in event["own"]) in (40, 120)
        (row,) = [one for one in read_run(folder).rows if one["metric"] == "accuracy"]
        assert ("own_value" in row) == (name != "plain")
        assert row.get("own_n") == (None if name == "plain" else 3)


def test_the_report_sets_them_side_by_side(dataset: tuple[DatasetResults, dict[str, Path]], tmp_path: Path) -> None:
    found, folders = dataset
    table = {row.method: row for row in own_table(found, "accuracy")}
    assert len(table) == 5  # four methods, and the global adapter of the fine-tuned one
    (adapter,) = [method for method in table if method.endswith(", global adapter")]
    assert table[adapter].whole.mean == next(row for row in table.values() if row.method != adapter).whole.mean
    for name, folder in folders.items():
        (row,) = [one for one in read_run(folder).rows if one["metric"] == "accuracy"]
        if name != "plain":
            assert any(one.own.mean == pytest.approx(row["own_value"]) for one in table.values())
            assert any(one.spread == pytest.approx(row["own_std"]) for one in table.values())
    page, words = tmp_path / "page.html", tmp_path / "report.md"
    for out in (page, words):
        write_report([folders["personal"].parent], out)
        assert "own test rows" in out.read_text(encoding="utf-8")
    text = own_markdown(list(table.values()), "accuracy", result_table(found, "accuracy").scale)
    assert text.count("\n| ") == 6
