"""Run the cells of a suite over several processes."""

from __future__ import annotations

import fcntl
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import make_folder, writing
from fedmllm.runs.events import Ended, Evaluated, Event, RoundEnd
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.suites.devices import CellMemory, Device
from fedmllm.runs.suites.suite import Cell, Suite
from fedmllm.runs.suites.worker import Message, Order, work

MAX_INITIAL_FAILURES = 5  # cells that fail before any succeeds


@dataclass
class Job:
    """A worker process, and the cell that it is at."""

    process: BaseProcess
    pipe: Connection
    device: Device | None = None  # None = each cell's own
    cell: Cell | None = None
    shares: int = 0  # of the device, for this cell
    began: float = 0.0
    host_bytes: int = 0  # peak of its process in this cell
    event: Event | None = None  # the latest
    has_computed: bool = False  # a round or an evaluation, so that its memory is known


@dataclass
class CellState:
    """Progress of a suite: its cells and their times."""

    waiting: list[Cell]
    finished: int = 0  # cells with a summary, kept ones included
    kept: int = 0  # of those, finished before this start
    failed: dict[str, str] = field(default_factory=dict)  # label -> reason
    jobs: list[Job] = field(default_factory=list)
    memory: CellMemory = field(default_factory=CellMemory)  # on devices
    seconds: dict[str, list[float]] = field(default_factory=dict)  # method -> of each finished cell
    began: float = field(default_factory=time.perf_counter)
    note: str = ""

    def left_s(self) -> float | None:
        """Expected seconds to the end, from cells of the same method where there are any; None = not known yet."""
        known = [s for values in self.seconds.values() for s in values]
        if not known:
            return None
        mean = sum(known) / len(known)

        def expected(cell: Cell) -> float:
            own = self.seconds.get(cell.experiment.method_name())
            return sum(own) / len(own) if own else mean

        now = time.perf_counter()
        session = [max(0.0, expected(job.cell) - (now - job.began)) for job in self.jobs if job.cell]
        return (sum(session) + sum(map(expected, self.waiting))) / max(1, len(self.jobs))


class Display(Protocol):
    """Display of a suite's state."""

    def update(self, state: CellState) -> None: ...

    def finished(self, cell: Cell, seconds: float, error: str) -> None: ...


def run_suite(
    suite: Suite,
    folder: Path,
    num_jobs: int,
    num_threads: int,
    budget_bytes: int,
    display: Display,
    cells: Sequence[Cell] | None = None,
    track: Sequence[str] = (),
    devices: Sequence[Device] = (),
) -> CellState:
    """Run every cell that has no summary yet into `folder/RUN_ID`; at most `num_jobs` at a time.

    A further process is started only while all of them, each as large as the largest seen, fit into `budget_bytes`. On
    devices, a process takes the first waiting cell whose estimated memory fits next to the cells that run there. A
    cell that fails, or whose process dies, is named in `State.failed`; the others continue, unless the first five all fail.

    Args:
        suite: The cells.
        folder: Folder of the cells; made if it is missing.
        num_jobs: Processes at a time.
        num_threads: Threads of torch per process.
        budget_bytes: Memory of all processes together.
        display: Progress for a person.
        cells: Cells to run; default: all of the suite.
        track: Names of trackers, one of each per cell.
        devices: Over which the processes are spread; () = each cell runs on its own `backbone.device`.

    Returns:
        Counts, failures by label and seconds per method.
    """
    with writing(folder):
        make_folder(folder)
    with suite_lock(folder):
        suite.save(folder)
        cells = suite.cells if cells is None else cells
        waiting = [cell for cell in cells if not RunFolder(folder / cell.run_id).is_finished]
        done = len(cells) - len(waiting)
        state = CellState(waiting, finished=done, kept=done)
        try:
            while state.waiting or any(job.cell for job in state.jobs):
                start_workers(state, num_jobs, num_threads, budget_bytes, track, devices)
                for job in state.jobs:
                    cell = next_cell(state, job) if job.cell is None else None
                    if cell and assign_cell(job, cell, folder):
                        state.waiting.remove(cell)
                poll(state, display)
                display.update(state)
                if len(state.failed) >= MAX_INITIAL_FAILURES and state.finished == state.kept:
                    break  # what is wrong with every cell so far is wrong with the rest
        finally:
            shutdown(state.jobs)
    return state


