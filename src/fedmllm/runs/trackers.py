"""Trackers as sinks: TensorBoard, Weights & Biases, MLflow, Trackio.

Each needs its own package (`pip install 'fedmllm[tensorboard]'`), works without a network, and receives the same numbers under
the same names: "both/auc", "round/loss", "cost/up_bytes", by round. The record remains the reference.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmllm.core.errors import ConfigError
from fedmllm.core.spec import nearest
from fedmllm.core.storage import write_atomically
from fedmllm.core.text import flat_keys
from fedmllm.runs.events import Ended, Evaluated, Event, Resumed, RoundEnd, Started, Stopped


class Tracker(ABC):
    """Events -> `begin`, `log`, `finish` of a tracking library."""

    needs: str  # module
    extra: str  # of this package
    folder: Path

    def __init__(self, folder: Path) -> None:
        """`folder` is the run's; a tracker's files go below it. Raises ConfigError where it is not installed."""
        self.folder = folder
        try:
            self.library: Any = importlib.import_module(self.needs)
        except ImportError:
            raise _missing(self.extra) from None
        self._sent = 0
        self._round = 0

    def __call__(self, event: Event) -> None:
        """Pass an event's numbers to the library."""
        client, name = getattr(event, "client", None), re.sub(r"[^\w. -]", "_", getattr(event, "name", ""))
        prefix = "" if client is None else f"client-{client}{name and f'-{name}'}/"
        if isinstance(event, Started):
            self.begin(event.run_id, flat_keys(event.settings))
        elif isinstance(event, Resumed):
            self._round, self._sent = event.round, event.sent_bytes
            self.resume(event.round)
        elif isinstance(event, RoundEnd):
            self._round = event.round
            self._sent += event.up_bytes + event.down_bytes
            values = {**of_round(event), "cost/sent_bytes": float(self._sent)}
            self.log(event.round, {f"{prefix}{key}": value for key, value in values.items()})
        elif isinstance(event, Evaluated) and not event.node:
            values = {f"{prefix}{event.visible}/{k}": v for k, v in event.metrics.items() if v is not None}
            self.log(self._round if event.round is None else event.round, values)
        elif isinstance(event, Ended | Stopped):
            self.finish(failed=isinstance(event, Stopped))

    def same_run(self, new: str = "", replace: bool = False) -> str:
        """Return the library's id of this run, kept in the run's folder so that a resumed run continues it.

        Args:
            new: Kept and returned if there is none so far, or if `replace` is set; "" = none.
        """
        path = self.folder / f".{self.extra}-run"
        if path.exists() and not replace:
            return path.read_text(encoding="utf-8").strip()
        if new:
            write_atomically(path, new)
        return new

    @abstractmethod
    def begin(self, run_id: str, settings: Mapping[str, Any]) -> None:
        """A run with flat settings starts."""

    def resume(self, round_: int) -> None:  # noqa: B027 - a library that keeps nothing by round needs nothing
        """The run that began before continues after a round: what was logged of later rounds is logged again."""

    @abstractmethod
    def log(self, round_: int, values: Mapping[str, float]) -> None:
        """Numbers of a round."""

    @abstractmethod
    def finish(self, failed: bool) -> None:
        """The run has ended; nothing follows."""


