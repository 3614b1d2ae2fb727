"""A process that runs one cell of a suite after another; it talks with `suite_run` over a pipe."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def work(pipe: Connection, num_threads: int) -> None:
    """Receive (settings, folder) until None; answer events as they come, then {"event": "done", "error": text or ""}.

    An error of one cell is told and the next cell is taken; Ctrl-C and a lost pipe end the process.
    """
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # read by torch when it is loaded, below
    from fedmllm.config import Experiment
    from fedmllm.costs import host_peak_bytes
    from fedmllm.runs import run

    def tell(event: dict[str, Any]) -> None:
        pipe.send({**event, "host_bytes": host_peak_bytes()})

    try:
        while (order := pipe.recv()) is not None:
            settings, folder = order
            error = ""
            try:
                run(Experiment.parse(settings), Path(folder), [tell])
            except (BrokenPipeError, EOFError):
                return
            except Exception as failure:  # whatever breaks one cell must not take the others with it
                error = f"{type(failure).__name__}: {failure}"
            tell({"event": "done", "error": error})
    except (KeyboardInterrupt, BrokenPipeError, EOFError):
        return
