"""Output of `fedmllm run`: the note of the bar, the heading, the table."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from fedmllm.cli.display import Bars, show_table
from fedmllm.config.experiment import Experiment
from fedmllm.runs.events import Evaluated, Event
from fedmllm.runs.run import run
from support.runs import experiment


def test_the_bar_keeps_the_metric_of_the_main_test_rows(tmp_path: Path) -> None:
    bars, notes = Bars(), []
    bars._progress.live.console = Console(file=io.StringIO())

    def draw(event: Event) -> None:
        bars(event)
        if isinstance(event, Evaluated):
            notes.append((event.visible, bars._progress.tasks[0].fields["note"], next(iter(event.metrics.values()))))

    run(experiment(num_rounds=1, evaluate={"visible": ["all", "text", "image"]}), tmp_path / "run", [draw])
    main = next(value for visible, _, value in notes if visible == "all")
    assert [visible for visible, _, _ in notes][-3:] == ["all", "text", "image"]
    assert {note.split()[1] for _, note, _ in notes[-3:]} == {f"{main:.3f}"}


def test_a_cross_run_leaves_out_the_number_that_has_no_effect() -> None:
    def setting(**scenario: object) -> str:
        table = {"data": "synthetic-irony", "partition": {"name": "iid", "num_clients": 4}}
        return Experiment.parse({**table, "scenario": {"name": "cross", **scenario}}).setting()

    assert setting(clients={"image": 3, "text": 1}) == "clients={'image': 3, 'text': 1}"
    assert setting(num_image_clients=2) == "num_image_clients=2"


def test_a_long_name_is_folded_and_the_value_stays(capsys) -> None:
    row = {"scenario": "missing", "setting": "rate=0.5", "method": "fedavg+" + "imagine(kind=cvae,rounds=1)" * 3}
    row |= {"prompt": "plain", "visible": "all", "metric": "auc", "value": 0.875, "std": None, "num_rounds": 20}
    show_table([{**row, "up_bytes": 10**6, "down_bytes": 10**6, "wall_s": 5.0, "run_id": "0" * 12, "seed": 0}])
    printed = capsys.readouterr().out
    assert "0.875" in printed
    assert "2.0 MB" in printed
    assert max(map(len, printed.splitlines())) <= 80
