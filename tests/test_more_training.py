"""More training: from an adapter, more rounds of a finished run, at one site; and whether anything was learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmllm.cli.display import learned_text
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError
from fedmllm.reports.reading import read_run
from fedmllm.runs.predict import predict
from fedmllm.runs.run import run
from support.runs import TABLE, Stop, events, experiment

CONSTANT = {**TABLE["train"], "round_schedule": "constant"}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds with a constant rate."""
    folder = tmp_path_factory.mktemp("more") / "short"
    run(experiment(train=CONSTANT, num_rounds=2), folder, compare_baselines=True)
    return folder


def warm(short: Path, **changed: Any) -> Experiment:
    return experiment(backbone={"name": "tiny", "adapter": str(short / "adapter")}, **changed)


def test_training_starts_from_an_adapter(short: Path, tmp_path: Path) -> None:
    """The zero-shot result of the adapter is the result of its run; at one site it trains on from there."""
    before = run(warm(short, method="zero-shot"), tmp_path / "zero")
    assert before.value() == run_value(short)
    one_site = warm(short, partition={"name": "iid", "num_clients": 1}, cohort_size=1, num_rounds=1)
    result = run(one_site, tmp_path / "site")
    assert result.adapter is not None
    adapters = [result.adapter.tensors, torch_adapter(short)]
    far = [float((a - b).norm()) for a, b in zip(*(tree.values() for tree in adapters), strict=True)]
    assert sum(far) > 0
    head = events(tmp_path / "site")[0]
    assert head["digests"]["adapter"] != events(short)[0]["digests"].get("adapter")
    assert events(tmp_path / "zero")[0]["digests"]["adapter"] == head["digests"]["adapter"]


def run_value(folder: Path) -> float:
    return float(json.loads((folder / "summary.json").read_text())["rows"][0]["value"])


def torch_adapter(folder: Path) -> dict[str, torch.Tensor]:
    from fedmllm.runs.result import Adapter

    return Adapter(folder / "adapter").tensors


def test_an_adapter_of_another_edition_is_refused(short: Path, tmp_path: Path) -> None:
    """Its tensors would fit: the editions differ in their weights alone."""
    other = experiment(backbone={"name": "tiny", "edition": 2, "adapter": str(short / "adapter")}, method="zero-shot")
    with pytest.raises(ConfigError, match=r"trained on edition 1 of the embedded model; backbone\.edition is 2"):
        run(other, tmp_path / "other")
    plain = experiment(backbone={"name": "tiny", "edition": 2}, num_rounds=1)
    with pytest.raises(ConfigError, match="trained on edition 1"):
        predict(short / "adapter", tmp_path / "rows.jsonl", experiment=plain)


def test_an_adapter_that_does_not_fit_is_refused(short: Path, tmp_path: Path) -> None:
    assert "adapter" not in experiment().identity()["backbone"]
    with pytest.raises(ConfigError, match=r"lora.r is 8 there and 4 here; set backbone.lora"):
        run(experiment(backbone={"name": "tiny", "adapter": str(short / "adapter"), "lora": {"r": 4}}), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"backbone.adapter: .*nowhere.*cannot be read"):
        run(experiment(backbone={"name": "tiny", "adapter": str(tmp_path / "nowhere")}), tmp_path / "b")
    with pytest.raises(ConfigError, match="flora starts from a new adapter"):
        warm(short, aggregator="flora", engine="in-process")
    with pytest.raises(ConfigError, match='no effect with method = "majority"'):
        warm(short, method="majority")


