"""Predictions kept by a run: they give the summary's values again, in the same bytes for the same run."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.core.metrics import METRICS
from fedmllm.core.types import Example, Prediction
from fedmllm.runs.predictions import PredictionFile, choice_probabilities, read_predictions
from fedmllm.runs.run import run

TABLE: dict[str, Any] = {
    "data": {"name": "synthetic-irony", "num_train": 36, "num_validation": 8, "num_test": 20},
    "partition": {"name": "iid", "num_clients": 3},
    "train": {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 1},
    "num_rounds": 2,
}


def closed(id_: int, scores: tuple[float, ...], answer: str = "A") -> Prediction:
    return Prediction(Example(id_, {"text": "x"}, "?", ("A", "B"), answer, "t:1", {"site": "north"}), scores, None)


def opened(id_: int, text: str | None, raw: str) -> Prediction:
    return Prediction(Example(id_, {}, "?", (), "left lung", "t:2"), (), text, raw)


def written(folder: Path, *evaluations: list[Prediction]) -> Path:
    file = PredictionFile(folder / "predictions.jsonl.gz")
    for round_, predictions in enumerate(evaluations, start=1):
        file.write(predictions, "text", round_)
    file.close()
    return file.path


@pytest.mark.parametrize("method", ["federated", "local", "majority"])
def test_the_metrics_of_a_summary_come_out_of_the_kept_predictions(method: str, tmp_path: Path) -> None:
    evaluate = {"every": 1, "visible": ["all", "image"]}
    rows = run(Experiment.parse({**TABLE, "method": method, "evaluate": evaluate}), tmp_path / "run")
    kept = list(read_predictions(tmp_path / "run" / "predictions.jsonl.gz"))
    of_summary = [e for e in kept if e.round == (2 if method == "federated" else None)]
    for row in rows:
        values = [METRICS[row["metric"]](e.predictions) for e in of_summary if e.visible == row["visible"]]
        assert len(values) == row["n"]
        assert row["value"] == pytest.approx(sum(v for v in values if v is not None) / len(values), abs=1e-9)
    assert len(kept) == {"federated": 2 * 2, "local": 3 * 2 * 2, "majority": 1}[method]
    assert {e.client for e in of_summary} == ({0, 1, 2} if method == "local" else {None})
    assert kept[0].has[0] == {"image", "text"}
    assert len(kept[0].predictions) == 20
    run(Experiment.parse({**TABLE, "method": method, "evaluate": evaluate}), tmp_path / "again")
    assert (tmp_path / "again" / "predictions.jsonl.gz").read_bytes() == (
        tmp_path / "run" / "predictions.jsonl.gz"
    ).read_bytes()


def test_the_file_is_gzip_over_json_lines(tmp_path: Path) -> None:
    path = written(
        tmp_path, [closed(7, (math.log(3.0), 0.0)), opened(8, "left lung", "left lung\n"), opened(9, None, "a\nb")]
    )
    head, line = map(json.loads, gzip.decompress(path.read_bytes()).splitlines())
    assert head == {
        "format": 1,
        "choices": [["A", "B"], []],
        "rows": [
            {"id": 7, "answer": "A", "choices": 0, "has": ["text"], "columns": {"site": "north"}},
            {"id": 8, "answer": "left lung", "choices": 1, "has": [], "columns": {}},
            {"id": 9, "answer": "left lung", "choices": 1, "has": [], "columns": {}},
        ],
    }
    assert line == {
        "round": 1, "client": None, "visible": "text", "p": [[0.75, 0.25], [], []], "text": {"1": "left lung"},
        "raw": {"2": "a\nb"},
    }  # fmt: skip
    (back,) = read_predictions(path)
    assert [p.text for p in back.predictions] == [None, "left lung", None]
    assert METRICS["unparsed"](back.predictions) == 1.0
    assert back.predictions[0].scores == pytest.approx((math.log(0.75), math.log(0.25)))


def test_probabilities_keep_their_order_at_both_ends() -> None:
    """exp(-800) is 0 in double precision: such a row still has an order and a finite score."""
    assert choice_probabilities(closed(0, (-800.0, 0.0))) == [0.0, 1.0]
    assert choice_probabilities(closed(0, (0.0, -30.0)))[1] == pytest.approx(math.exp(-30), rel=1e-5)
    assert choice_probabilities(closed(0, (0.0, -1.0)), one_hot=True) == [1.0, 0.0]


def test_a_half_written_end_is_skipped_and_anything_else_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, [closed(0, (0.0, -1.0))], [closed(0, (0.0, -2.0))])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert [e.round for e in read_predictions(path)] == [1]
    path.write_bytes(b"")
    assert list(read_predictions(path)) == []
    for content, message in [
        (b"no gzip", "damaged"),
        (gzip.compress(b'{"format": 2}'), "format: got 2; this version of fedmllm reads 1"),
        (gzip.compress(b'{"format": 1, "choices": 3, "rows": []}'), "not the predictions of a run"),
        (gzip.compress(b"[]\n"), "not the predictions of a run"),
        (gzip.compress(b"{"), "not the predictions of a run"),
        (whole[:40] + b"\xff\xff" + whole[42:], "damaged"),
    ]:
        path.write_bytes(content)
        with pytest.raises(FedmllmError, match=message):
            list(read_predictions(path))
    path.unlink()
    with pytest.raises(FedmllmError, match="cannot be read: No such file"):
        list(read_predictions(path))


def test_an_evaluation_costs_a_few_bytes_a_row(tmp_path: Path) -> None:
    predictions = [closed(i, (math.sin(i) * 5, math.cos(i) * 5)) for i in range(1000)]
    once, twice = (len(written(tmp_path / str(n), *[predictions] * n).read_bytes()) for n in (1, 2))
    assert twice - once < 10 * 1000  # two probabilities a row, about 4 bytes each
