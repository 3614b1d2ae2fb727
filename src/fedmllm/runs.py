"""One experiment from its settings to its summary: what `fedmllm run` does."""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedmllm.backbones import Backbone
from fedmllm.config import Experiment
from fedmllm.costs import peaks, reset_peaks
from fedmllm.engine import Engine as EngineSettings
from fedmllm.evaluate import judge, predict, visible_of
from fedmllm.federate import Engine, Progress, cohorts, federate
from fedmllm.local import Clients, RowStore
from fedmllm.majority import majority_predictions
from fedmllm.record import Record, Sink, finite, write_atomically
from fedmllm.scenarios import assign, digest
from fedmllm.scenarios.partitions import answer_label
from fedmllm.types import Example, FedmllmError, Params, Shard

SUMMARY = "summary.json"
RECORD = "record.jsonl"


@dataclass(frozen=True)
class World:
    """What an experiment is about, loaded once: rows, who holds what, and the frozen model."""

    experiment: Experiment
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    skipped: tuple[str, ...]
    shards: tuple[Shard, ...]
    backbone: Backbone
    start: Params  # the adapter before any training

    @classmethod
    def load(cls, experiment: Experiment) -> World:
        """Read the rows, split and hide them, check that what is shown is there; the model comes last, being dear."""
        data, modalities = experiment.data, experiment.data.modalities()
        for visible in experiment.evaluate.visible:
            visible_of(visible, modalities)
        train, test = data.load("train"), data.load("test")
        limit = experiment.evaluate.limit or None
        shards = assign(train.examples, modalities, experiment.partition, experiment.scenario, experiment.seed)
        backbone = experiment.backbone.load(experiment.seed)
        return cls(
            experiment=experiment,
            train=train.examples,
            test=test.examples[:limit],
            skipped=(*train.skipped, *test.skipped),
            shards=shards,
            backbone=backbone,
            start=backbone.lora(),
        )

    def clients(self, num_rounds: int, shards: Sequence[Shard] | None = None) -> Clients:
        """The clients as local training sees them, for a run of so many rounds."""
        e = self.experiment
        return Clients(
            backbone=self.backbone,
            objective=e.objective,
            train=e.train,
            store=RowStore(self.backbone, e.prompt, self.train),
            shards=shards or self.shards,
            modalities=e.data.modalities(),
            num_rounds=num_rounds,
            seed=e.seed,
            experiment=e,
        )


@dataclass(frozen=True)
class Totals:
    """What a run has cost so far."""

    num_rounds: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    up_lora_bytes: int = 0
    down_lora_bytes: int = 0
    num_tokens: int = 0
    client_s: float = 0.0
    server_s: float = 0.0

    def plus(self, log: dict[str, Any]) -> Totals:
        return Totals(
            num_rounds=self.num_rounds + 1,
            up_bytes=self.up_bytes + log["up_bytes"],
            down_bytes=self.down_bytes + log["down_bytes"],
            up_lora_bytes=self.up_lora_bytes + log["up_lora_bytes"],
            down_lora_bytes=self.down_lora_bytes + log["down_lora_bytes"],
            num_tokens=self.num_tokens + sum(c["num_tokens"] for c in log["clients"]),
            client_s=self.client_s + sum(c["time_s"] for c in log["clients"]),
            server_s=self.server_s + log["server_s"],
        )


def start_engine(settings: EngineSettings, clients: Clients) -> Engine:
    """The engine that the settings name."""
    module, _, factory = settings.entry.partition(":")
    engine: Engine = getattr(importlib.import_module(module), factory)(settings, clients)
    return engine


class Run:
    """A run in progress: its world, its sinks, and the summary rows so far."""

    def __init__(self, world: World, out: Path, sinks: Sequence[Sink]) -> None:
        self.world, self.out, self._sinks = world, out, sinks
        self.experiment, self.backbone = world.experiment, world.backbone
        self.totals, self._began = Totals(), time.perf_counter()

    def emit(self, event: str, **values: Any) -> None:
        for sink in self._sinks:
            sink({"event": event, **values})

    def judge(self, params: Params, **about: Any) -> dict[str, dict[str, float | None]]:
        """Metrics of an adapter for each visibility asked for; recorded as they come."""
        e, found = self.experiment, {}
        self.backbone.set_lora(params)
        for name in e.evaluate.visible:
            began = time.perf_counter()
            shown = visible_of(name, e.data.modalities())
            predictions = predict(self.backbone, e.prompt, self.world.test, shown, e.evaluate)
            metrics = {k: finite(v) for k, v in judge(predictions, e.data.metrics()).items()}
            wall_s = time.perf_counter() - began
            self.emit("eval", visible=name, metrics=metrics, num_rows=len(predictions), wall_s=wall_s, **about)
            found[name] = metrics
        return found

    def federation(self, num_rounds: int, members: Sequence[int], shards: Sequence[Shard] | None = None) -> Params:
        """Federate; `members` fewer than a cohort take part in every round. Emits and evaluates as it goes."""
        e = self.experiment
        clients = self.world.clients(num_rounds, shards)
        begin = Progress(0, self.world.start, e.aggregator.init(self.world.start))
        federated = e.method == "federated"
        draw = cohorts(e.cohort, members, e.cohort_size, e.seed) if federated else lambda _: list(members)
        engine = start_engine(e.engine, clients)
        for progress in federate(begin, engine, e.aggregator, draw, num_rounds, e.screen):
            self.totals = self.totals.plus(progress.log)
            self.emit("round", **progress.log, lr=clients.round_lr(progress.round), num_rounds=num_rounds)
            if e.evaluate.every and progress.round % e.evaluate.every == 0 and progress.round < num_rounds:
                self.judge(progress.params, round=progress.round)
        return progress.params

    def save(self, params: Params, folder: str) -> None:
        self.backbone.set_lora(params)
        self.backbone.save(self.out / folder)

    def rows(self, results: Sequence[dict[str, dict[str, float | None]]]) -> list[dict[str, Any]]:
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


