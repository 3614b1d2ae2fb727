"""Process that runs one cell of a suite after another."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmllm.runs.events import Event
from fedmllm.runs.folder import RunFolder

if TYPE_CHECKING:
    from fedmllm.config.experiment import Experiment


@dataclass(frozen=True)
class Message:
    """Message of a worker process."""

    host_bytes: int  # peak of the process in this cell
    event: Event | None = None
    error: str | None = None  # set when the cell is done; "" = without an error
    free_bytes: int = 0  # on its CUDA device, before the first cell


@dataclass(frozen=True)
class Order:
    """A cell for a worker process."""

    settings: Mapping[str, Any]
    folder: str
    device: str = ""  # replaces `backbone.device`; "" = as the cell has it
    device_bytes: float = 0.0  # limit on its CUDA device; 0 = none


def work(
    pipe: Connection, num_threads: int, track: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> None:
    """Run the cells that come as an `Order` through a pipe until None comes; send a `Message` per event.

    A stopped cell continues from its last checkpoint. The error of a cell is sent, and the next cell runs; Ctrl-C and a
    lost pipe end the process. The output of libraries goes to `worker.log` in the suite's folder. Each cell has its own
    trackers, of the names in `track`. `variables` go into the environment before torch is loaded.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # read by torch when it is loaded, below
    os.environ.update(variables or {})
    from fedmllm.config.experiment import Experiment
    from fedmllm.runs.costs import host_peak_bytes
    from fedmllm.runs.run import run
    from fedmllm.runs.trackers import tracker

    def send(event: Event) -> None:
        pipe.send(Message(host_peak_bytes(), event))

    try:
        while (order := pipe.recv()) is not None:
            folder = RunFolder(Path(order.folder))
            keep_output(folder.path.parent / "worker.log")
            error = ""
            try:
                trackers = [tracker(name, folder.path) for name in track]
                if order.device == "cuda":
                    pipe.send(Message(host_peak_bytes(), free_bytes=limit_device(order.device_bytes)))
                run(placed(Experiment.parse(order.settings), order.device), folder.path, [send, *trackers], resume=True)
                shutil.rmtree(folder.checkpoints, ignore_errors=True)  # a finished cell needs none
            except (BrokenPipeError, EOFError):
                return
            except Exception as failure:  # whatever breaks one cell must not take the others with it
                error = f"{type(failure).__name__}: {failure}"
            pipe.send(Message(host_peak_bytes(), error=error))
    except (KeyboardInterrupt, BrokenPipeError, EOFError):
        return


def placed(experiment: Experiment, device: str) -> Experiment:
    """Return the experiment on a device, if its model has one to choose; "" = its own."""
    if not device or not hasattr(experiment.backbone, "device"):
        return experiment
    backbone = experiment.backbone.model_copy(update={"device": device})
    return experiment.model_copy(update={"backbone": backbone})


def limit_device(num_bytes: float) -> int:
    """Limit the memory of this process on its CUDA device.

    Args:
        num_bytes: At most; 0 = all of the device.

    Returns:
        Free bytes of the device, of this and other programs.
    """
    import torch

    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total) if num_bytes else 1.0)
    return int(free)


def _end_with_parent() -> None:
    """A suite that was killed is started again, and this process must not hold the cell that it was at."""
    if parent := parent_process():
        parent.join()
        os._exit(1)


def keep_output(path: Path) -> None:
    """Send this process's stdout and stderr to a file: lines of libraries and trackers would tear the live table."""
    with path.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
