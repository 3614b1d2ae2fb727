"""A run in progress: it federates, judges, checkpoints and keeps the books; or it goes on with all that."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedmllm.backbones.base import Backbone
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.storage import sync
from fedmllm.core.types import Example, Params, Shard, visible_of
from fedmllm.federation.client_state import Controls
from fedmllm.federation.evaluation import judge, predict
from fedmllm.federation.rounds import Progress, cohorts, federate
from fedmllm.runs import checkpoint
from fedmllm.runs.checkpoint import Best, Checkpoint, Checkpoints, RunState
from fedmllm.runs.costs import peaks
from fedmllm.runs.inputs import Inputs, device, start_engine, versions
from fedmllm.runs.record import Record, Sink, finite
from fedmllm.runs.totals import Totals

CHECKPOINTS = "checkpoints"
Scores = dict[str, dict[str, float | None]]  # visibility -> metric -> value


class Session:
    """A run in progress: its world, its sinks, its costs so far, and where it goes on from, if it was stopped."""

    def __init__(self, inputs: Inputs, out: Path, record: Record, sinks: Sequence[Sink], at: Checkpoint | None) -> None:
        self.inputs, self.out, self._record = inputs, out, record
        self._sinks: tuple[Sink, ...] = (record, *sinks)
        self.experiment, self.backbone = inputs.experiment, inputs.backbone
        self.totals = at.run_state.totals if at else Totals()
        self.results: list[Scores] = (
            list(at.run_state.results) if at else []
        )  # of method "local": the clients that are done
        self._began = time.perf_counter() - (at.run_state.wall_s if at else 0.0)
        self._at = at
        self._identity = self.experiment.identity()
        self._checkpoints: Checkpoints | None = None

    def emit(self, event: str, **values: Any) -> None:
        for sink in self._sinks:
            sink({"event": event, **values})

    def judge(self, params: Params, **about: Any) -> Scores:
        """Metrics of an adapter on the test rows for each visibility asked for; recorded as they come."""
        found: Scores = {}
        for name in self.experiment.evaluate.visible:
            began = time.perf_counter()
            found[name] = metrics = self._scores(params, self.inputs.test, name)
            wall_s = time.perf_counter() - began
            self.emit("eval", visible=name, metrics=metrics, num_rows=len(self.inputs.test), wall_s=wall_s, **about)
        return found

    def _scores(self, params: Params, rows: Sequence[Example], visible: str) -> dict[str, float | None]:
        e = self.experiment
        self.backbone.set_lora(params)
        shown = visible_of(visible, e.data.modalities())
        predictions = predict(self.backbone, e.prompt, rows, shown, e.evaluate)
        return {k: finite(v) for k, v in judge(predictions, e.data.metrics()).items()}

    def federation(
        self, num_rounds: int, members: Sequence[int], shards: Sequence[Shard] | None = None, client: int | None = None
    ) -> tuple[Params, int]:
        """Federate, or go on with it -> the last adapter, or the best on validation, and its round. Emits, judges, checkpoints.

        Args:
            num_rounds: In all.
            members: The clients; where the method is not "federated", they all take part in every round.
            shards: The clients' rows, where they are not the world's.
            client: Whose federation of one it is, for method "local".
        """
        e, inputs = self.experiment, self.inputs
        federated = e.method == "federated"
        clients = inputs.clients(num_rounds, shards)
        draw = cohorts(e.cohort, members, e.cohort_size, e.seed) if federated else lambda _: list(members)
        begin = Progress(0, inputs.start, e.server().init(inputs.start))
        selection = Selection(self, client)
        if self._at and self._at.run_state.client == client:
            begin = Progress(self._at.run_state.round, self._at.params, self._at.state)
            selection.restore(self._at)
            self._maybe_evaluate(begin, num_rounds, selection)  # if it had begun before the stop, the record forgot it
            self._at = None
        if control := e.server().broadcast(begin.state):
            refuse_controls_elsewhere(e)
            clients = replace(clients, controls=Controls(self.out / "controls", len(members), control, begin.round))
        engine = start_engine(e.engine, clients)
        if note := getattr(engine, "note", ""):
            self.emit("engine", note=note)
        away = clients.availability
        drops_out = None if away.name == "always" else lambda round_, k: away.share(e.seed, round_, k) == 0
        progress = begin
        for progress in federate(begin, engine, e.server(), draw, num_rounds, e.update_filter, drops_out):
            self.totals = self.totals.plus(progress.log)
            alone = {} if client is None else {"alone": client}
            about = {"lr": clients.round_lr(progress.round), "num_rounds": num_rounds, **alone}
            self.emit("round", **progress.log, **about)
            if clients.controls:
                clients.controls.server = e.server().broadcast(progress.state)
                clients.controls.forget(progress.round, [entry["client"] for entry in progress.log["dropped"]])
                clients.controls.prune(checkpoint.numbers(self.out / CHECKPOINTS))
            judged = e.evaluate.select == "validation" and progress.round % e.evaluate.every == 0
            if judged or progress.round % e.checkpoint.every == 0 or progress.round == num_rounds:
                self._save_checkpoint(progress, selection.best, client)
            self._maybe_evaluate(progress, num_rounds, selection)
        if self._checkpoints:
            self._checkpoints.wait()
        if selection.params is not None and selection.best:
            return selection.params, selection.best.round
        return progress.params, progress.round

    def _maybe_evaluate(self, progress: Progress, num_rounds: int, selection: Selection) -> None:
        """What is judged after this round, apart from the test of the final adapter."""
        e, last = self.experiment.evaluate, progress.round == num_rounds
        if not e.every or (progress.round % e.every and not last):
            return
        if e.select == "validation":
            selection.judge(progress)
        if not last:
            self.judge(progress.params, round=progress.round)

    def _save_checkpoint(self, progress: Progress, best: Best | None, client: int | None) -> None:
        if not self._checkpoints:
            keep, config = self.experiment.checkpoint.keep, adapter_config(self.backbone)
            self._checkpoints = Checkpoints(self.out / CHECKPOINTS, keep, config, self._record.sync)
        run_state = RunState(
            round=progress.round,
            client=client,
            totals=self.totals,
            results=tuple(self.results),
            best=best,
            wall_s=time.perf_counter() - self._began,
            record_bytes=self._record.num_bytes(),
            settings=self._identity,
            digests=self.inputs.digests,
            versions=versions(),
            device=device(self.backbone),
        )
        self._checkpoints.save(run_state, progress.params, progress.state)

    def close(self) -> None:
        """End what runs beside the run; the checkpoint being written is finished first."""
        if self._checkpoints:
            self._checkpoints.close()

    def save(self, params: Params, name: str) -> None:
        """The adapter as a PEFT folder in the run's folder: whole, or not there."""
        self.backbone.set_lora(params)
        final = self.out / name
        partial = final.with_name(f".{final.name}.partial")
        with writing(final):
            shutil.rmtree(partial, ignore_errors=True)
            self.backbone.save(partial)
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            sync(final.parent)

    def rows(self, results: Sequence[Scores]) -> list[dict[str, Any]]:
        """Summary rows: one a metric and visibility; the mean over `results`, with their spread where there are several."""
        e, t = self.experiment, self.totals
        federated = e.method == "federated"
        head = {"scenario": e.scenario.name, "setting": e.setting(), "method": e.method_name(), "prompt": e.prompt.name}
        cost = {
            "num_rounds": t.num_rounds if federated else 0,
            "up_bytes": t.up_bytes if federated else 0,
            "down_bytes": t.down_bytes if federated else 0,
            "up_lora_bytes": t.up_lora_bytes if federated else 0,
            "down_lora_bytes": t.down_lora_bytes if federated else 0,
            "client_s": t.client_s,
            "server_s": t.server_s,
            "num_tokens": t.num_tokens,
            "wall_s": time.perf_counter() - self._began,
            **peaks(),
        }
        rows = []
        for visible, metrics in results[0].items():
            for name in metrics:
                values = [v for result in results if (v := result[visible][name]) is not None]
                spread = {"std": statistics.stdev(values) if len(values) > 1 else None, "n": len(values)}
                value = statistics.fmean(values) if values else None
                about = {"metric": name, "value": value, **spread, "visible": visible}
                rows.append({**head, "seed": e.seed, **about, **cost, "run_id": e.run_id()})
        return rows