def test_a_finished_run_takes_more_rounds_and_is_the_longer_run(short: Path, tmp_path: Path) -> None:
    longer = experiment(train=CONSTANT, num_rounds=4)
    whole = run(longer, tmp_path / "whole")
    folder = tmp_path / "extended"
    run(experiment(train=CONSTANT, num_rounds=2), folder)
    with pytest.raises(KeyboardInterrupt):  # a stop within the added rounds
        run(longer, folder, [Stop("round", 2)], resume=True)
    assert not (folder / "summary.json").exists()
    extended = run(longer, folder, resume=True)
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl.gz"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert extended.run_id == whole.run_id == longer.run_id()
    assert [e["round"] for e in events(folder, "round")] == [1, 2, 3, 4]
    assert {e["run_id"] for e in events(folder, "extended")} == {longer.run_id()}
    assert read_run(folder).settings["num_rounds"] == 4
    with pytest.raises(ConfigError, match="cannot be resumed with other settings: num_rounds was 4, is 2"):
        run(experiment(train=CONSTANT, num_rounds=2), folder, resume=True)


def test_more_rounds_need_a_schedule_that_does_not_depend_on_them(tmp_path: Path) -> None:
    run(experiment(num_rounds=1), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"cannot be raised with train.round_schedule = 'cosine'"):
        run(experiment(num_rounds=2), tmp_path / "run", resume=True)


def test_a_run_that_learned_nothing_says_so_and_names_the_settings(short: Path, tmp_path: Path) -> None:
    (found,) = events(short, "learned")
    assert [b["name"] for b in found["baselines"]] == ["start", "majority"]
    assert found["value"] == pytest.approx(run_value(short))
    folder = tmp_path / "idle"
    idle = experiment(data={**TABLE["data"], "num_test": 60}, train={**TABLE["train"], "lr": 1e-9}, num_rounds=1)
    run(idle, folder, compare_baselines=True)
    text = learned_text(folder / "record.jsonl")
    assert "Nothing learned that these rows can show: not better than the model before training" in text
    assert "train.lr = 1e-09 is low for this model: try 0.003" in text
    assert "about 2 optimizer steps in all: raise num_rounds = 1" in text


def test_advice_after_a_warm_start_is_about_the_start_adapter(tmp_path: Path) -> None:
    lines = [f"{i},{'fever and cough' if i % 2 else 'no complaints'},{'yes' if i % 2 else 'no'}" for i in range(48)]
    (tmp_path / "rows.csv").write_text("\n".join(["case,note,ill", *lines]) + "\n")
    data = {"name": "table", "root": str(tmp_path), "train": "rows.csv", "test": "rows.csv", "question": "Is it ill?"}
    data |= {"choices": ["no", "yes"], "columns": {"id": "case", "text": "note", "answer": "ill"}}

    def said(name: str, lr: float, rounds: int, start: str = "") -> str:
        backbone = {"name": "tiny", "adapter": str(tmp_path / start / "adapter") if start else ""}
        train = {"lr": lr, "batch_size": 4, "accumulation": 1}
        table = {"data": data, "partition": {"name": "iid", "num_clients": 2}, "cohort_size": 2, "backbone": backbone}
        run(Experiment.parse({**table, "num_rounds": rounds, "train": train}), tmp_path / name, compare_baselines=True)
        return learned_text(tmp_path / name / "record.jsonl")

    assert "Nothing learned" not in said("trained", 1e-2, 3)
    text = said("more", 1e-9, 1, start="trained")
    assert "not better than the start adapter. Likely reasons" in text
    assert f"the start adapter ({tmp_path / 'trained' / 'adapter'}) already scores 1.000 here" in text
    assert "low for this model" not in text
    assert "optimizer steps" not in text
    assert "training lost" not in text
    assert "Nothing learned" in said("untrained", 1e-9, 1)
    text = said("again", 1e-9, 1, start="untrained")
    assert "not clearly above the most frequent answer" in text
    assert "train.lr = 1e-09 is low for this model" in text


def test_all_sites_take_part_if_the_rows_name_them(shared: Path) -> None:
    table = {"name": "table", "root": str(shared / "cases/hospital"), "train": "rows.csv", "test_rate": 0.2}
    columns = {"image": "scan", "text": "report", "answer": "label"}
    data = {**table, "choices": ["no", "yes"], "question": "?"}
    assert Experiment.parse({"data": {**data, "columns": {**columns, "client": "site"}}}).cohort_size == 0
    assert Experiment.parse({"data": {**data, "columns": columns}}).cohort_size == 2