@contextmanager
def suite_lock(folder: Path) -> Iterator[None]:
    """Two suites in one folder would delete each other's cells."""
    with writing(folder / ".lock"):
        file = (folder / ".lock").open("w")
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FedmllmError(f"{folder}: another suite is running here; choose another --out") from None
        yield


def start_workers(
    state: CellState,
    num_jobs: int,
    num_threads: int,
    budget_bytes: int,
    track: Sequence[str] = (),
    devices: Sequence[Device] = (),
) -> None:
    """Start processes while cells wait, jobs are free and memory allows, each on the device that has the fewest."""
    while len(state.jobs) < min(num_jobs, len(state.jobs) + len(state.waiting)):
        largest = max((job.host_bytes for job in state.jobs), default=0)
        if state.jobs and not any(job.has_computed for job in state.jobs):
            return  # the memory that a cell needs is not known yet
        if state.jobs and largest * (len(state.jobs) + 1) > budget_bytes:
            state.note = f"memory budget of {budget_bytes / 1e9:.1f} GB: {len(state.jobs)} of {num_jobs} jobs"
            return
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        taken = [job.device for job in state.jobs]
        device = min(devices, key=taken.count, default=None)
        variables = device.environment() if device else {}
        process = context.Process(target=work, args=(theirs, num_threads, tuple(track), variables), daemon=True)
        process.start()
        theirs.close()
        state.jobs.append(Job(process, ours, device))
        if len(state.jobs) == 1:
            return  # the first one shows what a cell needs


def next_cell(state: CellState, job: Job) -> Cell | None:
    """Choose a cell for an idle process: the first that waits, on a device the first that fits; set the job's shares."""
    device = job.device
    if device is None:
        return next(iter(state.waiting), None)
    free = device.num_shares - sum(other.shares for other in state.jobs if other.device is device and other.cell)
    is_limited = 0 < device.num_bytes < math.inf
    for cell in state.waiting:
        job.shares = device.shares(state.memory.needed_bytes(cell.experiment) if is_limited else 0.0)
        if job.shares <= free:
            return cell
    return None


def assign_cell(job: Job, cell: Cell, folder: Path) -> bool:
    """Hand a cell to a process; False where it died between two cells, which `poll` will see."""
    order = Order(cell.experiment.dump(), str(folder / cell.run_id))
    if job.device:
        order = replace(order, device=job.device.kind, device_bytes=job.device.limit_bytes(job.shares))
    try:
        job.pipe.send(order)
    except OSError:
        return False
    job.cell, job.began, job.event = cell, time.perf_counter(), None
    return True


def poll(state: CellState, display: Display, timeout_s: float = 0.5) -> None:
    """Collect the messages of the workers."""
    by_pipe = {job.pipe: job for job in state.jobs}
    for pipe in wait(list(by_pipe), timeout_s):
        job = by_pipe[pipe]  # type: ignore[index]
        try:
            message: Message = job.pipe.recv()
        except (EOFError, OSError):
            job.process.join()
            error = f"its process died (exit code {job.process.exitcode}); out of memory?"
            message = Message(job.host_bytes, error=error)
            state.jobs.remove(job)
        job.host_bytes, job.event = message.host_bytes, message.event
        if job.device and message.free_bytes:
            job.device.num_bytes = max(job.device.num_bytes, message.free_bytes)
        job.has_computed |= message.error is not None or isinstance(message.event, RoundEnd | Evaluated | Ended)
        if message.error is not None and job.cell:
            close_cell(state, job, job.cell, message.error, display)
            job.cell = None


def close_cell(state: CellState, job: Job, cell: Cell, error: str, display: Display) -> None:
    """Count a cell that has come to its end."""
    seconds = time.perf_counter() - job.began
    if error:
        state.failed[cell.label] = error
    else:
        state.finished += 1
        state.seconds.setdefault(cell.experiment.method_name(), []).append(seconds)
    display.finished(cell, seconds, error)


def shutdown(jobs: Sequence[Job]) -> None:
    """Shut down all workers; a cell that one is at can be resumed."""
    for job in jobs:
        try:
            job.pipe.send(None)
        except OSError:
            continue
    for job in jobs:
        if job.cell:
            job.process.terminate()
        job.process.join(timeout=10)
        if job.process.is_alive():
            job.process.kill()
