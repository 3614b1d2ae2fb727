"""The report's tables of importance by client, from what clients measured, and the order of modalities."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.reports.client_importance import MOST_CLIENTS, client_importances
from fedmllm.reports.reading import read_results
from fedmllm.reports.write import write_report
from fedmllm.runs.run import run
from support.made_up import write_run
from support.runs import events, experiment

MEASURES = {"modality_dropout": {"name": "importance", "rate": 0, "rows": 2}}


def test_a_client_has_the_mean_over_seeds_of_its_last_round(tmp_path: Path):
    for seed in (0, 1):
        run(experiment(num_rounds=3, cohort_size=2, seed=seed, **MEASURES), tmp_path / str(seed))
    (table,) = client_importances(read_results([tmp_path]).datasets[0])
    assert table.modalities == ["image", "text"]
    assert list(table.rows) == ["0", "1", "2"]
    last = [
        {c["client"]: c["importance_text"] for event in events(tmp_path / seed, "round") for c in event["clients"]}
        for seed in "01"
    ]
    for client, row in table.rows.items():
        own = [values[int(client)] for values in last if int(client) in values]
        assert (row["text"].mean, row["text"].n) == (pytest.approx(statistics.fmean(own)), len(own))
    write_report([tmp_path], tmp_path / "report.html")
    text = (tmp_path / "report.md").read_text()
    assert "### Importance of each modality for each client" in text
    assert "| method | setting | client | image | text |" in text
    assert "Importance of each modality for each client" in (tmp_path / "report.html").read_text()


def test_many_clients_share_three_rows_and_the_file_is_named(tmp_path: Path):
    made_up(tmp_path / "run", num_clients=MOST_CLIENTS + 5)
    (table,) = client_importances(read_results([tmp_path]).datasets[0])
    assert [(name, row["image"].mean) for name, row in table.rows.items()] == [
        ("mean", 12),
        ("lowest", 0),
        ("highest", 24),
    ]
    (report,) = write_report([tmp_path], tmp_path / "report.md")
    text = report.read_text()
    assert "With up to 25 clients: mean ± standard deviation, lowest and highest over clients." in text
    assert str(tmp_path / "run" / "record.jsonl") in text


def test_runs_without_measurements_have_no_table(tmp_path: Path):
    write_run(tmp_path / "run", Experiment.parse({"data": "synthetic-irony"}))
    assert client_importances(read_results([tmp_path]).datasets[0]) == []


def test_modalities_are_in_the_order_of_the_set(tmp_path: Path):
    write_run(tmp_path / "run", Experiment.parse({"data": "synthetic-clinic"}))
    record = tmp_path / "run" / "record.jsonl"
    record.write_text(record.read_text().replace('"image+text"', '"genes+image+labs+text"'))
    assert read_results([tmp_path]).datasets[0].modalities == ("image", "text", "labs", "genes")


def made_up(folder: Path, num_clients: int) -> None:
    """A made-up run whose last round has all clients, with their numbers as importance."""
    write_run(folder, Experiment.parse({"data": "synthetic-irony", **MEASURES}), num_clients)
    lines = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["event"] == "round"][-1]
    last["clients"] = [
        {"client": k, "num_examples": 1, "importance_image": k, "importance_text": -k} for k in range(num_clients)
    ]
    (folder / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
