"""`fedmllm calibrate`, and the time and memory of `fedmllm estimate`, against real rounds of the embedded model."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedmllm.cli.main import app
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.reports.model import print_estimate
from fedmllm.runs.calibration import calibrate, calibration_file, device_key, read_calibrations, round_time, rows_key
from fedmllm.runs.run import run
from support.runs import events
from support.tiny_families import write

CPU = torch.device("cpu")
TINY_WEIGHTS = 10**6
TABLE: dict[str, Any] = {
    "data": {"name": "synthetic-irony", "num_train": 96, "num_test": 8},
    "partition": {"name": "iid", "num_clients": 4},
    "cohort_size": 3,
    "num_rounds": 4,
}
ATTEMPTS = 3  # other programs change the speed between a calibration and a run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def experiment(**changed: Any) -> Experiment:
    return Experiment.parse({**TABLE, **changed})


@pytest.mark.parametrize("engine", ["stacked", "in-process"])
@pytest.mark.parametrize("train", [{"batch_size": 1, "accumulation": 4}, {"batch_size": 8, "accumulation": 1}])
def test_a_round_takes_about_as_long_as_estimated(engine: str, train: dict[str, int], tmp_path: Path) -> None:
    e, ratios = experiment(engine=engine, train={**train, "max_steps": 3}), []
    for attempt in range(ATTEMPTS):
        calibrate(experiment())
        expected = round_time(e, TINY_WEIGHTS, CPU).seconds
        assert expected is not None
        run(e, tmp_path / f"run-{attempt}")
        measured = min(event["wall_s"] for event in events(tmp_path / f"run-{attempt}", "round")[1:])
        ratios.append(expected / measured)
        if 0.5 < ratios[-1] < 2:
            return
    raise AssertionError(f"expected / measured: {ratios}")


def test_an_estimate_grows_with_steps_rows_and_clients() -> None:
    calibrate(experiment())

    def seconds(**changed: Any) -> float:
        found = round_time(experiment(**changed), TINY_WEIGHTS, CPU).seconds
        assert found is not None
        return found

    short = seconds(engine="in-process", train={"max_steps": 1})
    assert seconds(engine="in-process", train={"max_steps": 3}) == pytest.approx(3 * short)
    assert seconds(engine="in-process", train={"max_steps": 1}, cohort_size=1) == pytest.approx(short / 3)
    assert seconds(engine="in-process", train={"max_steps": 1, "batch_size": 4}) > short
    assert seconds(engine="in-process") == pytest.approx(6 * short)  # 24 rows a client in steps of four
    assert seconds(engine="stacked", train={"max_steps": 1}) < short  # clients share passes
    whole = seconds(engine="in-process", method="centralised", train={"max_steps": 0})
    assert whole == pytest.approx(4 / 3 * 6 * short)  # all rows, not those of three of four clients


def test_what_is_not_known_is_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timed = round_time(experiment(), TINY_WEIGHTS, CPU)
    assert (timed.seconds, timed.first_s) == (None, None)
    print_estimate(experiment())
    out = capsys.readouterr().out
    assert "time: not known; this device is not calibrated; run `fedmllm calibrate EXPERIMENT.toml`" in out
    assert "fits in 24 GB: yes" in out
    calibrate(experiment())
    other = experiment(backbone={"name": "hf", "path": str(write("llava", tmp_path / "llava"))})
    scaled = round_time(other, 10**9, CPU)
    assert "at least, by matrix products" in scaled.about
    assert "32 of 96 training rows, tokenized now" in scaled.about
    assert scaled.seconds is not None
    twice = round_time(other, 2 * 10**9, CPU).seconds
    assert twice == pytest.approx(2 * scaled.seconds)
    gone = experiment(data={"name": "vqa-rad", "root": str(tmp_path / "gone")})
    assert "the rows cannot be read" in round_time(gone, TINY_WEIGHTS, CPU).about


def test_rows_that_were_not_measured_are_counted_by_a_sample(tmp_path: Path) -> None:
    calibrate(experiment())
    other = experiment(data={"name": "synthetic-irony", "num_train": 95, "num_test": 8, "seed": 3})
    found = round_time(other, TINY_WEIGHTS, CPU)
    calibrate(other)
    known = round_time(other, TINY_WEIGHTS, CPU)
    (tokens,) = (float(re.search(r"rows of (\d+) tokens", one.about)[1]) for one in (found,))  # type: ignore[index]
    assert tokens == pytest.approx(read_calibrations()[device_key(CPU)].tokens[rows_key(other)], rel=0.1)
    assert "the mean of 32 of 95 training rows, tokenized now" in found.about
    assert "as calibrated" in known.about
    long = round_time(experiment(backbone={"name": "tiny", "max_tokens": 40}), TINY_WEIGHTS, CPU)
    assert "rows of 40 tokens, the most that are allowed, because no sample can be tokenized: a row has" in long.about


def test_a_row_that_cannot_be_tokenized_is_left_out_of_the_sample(tmp_path: Path) -> None:
    calibrate(experiment())
    texts = ["short", "long " * 2000, "short", "short"]
    lines = [f"{text},{('no', 'yes')[i % 2]}" for i, text in enumerate(texts)]
    (tmp_path / "rows.csv").write_text("\n".join(["note,ill", *lines]) + "\n")
    data = {
        "name": "table", "root": str(tmp_path), "train": "rows.csv", "test": "rows.csv", "question": "Is it ill?",
        "choices": ["no", "yes"], "columns": {"text": "note", "answer": "ill"},
    }  # fmt: skip
    about = round_time(experiment(data=data), TINY_WEIGHTS, CPU).about
    assert "the mean of 3 of 4 training rows, tokenized now, nothing hidden" in about


def test_the_command_line_measures_and_estimates(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(
        'data = { name = "synthetic-irony", num_train = 40, num_test = 8 }\npartition = { name = "iid", num_clients = 2 }\n'
    )
    path = str(tmp_path / "e.toml")
    began = time.perf_counter()
    done = CliRunner().invoke(app, ["calibrate", path, "--threads", "1"], catch_exceptions=False)
    assert time.perf_counter() - began < 60
    assert "GFLOP/s" in done.output
    assert f"kept in {calibration_file()}" in done.output
    arguments = ["estimate", path, "--memory-gb", "0.001", "--threads", "1"]
    table = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert "fits in 0.001 GB: no" in table.output
    assert "s a round" in table.output
    assert "this model was measured on" in table.output
    out = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert out["fits_in_0.001_gb"] is False
    assert out["round_s"] > 0
    assert out["needed_bytes"] == out["total_memory_bytes"]


def test_measurements_are_kept_side_by_side_and_a_damaged_file_is_an_error() -> None:
    calibrate(experiment())
    found = calibrate(experiment(backbone={"name": "tiny", "lora": {"r": 4}}))
    assert len(found.models) == 2
    assert read_calibrations() == {found.device: found}
    calibration_file().write_text('{"format": 2}')
    with pytest.raises(FedmllmError, match="format: got 2; this version reads 1; delete it and calibrate again"):
        read_calibrations()
    calibration_file().write_text("[]")
    with pytest.raises(FedmllmError, match="not a calibration"):
        round_time(experiment(), TINY_WEIGHTS, CPU)