class Selection:
    """The best adapter so far on the validation rows, by the set's first metric. The test rows are never looked at."""

    def __init__(self, run: Session, client: int | None) -> None:
        self._run, self._about = run, {} if client is None else {"client": client}
        self.best: Best | None = None
        self.params: Params | None = None

    def restore(self, at: Checkpoint) -> None:
        """The best one when `at` was written, from its own checkpoint."""
        self.best = at.run_state.best
        if self.best:
            folder = at.folder.with_name(f"round-{self.best.number:04d}")
            try:
                self.params = checkpoint.read_params(folder, self._run.inputs.start)
            except FedmllmError as error:
                raise FedmllmError(f"{error}; {at.folder} names it as the best so far. Choose another --out") from None

    def judge(self, progress: Progress) -> None:
        """Judge the adapter of a round; of equals the earlier one stays."""
        run = self._run
        name, visible = run.experiment.data.metrics()[0], run.experiment.evaluate.visible[0]
        value = run._scores(progress.params, run.inputs.validation, visible)[name]
        if value is not None and (self.best is None or value > self.best.value):
            self.best = Best(number=run.totals.num_rounds, round=progress.round, value=value)
            self.params = progress.params
        about = {"round": progress.round, "metric": name, "value": value, "visible": visible, **self._about}
        run.emit("validation", **about, best_round=self.best.round if self.best else None)


def refuse_controls_elsewhere(experiment: Experiment) -> None:
    """Raise ConfigError where clients are trained in processes that the control variates of SCAFFOLD do not reach."""
    if experiment.engine.name not in ("in-process", "stacked"):
        raise ConfigError(
            f"engine.name: got {experiment.engine.name!r}; {experiment.aggregator.name} needs: in-process, stacked"
        )


def adapter_config(backbone: Backbone) -> bytes:
    """`adapter_config.json` as the backbone writes it beside its adapter."""
    with tempfile.TemporaryDirectory() as folder:
        backbone.save(Path(folder))
        return (Path(folder) / checkpoint.CONFIG).read_bytes()


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """What the disk refuses, as an error that names the place."""
    try:
        yield
    except OSError as error:
        raise FedmllmError(f"{place}: cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise FedmllmError(f"{place}: cannot be written: {error}") from error
