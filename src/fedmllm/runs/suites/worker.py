"""A process that runs one cell of a suite after another; it talks with `suite_run` over a pipe."""

from __future__ import annotations

import os
import shutil
import threading
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def work(pipe: Connection, num_threads: int) -> None:
    """Receive (settings, folder) until None; answer events as they come, then {"event": "done", "error": text or ""}.

    A cell that was stopped goes on from its last checkpoint. An error of one cell is told and the next cell is taken;
    Ctrl-C and a lost pipe end the process. What libraries write to stderr goes to `worker.log` beside the cells.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # read by torch when it is loaded, below
    from fedmllm.config.experiment import Experiment
    from fedmllm.runs.costs import host_peak_bytes
    from fedmllm.runs.run import run

    def tell(event: dict[str, Any]) -> None:
        pipe.send({**event, "host_bytes": host_peak_bytes()})

    try:
        while (order := pipe.recv()) is not None:
            settings, folder = order[0], Path(order[1])
            keep_stderr(folder.parent / "worker.log")
            error = ""
            try:
                run(Experiment.parse(settings), folder, [tell], resume=True)
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a finished cell needs none
            except (BrokenPipeError, EOFError):
                return
            except Exception as failure:  # whatever breaks one cell must not take the others with it
                error = f"{type(failure).__name__}: {failure}"
            tell({"event": "done", "error": error})
    except (KeyboardInterrupt, BrokenPipeError, EOFError):
        return


def _end_with_parent() -> None:
    """A suite that was killed is started again, and this process must not hold the cell that it was at."""
    if parent := parent_process():
        parent.join()
        os._exit(1)


def keep_stderr(path: Path) -> None:
    """Send this process's stderr to a file: progress bars of libraries would tear the live table."""
    with path.open("a") as file:
        os.dup2(file.fileno(), 2)