def majority(run: Run) -> list[dict[str, Any]]:
    """No model: the most frequent training answer to each kind of question."""
    e = run.experiment
    predictions = majority_predictions(run.world.train, run.world.test)
    metrics = {k: finite(v) for k, v in judge(predictions, e.data.metrics()).items()}
    run.emit("eval", visible="none", metrics=metrics, num_rows=len(predictions), wall_s=0.0)
    return run.rows([{"none": metrics}])


def zero_shot(run: Run) -> list[dict[str, Any]]:
    """The frozen model as it is."""
    return run.rows([run.judge(run.world.start)])


def federated(run: Run) -> list[dict[str, Any]]:
    """The global adapter after the last round."""
    e = run.experiment
    members = [shard.client for shard in run.world.shards if shard.rows]
    params = run.federation(e.num_rounds, members)
    run.save(params, "adapter")
    return run.rows([run.judge(params, round=e.num_rounds)])


def visits(experiment: Experiment, num_clients: int) -> int:
    """Rounds in which a client of the federation takes part, in expectation: the budget of what is not federated."""
    return max(1, round(experiment.num_rounds * experiment.cohort_size / num_clients))


def local(run: Run) -> list[dict[str, Any]]:
    """Every client alone, for as many rounds as it would have been asked in: mean and spread over the clients."""
    results = []
    for shard in run.world.shards:
        if shard.rows:
            params = run.federation(visits(run.experiment, len(run.world.shards)), [shard.client])
            run.save(params, f"adapters/client-{shard.client}")
            results.append(run.judge(params, client=shard.client))
    return run.rows(results)


def centralised(run: Run) -> list[dict[str, Any]]:
    """All rows in one place, hidden as they are on the clients, seen as often as the federation sees them."""
    shards = run.world.shards
    rows = tuple(row for shard in shards for row in shard.rows)
    visible = tuple(mask for shard in shards for mask in shard.visible)
    params = run.federation(visits(run.experiment, len(shards)), [0], [Shard(0, rows, visible)])
    run.save(params, "adapter")
    return run.rows([run.judge(params)])


METHODS = {
    "majority": majority,
    "zero-shot": zero_shot,
    "federated": federated,
    "local": local,
    "centralised": centralised,
}


def run(experiment: Experiment, out: str | Path | None = None, sinks: Sequence[Sink] = ()) -> list[dict[str, Any]]:
    """Run one experiment; write `record.jsonl`, `summary.json` and `adapter/` into `out` (default runs/RUN_ID).

    Returns the rows of the summary. Raises FedmllmError with a message for a user; whatever stops a run, also Ctrl-C, is
    the record's last line.
    """
    folder = Path(out or Path("runs") / experiment.run_id())
    if (folder / RECORD).exists():
        raise FedmllmError(f"{folder / RECORD} exists; choose another --out, or delete the folder")
    record = Record(folder / RECORD)
    sinks = (record, *sinks)
    reset_peaks()
    try:
        world = World.load(experiment)
        running = Run(world, folder, sinks)
        running.emit("experiment", **heading(world))
        if empty := [shard.client for shard in world.shards if not shard.rows]:
            running.emit("empty_clients", clients=empty, note="these clients hold no row and are never asked")
        rows = METHODS[experiment.method](running)
        write_atomically(folder / SUMMARY, json.dumps({"rows": rows}, indent=1))
        running.emit("end", num_rows=len(rows))
        return rows
    except BaseException as error:
        for sink in sinks:
            sink({"event": "stopped", "reason": f"{type(error).__name__}: {error}"})
        raise
    finally:
        record.close()


def about_client(shard: Shard, examples: Sequence[Example]) -> dict[str, Any]:
    """What a client holds: rows by label, and rows by what they show ("image+text", "none")."""
    labels = Counter(answer_label(examples[row]) for row in shard.rows)
    shows = Counter("+".join(sorted(visible)) or "none" for visible in shard.visible)
    return {"client": shard.client, "labels": dict(sorted(labels.items())), "shows": dict(sorted(shows.items()))}


def heading(world: World) -> dict[str, Any]:
    """Line 1 of a record: all that a reader needs to know what ran, where and on what."""
    e = world.experiment
    return {
        "run_id": e.run_id(),
        "settings": e.model_dump(mode="json"),
        "versions": {name: version(name) for name in ("fedmllm", "torch", "transformers", "peft", "numpy")},
        "device": {
            "name": str(world.backbone.device),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
        "digests": {"partition": digest(world.shards, world.train), "base": world.backbone.digest},
        "num_train": len(world.train),
        "num_test": len(world.test),
        "rows_per_client": [len(shard.rows) for shard in world.shards],
        "clients": [about_client(shard, world.train) for shard in world.shards],
        "num_skipped": len(world.skipped),
        "skipped": list(world.skipped[:20]),
    }
