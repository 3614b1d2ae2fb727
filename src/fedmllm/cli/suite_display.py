"""Progress of a suite: a live table, or plain lines."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedmllm.runs.events import Evaluated, Event, RoundEnd
from fedmllm.runs.suites.scheduler import CellState
from fedmllm.runs.suites.suite import Cell


def clock(seconds: float | None) -> str:
    """73 -> "1:13", 4000 -> "1:06:40"; "?" where it is not known."""
    if seconds is None:
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def progress_of(event: Event | None) -> tuple[str, str]:
    """Return (position, latest number) of a cell by its latest event."""
    if isinstance(event, RoundEnd):
        losses = [client["loss"] for client in event.clients]
        return f"{event.round}/{event.num_rounds}", f"loss {sum(losses) / len(losses):.3f}" if losses else ""
    if isinstance(event, Evaluated):
        name, value = next(iter(event.metrics.items()))
        return "evaluated", "" if value is None else f"{name} {value:.3f}"
    return ("started", "") if event else ("loading", "")


class SuiteTable:
    """One row a process; above them how many cells are done and when the last will be."""

    def __init__(self, num_cells: int, console: Console | None = None) -> None:
        self.num_cells = num_cells
        self.console = console or Console()
        self._live = Live(console=self.console, refresh_per_second=4, transient=True)
        self._shown = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    def update(self, state: CellState) -> None:
        if self.console.is_terminal and time.perf_counter() - self._shown > 0.2:
            self._live.update(self.table(state))
            self._shown = time.perf_counter()

    def finished(self, cell: Cell, seconds: float, error: str) -> None:
        if error:
            self.console.print(Text(f"failed: {cell.label}: {error}", style="red"))
        elif not self.console.is_terminal:
            self.console.print(f"{cell.run_id} {clock(seconds)} {cell.label}", highlight=False)

    def table(self, state: CellState) -> Group:
        now = time.perf_counter()
        head = (
            f"{state.finished} of {self.num_cells} cells"
            + (f" ({state.kept} kept)" if state.kept else "")
            + (f", {len(state.failed)} failed" if state.failed else "")
            + f" · {clock(now - state.began)} gone · {clock(state.left_s())} to go"
        )
        table = Table("cell", "round", "last seen", "time", "memory", box=None, pad_edge=False)
        for job in state.jobs:
            if job.cell:
                where, seen = progress_of(job.event)
                memory = f"{job.host_bytes / 1e9:.1f} GB" if job.host_bytes else ""
                place = f"{memory} {job.device.name}".strip() if job.device else memory
                table.add_row(job.cell.label, where, seen, clock(now - job.began), place)
        bar = ProgressBar(total=self.num_cells, completed=state.finished, width=60)
        return Group(Text(head, style="bold"), bar, table, Text(state.note, style="yellow"))