def of_round(event: RoundEnd) -> dict[str, float]:
    """Return a round's numbers: means over its clients, and its costs."""
    values = {f"cost/{key}": float(getattr(event, key)) for key in ("up_bytes", "down_bytes", "server_s", "wall_s")}
    values["round/lr"] = float(event.lr)
    values["round/num_dropped"] = float(len(event.dropped))
    if event.clients:
        for key in ("loss", "norm"):
            values[f"round/{key}"] = sum(float(c[key]) for c in event.clients) / len(event.clients)
    return values


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard; `tensorboard --logdir RUN` shows them."""

    needs, extra = "tensorboard.compat.proto.event_pb2", "tensorboard"

    def begin(self, run_id: str, settings: Mapping[str, Any]) -> None:
        self._open()
        lines = "\n".join(f"    {key} = {value}" for key, value in settings.items())
        self._writer.add_text("settings", f"    run_id = {run_id}\n{lines}")

    def resume(self, round_: int) -> None:
        self._writer.close()
        self._open(purge_step=round_ + 1)

    def _open(self, purge_step: int | None = None) -> None:
        module: Any = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge_step)

    def log(self, round_: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, round_)

    def finish(self, failed: bool) -> None:
        self._writer.close()


class WandB(Tracker):
    """Weights & Biases; project "fedmllm" or WANDB_PROJECT. Offline unless WANDB_MODE says otherwise; `wandb sync` sends it."""

    needs, extra = "wandb", "wandb"

    def begin(self, run_id: str, settings: Mapping[str, Any]) -> None:
        self._run = self.library.init(
            project=os.environ.get("WANDB_PROJECT", "fedmllm"),
            mode=os.environ.get("WANDB_MODE", "offline"),
            name=run_id,
            id=self.same_run(uuid.uuid4().hex),
            resume="allow",
            config=dict(settings),
            dir=str(self.folder),
        )
        self._run.define_metric("*", step_metric="round")

    def log(self, round_: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "round": round_})

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow(Tracker):
    """MLflow; an SQLite file in RUN/mlflow.db unless MLFLOW_TRACKING_URI names a server."""

    needs, extra = "mlflow", "mlflow"
    _sets_uri = False

    def begin(self, run_id: str, settings: Mapping[str, Any]) -> None:
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self.library.set_tracking_uri(f"sqlite:///{self.folder.resolve() / 'mlflow.db'}")
            self._sets_uri = True
        self.library.set_experiment("fedmllm")
        known = self.same_run()
        if known and self._is_there(known):
            self.library.start_run(run_id=known)
        else:
            self.same_run(self.library.start_run(run_name=run_id).info.run_id, replace=True)
        self.library.log_params({key: str(value)[:500] for key, value in settings.items()})

    def log(self, round_: int, values: Mapping[str, float]) -> None:
        self.library.log_metrics(dict(values), step=round_)

    def _is_there(self, run: str) -> bool:
        try:
            self.library.get_run(run)
        except self.library.exceptions.MlflowException:  # it was deleted, or lies on another server
            return False
        return True

    def finish(self, failed: bool) -> None:
        self.library.end_run(status="FAILED" if failed else "FINISHED")
        if self._sets_uri:  # the library keeps it in the environment, and the process may run another experiment
            os.environ.pop("MLFLOW_TRACKING_URI", None)


class Trackio(Tracker):
    """Trackio: local files under TRACKIO_DIR (default: its own cache); `trackio show` opens them."""

    needs, extra = "trackio", "trackio"

    def begin(self, run_id: str, settings: Mapping[str, Any]) -> None:
        project = os.environ.get("TRACKIO_PROJECT", "fedmllm")
        self.library.init(project=project, name=run_id, config=dict(settings), resume="allow")

    def log(self, round_: int, values: Mapping[str, float]) -> None:
        self.library.log(dict(values), step=round_)

    def finish(self, failed: bool) -> None:
        self.library.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def tracker(name: str, folder: Path) -> Tracker:
    """The tracker of that name for a run in `folder`. Raises ConfigError for an unknown or missing one."""
    check_trackers([name])
    return TRACKERS[name](folder)


def check_trackers(names: Sequence[str]) -> None:
    """Check that each tracker exists and that its package is installed, without loading it.

    Raises:
        ConfigError: A name is unknown, or a package is missing.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--track: got {name!r}; allowed: {', '.join(TRACKERS)}{nearest(name, list(TRACKERS))}")
        if importlib.util.find_spec(TRACKERS[name].needs.split(".")[0]) is None:
            raise _missing(name)


def _missing(extra: str) -> ConfigError:
    return ConfigError(f"tracker {extra}: not installed; pip install 'fedmllm[{extra}]'")
