"""Names of sites instead of numbers: in events, progress bars, `rounds.csv`, trackers, and for `predict --client`."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from fedmllm.cli.display import Bars
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.reports.write import write_report
from fedmllm.runs.events import EmptyClients, Event, RoundEnd, with_site_names
from fedmllm.runs.predict import predict
from fedmllm.runs.result import RunResult, load_run
from fedmllm.runs.run import run
from fedmllm.runs.trackers import Tracker
from support.runs import events

SITES = ("north", "south")


def table(folder: Path, **changed: object) -> Experiment:
    columns = {"id": "case", "text": "note", "answer": "ill", "client": "site"}
    data = {"name": "table", "root": str(folder), "train": "rows.csv", "test": "rows.csv", "columns": columns}
    data |= {"question": "Is it ill?", "choices": ["no", "yes"]}
    train = {"lr": 1e-3, "max_steps": 1}
    return Experiment.parse({"data": data, "train": train, "num_rounds": 1, **changed})


class Kept(Tracker):
    """A tracker that keeps the keys of what it logs."""

    needs = extra = "json"

    def begin(self, run_id: str, settings: object) -> None:
        self.keys: list[str] = []

    def log(self, round_: int, values: object) -> None:
        self.keys += list(values)  # type: ignore[call-overload]

    def finish(self, failed: bool) -> None:
        pass


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, str, list[str]]:
    """(a run of each site alone, what its progress bar printed, keys that a tracker logged)."""
    folder = tmp_path_factory.mktemp("sites")
    lines = [f"{i},{'fever' if i % 2 else 'well'},{'yes' if i % 2 else 'no'},{SITES[i // 4]}" for i in range(8)]
    (folder / "rows.csv").write_text("\n".join(["case,note,ill,site", *lines]) + "\n")
    bars, kept = Bars(), Kept(folder)
    printed = io.StringIO()
    bars._progress.live.console = Console(file=printed, force_terminal=True, width=200)

    def draw(event: Event) -> None:
        bars(event)
        bars._progress.refresh()

    with bars:
        result = run(table(folder, method="local"), folder / "run", [draw, kept])
    return result, printed.getvalue(), kept.keys


def test_events_and_the_history_name_the_sites(local: tuple[RunResult, str, list[str]]) -> None:
    result = local[0]
    rounds, evals = events(result.folder, "round"), events(result.folder, "eval")
    assert [event["name"] for event in rounds] == [event["name"] for event in evals] == list(SITES)
    assert [(c["client"], c["name"]) for event in rounds for c in event["clients"]] == list(enumerate(SITES))
    history = load_run(result.folder).history
    assert [row["name"] for row in (*history.rounds, *history.clients)] == [*SITES, *SITES]


def test_bar_and_trackers_name_the_sites(local: tuple[RunResult, str, list[str]]) -> None:
    assert "north alone" in local[1]
    assert "south alone" in local[1]
    assert {key.split("/")[0] for key in local[2]} == {"client-0-north", "client-1-south"}


def test_rounds_as_csv_name_the_sites(local: tuple[RunResult, str, list[str]], tmp_path: Path) -> None:
    write_report([local[0].folder], tmp_path / "x.csv")
    rows = list(csv.DictReader((tmp_path / "x-rounds.csv").open()))
    assert [(row["client"], row["name"], row["sites"]) for row in rows] == [
        ("0", "north", "north"),
        ("1", "south", "south"),
    ]


def test_an_adapter_is_chosen_by_its_site(local: tuple[RunResult, str, list[str]]) -> None:
    folder = local[0].folder
    rows = folder.parent / "rows.csv"
    assert predict(folder, rows, client="south") == predict(folder, rows, client=1) != predict(folder, rows, client=0)
    with pytest.raises(FedmllmError, match="--client is one of: north, south"):
        predict(folder, rows, client="west")


def test_pooled_rows_are_of_no_site_and_numbers_stay_without_names(
    local: tuple[RunResult, str, list[str]], tmp_path: Path
) -> None:
    run(table(local[0].folder.parent, method="centralised"), tmp_path / "run")
    assert "name" not in events(tmp_path / "run", "round")[0]["clients"][0]
    seen: list[Event] = []
    event = EmptyClients([1], "no rows")
    with_site_names(seen.append, {})(event)
    with_site_names(seen.append, dict(enumerate(SITES)))(event)
    assert seen == [event, EmptyClients([1], "no rows", ["south"])]


def test_a_secure_sum_names_all_its_sites() -> None:
    seen: list[Event] = []
    entry = {"client": 0, "clients": [0, 1]}
    dropped = [{"client": 2, "reason": "no response"}]
    counts = {"up_bytes": 0, "up_lora_bytes": 0, "down_bytes": 0, "down_lora_bytes": 0}
    event = RoundEnd(1, [0, 1, 2], [entry], dropped, **counts, server_s=0.0, wall_s=0.0, lr=1.0, num_rounds=1)
    with_site_names(seen.append, dict(enumerate((*SITES, "west"))))(event)
    (named,) = seen
    assert isinstance(named, RoundEnd)
    assert named.clients == [{**entry, "name": "north + south"}]
    assert named.dropped == [{**dropped[0], "name": "west"}]
    assert named.whose == "rounds"
