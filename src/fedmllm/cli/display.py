"""Progress bars and the summary table of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fedmllm.core.text import bytes_text
from fedmllm.reports.numerals import COUNTS
from fedmllm.reports.sent import sent_bytes
from fedmllm.runs.events import Evaluated, Event, Learned, RoundEnd, Started
from fedmllm.runs.record import read


class Bars:
    """A sink that draws one bar for the rounds of a run, with the last loss, or metric on the main test rows."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, *times)
        self._task = self._progress.add_task("loading", total=None, note="")
        self._visible = ""  # modalities of the main test rows, once the run has started

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        show = self._progress.update
        if isinstance(event, Started):
            for note in event.notes:
                self._progress.console.print(f"note: {note}", markup=False, highlight=False)
            self._visible = next(iter(event.settings.get("evaluate", {}).get("visible", ())), "")
            show(self._task, description="first round")
        elif isinstance(event, RoundEnd):
            losses = [c["loss"] for c in event.clients if "loss" in c]
            note = f"loss {sum(losses) / len(losses):.3f}" if losses else "" if event.clients else "no update"
            show(self._task, description=event.whose, completed=event.round, total=event.num_rounds, note=note)
        elif isinstance(event, Evaluated) and event.visible == self._visible:
            name, value = next(iter(event.metrics.items()))
            show(self._task, note="" if value is None else f"{name} {value:.3f}")


def learned_text(record: Path) -> str:
    """One or more lines on whether a run's result is better than its baselines; "" if the record does not have it."""
    events = list(read(record))
    lines = [line for line in events if line["event"] == "learned"]
    event = Learned.from_json(lines[-1]) if lines else None
    if not isinstance(event, Learned):
        return ""
    settings: dict[str, Any] = next((one["settings"] for one in events if one["event"] == "experiment"), {})
    start = "the start adapter" if settings.get("backbone", {}).get("adapter") else "the model before training"
    names = {"start": start, "majority": "the most frequent answer"}
    parts = []
    for b in event.baselines:
        interval = "" if b["low"] is None else f", 95 % interval {b['low']:+.3f} to {b['high']:+.3f}"
        parts.append(f"{names[b['name']]} {b['value']:.3f} (difference {b['difference']:+.3f}{interval})")
    text = f"{event.metric} {event.value:.3f} on {event.num_rows} test rows; {'; '.join(parts)}"
    if not event.nothing:
        return text if event.beaten else f"{text}. Too few test rows to say whether it learned"
    missed = [names[b["name"]] for b in event.baselines if b["name"] not in event.beaten]
    advice = "".join(f"\n  - {line}" for line in event.advice)
    return f"{text}\nNothing learned that these rows can show: not better than {' and '.join(missed)}. Likely reasons:{advice}"


def show_table(rows: Sequence[dict[str, Any]], headline_only: bool = False) -> None:
    """The summary rows as a table; `headline_only` keeps the first metric of each run.

    What all rows share stands once, above the table, so that it fits a terminal of 80 columns. A further metric that no row
    defines is left out, as is a count of rows that is 0 everywhere: closed questions have no token F1 and nothing to parse.
    """
    rows = _with_values(rows)
    seen: set[tuple[str, str, int]] = set()
    kept = []
    for row in rows:
        run = (row["run_id"], row["visible"], row["seed"])
        if not (headline_only and run in seen):
            kept.append(_cells(row))
        seen.add(run)
    shared = {k: v for k, v in kept[0].items() if len(kept) > 1 and all(cells[k] == v for cells in kept)}
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in kept[0]:
        if column not in shared:
            numeric = column in ("value", "rounds", "sent", "time")
            table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    before = ""
    for cells in kept:
        if before not in ("", cells["scenario"]):
            table.add_section()
        visible = {**cells, "scenario": "" if cells["scenario"] == before else cells["scenario"]}
        before = cells["scenario"]
        table.add_row(*(v for k, v in visible.items() if k not in shared))
    if shared:
        print("; ".join(f"{k}: {', '.join(v.splitlines())}" for k, v in shared.items()))
    Console().print(table)


def _with_values(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    says = {row["metric"] for row in rows if row["value"] or (row["value"] is not None and row["metric"] not in COUNTS)}
    headlines = {row["run_id"]: row["metric"] for row in reversed(rows)}  # the first row of each run
    return [row for row in rows if row["metric"] in says or row["metric"] == headlines[row["run_id"]]]


def _cells(row: dict[str, Any]) -> dict[str, str]:
    value = "-" if row["value"] is None else f"{row['value']:.3f}"
    return {
        "scenario": f"{row['scenario']}\n{row['setting']}",
        "method": row["method"],
        "prompt": row["prompt"],
        "test shows": row["visible"],
        "metric": row["metric"],
        "value": value if row["std"] is None else f"{value} ± {row['std']:.3f}",
        "rounds": str(row["num_rounds"]),
        "sent": bytes_text(sent_bytes(row)),
        "time": f"{row['wall_s']:.0f} s",
    }
