"""Result of a run: the same after `run` and read back from the folder."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.runs.events import Event, RoundEnd
from fedmllm.runs.record import read
from fedmllm.runs.result import RunResult, load_run
from fedmllm.runs.run import run

TABLE: dict[str, Any] = {
    "data": {"name": "synthetic-irony", "num_train": 36, "num_validation": 8, "num_test": 8},
    "partition": {"name": "iid", "num_clients": 3},
    "train": {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 1},
    "num_rounds": 2,
    "cohort_size": 3,
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    evaluate = {"every": 1, "visible": ["all", "text"]}
    return run(Experiment.parse({**TABLE, "evaluate": evaluate}), tmp_path_factory.mktemp("result") / "run")


def test_a_result_is_its_summary_rows(result: RunResult) -> None:
    assert [(row["metric"], row["visible"]) for row in result][:2] == [("auc", "all"), ("auc_hard", "all")]
    assert result[0] is result.rows[0]
    assert result == list(result.rows)
    assert result.value() == result[0]["value"]
    assert result.value("accuracy", "text") == next(
        row["value"] for row in result if (row["metric"], row["visible"]) == ("accuracy", "text")
    )
    with pytest.raises(FedmllmError, match=r"no value of 'acc' with None visible; there are: auc \(all\)"):
        result.value("acc")


def test_a_loaded_run_is_the_result_of_run(result: RunResult) -> None:
    loaded = load_run(result.folder)
    assert loaded == result
    assert loaded.history == result.history
    assert loaded.adapter is not None
    saved = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(loaded.adapter.tensors[name], tensor) for name, tensor in saved.items())
    assert loaded.adapter.path == result.folder / "adapter"


def test_the_history_has_a_row_per_round_and_per_client(result: RunResult) -> None:
    events = list(read(result.folder / "record.jsonl"))
    rounds = [event for event in events if event["event"] == "round"]
    history = result.history
    assert [row["round"] for row in history.rounds] == [1, 2]
    assert history.rounds[0]["loss"] == pytest.approx(sum(c["loss"] for c in rounds[0]["clients"]) / 3)
    assert [row["num_averaged"] for row in history.rounds] == [3, 3]
    assert [(row["round"], row["client"]) for row in history.clients] == [(t, k) for t in (1, 2) for k in range(3)]
    for row, number in ((history.rounds[0], 1), (history.rounds[1], 2)):
        (of_text,) = [e for e in events if (e["event"], e.get("round"), e.get("visible")) == ("eval", number, "text")]
        assert row["auc/text"] == of_text["metrics"]["auc"]


def test_local_runs_have_an_adapter_per_client(tmp_path: Path) -> None:
    found = run(Experiment.parse({**TABLE, "num_rounds": 1, "method": "local"}), tmp_path)
    assert found.adapter is None
    assert list(found.client_adapters) == [0, 1, 2]
    assert [row["client"] for row in found.history.rounds] == [0, 1, 2]
    assert all("auc/all" in row for row in found.history.rounds)
    pictures = found._repr_html_()
    assert pictures.count("<tr>") == 1 + len(found)


def test_a_frame_holds_the_rows_or_names_what_is_missing(result: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FedmllmError, match=r"pandas is not installed; pip install pandas, or use \.rows"):
        result.to_frame()
    monkeypatch.undo()
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    assert isinstance(result.to_frame(), pandas.DataFrame)
    assert list(result.history.to_frame("clients")["client"]) == [0, 1, 2, 0, 1, 2]


def test_folders_that_hold_no_finished_run_are_refused(tmp_path: Path, result: RunResult) -> None:
    with pytest.raises(FedmllmError, match="no such folder"):
        load_run(tmp_path / "nothing")
    with pytest.raises(FedmllmError, match=r"not the folder of a run: it has no record\.jsonl; runs in it: run"):
        load_run(result.folder.parent)
    (tmp_path / "record.jsonl").write_bytes((result.folder / "record.jsonl").read_bytes())
    with pytest.raises(FedmllmError, match="the run is not finished"):
        load_run(tmp_path)
    (tmp_path / "summary.json").write_text('{"rows": 3}')
    with pytest.raises(FedmllmError, match=r"summary\.json: not a summary"):
        load_run(tmp_path)


def test_an_event_comes_back_from_its_line_also_under_the_keys_of_earlier_releases() -> None:
    line = {
        "event": "round", "round": 2, "cohort": [0, 4], "clients": [], "dropped": [], "up_bytes": 0,
        "up_lora_bytes": 0, "down_bytes": 8, "down_lora_bytes": 8, "server_s": 0.1, "wall_s": 0.2, "lr": 1e-3,
        "num_rounds": 3,
    }  # fmt: skip
    old = Event.from_json({**line, "away": [4], "alone": 0, "time": 1.0})
    assert isinstance(old, RoundEnd)
    assert (old.dropped_out, old.client) == ([4], 0)
    assert old.to_json() == {**line, "dropped_out": [4], "client": 0}
    assert Event.from_json(old.to_json()) == old
    with pytest.raises(FedmllmError, match=r"event round: missing: lr, num_rounds"):
        Event.from_json({k: v for k, v in line.items() if k not in ("lr", "num_rounds")})
    with pytest.raises(FedmllmError, match="event: got 'x'; allowed: experiment, resumed"):
        Event.from_json({"event": "x"})


def test_a_run_draws_a_bar_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from fedmllm.runs.events import Ended, RoundEnd, Stopped
    from fedmllm.runs.progress import NotebookBar, in_notebook

    def end(round_: int, client: int | None = None) -> RoundEnd:
        clients = [{"client": 0, "loss": 1.5}]
        return RoundEnd(round_, [0], clients, [], 0, 0, 0, 0, 0.0, 0.0, 0.1, num_rounds=2, client=client)

    bar = NotebookBar()
    for event in (end(1), end(2), end(1, client=3), end(2, client=3), Ended(1)):
        bar(event)
    drawn = capsys.readouterr().err
    assert "rounds: 100%" in drawn
    assert "client 3 alone: 100%" in drawn
    assert "loss 1.500" in drawn
    bar(Stopped("killed"))  # with no bar to close
    assert not in_notebook()
