"""A run in progress: its events, its costs, and its federations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.objectives import FedProx, TaskLoss
from fedmllm.algorithms.privacy.client_dp import ClientDp
from fedmllm.algorithms.privacy.guarantee import Guarantee
from fedmllm.algorithms.privacy.row_dp import RowDp
from fedmllm.algorithms.relations import Related
from fedmllm.algorithms.server_optimizers import FedAvg
from fedmllm.core.errors import ConfigError
from fedmllm.core.types import Params, visible_of
from fedmllm.federation.client_state import ClientStateStore
from fedmllm.federation.rounds import Progress, cohorts, federate
from fedmllm.runs import checkpoint
from fedmllm.runs.adapter import save_adapter
from fedmllm.runs.checkpoint import Checkpoint
from fedmllm.runs.checkpointer import Checkpointer, is_due
from fedmllm.runs.completing import learn_completion
from fedmllm.runs.costs import Totals
from fedmllm.runs.evaluator import Evaluator, Scores
from fedmllm.runs.events import EngineNote, Guaranteed, RoundEnd, Sink, fan_out, with_site_names
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.inputs import Inputs, start_engine
from fedmllm.runs.predictions import PredictionFile
from fedmllm.runs.privacy import CentralPrivacy, RowPrivacy, privacy_event
from fedmllm.runs.record import Record
from fedmllm.runs.selection import Selection
from fedmllm.runs.summary import summary_rows
from fedmllm.scenarios.availability import Always


class Session:
    """A run in progress. With a checkpoint it continues from there.

    Args:
        inputs: Rows, partition and model.
        folder: Of the run.
        record: Receives each event first; its length is part of each checkpoint.
        sinks: Receive each event after the record.
        start: The checkpoint to continue from; None = from the beginning.
    """

    def __init__(
        self, inputs: Inputs, folder: RunFolder, record: Record, sinks: Sequence[Sink], start: Checkpoint | None
    ) -> None:
        self.inputs, self.experiment, self.folder = inputs, inputs.experiment, folder
        pools = inputs.experiment.method == "centralised"  # its one client is not a site
        names = {} if pools else {shard.client: shard.name for shard in inputs.shards if shard.name}
        self.emit = with_site_names(fan_out((record, *sinks)), names)
        self._record = record
        self._predictions = PredictionFile(folder.predictions)
        self._predictions.truncate(start.run_state.prediction_bytes if start else 0)
        self.evaluator = Evaluator(inputs, self.emit, self._predictions)
        # Of the clients that are finished, for method "local".
        self.results: list[Scores] = list(start.run_state.results) if start else []
        self._checkpointer = Checkpointer(inputs, folder, record, self._predictions)
        self._start = start
        self._last: Progress | None = None  # of the federation just finished
        self._guarantee: Guarantee | None = None
        self._client_state: ClientStateStore | None = None
        self._aggregator: Aggregator = inputs.experiment.server()  # of that federation
        self._learning: dict[str, float] = {}  # costs of the completion
        self._totals = start.run_state.totals if start else Totals()
        self._began = time.perf_counter() - (start.run_state.wall_s if start else 0.0)

    def learn_completion(self) -> None:
        """Learn the completion before training, if it learns, and count what it costs."""
        self._learning = learn_completion(self.inputs, self.folder, self._start is not None, self.emit)

    @property
    def in_second_phase(self) -> bool:
        """True if the run continues from a checkpoint of one client's own training."""
        return self._start is not None and self._start.run_state.client is not None

    @property
    def wall_s(self) -> float:
        """Seconds of the run so far, without the time in which it was stopped."""
        return time.perf_counter() - self._began

    def federation(
        self,
        budget: float,
        members: Sequence[int],
        client: int | None = None,
        start: Params | None = None,
    ) -> tuple[Params, int]:
        """Federate, or continue a federation, with evaluations and checkpoints.

        Args:
            budget: Rounds of the federation, those before a stop included; 5.56 rounds end within the sixth.
            members: The clients; if the method is not "federated", all of them take part in every round.
            client: Whose training alone it is, for the methods "local" and "personal".
            start: The adapter before the first round, if it is not the untrained one: that of the phase before.

        Returns:
            The last adapter, or the best on the validation rows, and its round.
        """
        e, inputs = self.experiment, self.inputs
        federated = e.federates and client is None
        aggregator = inputs.aggregator() if client is None else FedAvg()
        clients = replace(inputs.clients(budget), aggregator=aggregator)
        if start is not None:
            objective = FedProx(mu=e.personal.mu) if e.personal.mu else TaskLoss()
            clients = replace(clients, objective=objective, availability=Always())
        before = inputs.start if start is None else start
        num_rounds = clients.num_rounds
        if federated and (size := e.cohort_size or len(members)) < (least := aggregator.least_updates()):
            raise ConfigError(f"cohort_size: {size} clients hold rows; {aggregator.name} needs {least} updates a round")

        def cohort(key: bytes) -> Callable[[int], list[int]]:
            return cohorts(e.cohort, members, e.cohort_size, e.seed, key)

        central = None
        if isinstance(e.privacy, ClientDp):
            resumed = self._start is not None
            central = CentralPrivacy(e, e.privacy, self.folder.path, len(members), cohort, resumed)
        draw = central.draw if central else cohort(b"") if federated else lambda _: list(members)
        begin = Progress(0, before, {**aggregator.init(before), **e.privacy.init()})
        selection = Selection(self.evaluator, aggregator, client)
        if (at := self._start) and at.run_state.client == client:
            begin = Progress(at.run_state.round, at.params, at.state)
            selection.restore(at)
            self._evaluate(begin, num_rounds, selection)  # whatever the record held after the checkpoint is cut off
        if "client-state" in aggregator.needs:
            clients = replace(clients, state=ClientStateStore(self.folder.client_state, begin.round))
        if e.engine.reads_rows:
            clients.store.warm(clients.shards)
        rows = None
        if isinstance(e.privacy, RowDp):
            rows = RowPrivacy(
                e, e.privacy, self.folder.path, inputs.shards, inputs.train, draw, self._start is not None
            )
            clients = replace(clients, row_noise=rows.noise)
        engine = start_engine(e.engine, clients)
        if note := getattr(engine, "note", ""):
            self.emit(EngineNote(note))
        availability = clients.availability
        drops_out = (
            None if availability.name == "always" else lambda round_, k: availability.share(e.seed, round_, k) == 0
        )
        # Only real sites have limits that the experiment does not name.
        limited_ranks = getattr(engine, "limited_ranks", None) if federated and aggregator.mixed_ranks else None
        progress = begin
        for progress in federate(
            begin,
            engine,
            inputs.with_public_loss(aggregator),
            draw,
            num_rounds,
            e.update_filter,
            drops_out,
            e.seed,
            len(members),
            inputs.ranks if federated else (),
            central.mean if central else None,
            central is not None and central.secret_cohorts,
            limited_ranks,
        ):
            if rows:
                rows.released(progress.round)
            self._totals = self._totals.plus(progress.log)
            lr = clients.round_lr(progress.round)
            log = central.public_log(progress.log) if central else progress.log
            self.emit(RoundEnd(**log, lr=lr, num_rounds=num_rounds, client=client))
            if central:
                spent = central.guarantee(progress.round, count_draw=False)
                self.emit(privacy_event(progress.round, progress.log["privacy"], spent))
            if clients.state:
                clients.state.discard(progress.round, [entry["client"] for entry in progress.log["dropped"]])
                clients.state.prune(checkpoint.numbers(self.folder.checkpoints))
            if is_due(e, progress.round, num_rounds):
                best, totals = selection.best, self._totals
                self._checkpointer.save(progress, client, best, totals, self.results, self.wall_s)
            self._evaluate(progress, num_rounds, selection)
        self._checkpointer.wait()
        self._last, self._client_state, self._aggregator = progress, clients.state, aggregator
        private = central or rows
        self._guarantee = private.guarantee(progress.round) if private else None
        if selection.params is not None and selection.best:
            return selection.params, selection.best.round
        return aggregator.result(progress.params, progress.state), progress.round

    def personal(self, client: int) -> Params:
        """A client's own model after the federation; for aggregators without a global model."""
        assert self._last is not None
        kept = self._client_state.read(client, self._last.round + 1) if self._client_state else {}
        model = self._aggregator.personal(self._last.params, self._last.state, client, kept)
        assert model is not None
        return model

    def for_visible(self, visible: str) -> Params:
        """The adapter for test rows that show these modalities, after a federation over a graph."""
        assert self._last is not None
        assert isinstance(self._aggregator, Related)
        seen = visible_of(visible, self.experiment.data.modalities())
        return self._aggregator.for_visible(self._last.params, self._last.state, seen)

    def _evaluate(self, progress: Progress, num_rounds: int, selection: Selection) -> None:
        """Evaluate after a round, if one is due. The final adapter is tested by the method."""
        evaluate, last = self.experiment.evaluate, progress.round == num_rounds
        if not evaluate.every or (progress.round % evaluate.every and not last):
            return
        if evaluate.select == "validation":
            self.emit(selection.evaluate(progress, self._totals.num_rounds))
        if not last:
            self.evaluator.test(selection.result(progress), progress.round)

    def save(self, params: Params, client: int | None = None) -> None:
        """Write the resulting adapter, or that of one client, into the folder."""
        save_adapter(self.inputs.backbone, params, self.folder.adapter(client))

    def rows(self, results: Sequence[Scores]) -> list[dict[str, Any]]:
        """Return the rows of the summary."""
        rows = summary_rows(self.experiment, results, self._totals, self.wall_s)
        rows = [{**row, **self._learning} for row in rows]
        if self._guarantee:
            about = self._guarantee.to_json()
            self.emit(Guaranteed(about))
            rows = [{**row, "epsilon": about["epsilon"], "privacy": about["claim"]} for row in rows]
        return rows

    def sync(self) -> None:
        """Wait until record and predictions are on the disk."""
        self._record.sync()
        self._predictions.sync()

    def close(self) -> None:
        """End the checkpoint thread and close the predictions."""
        self._checkpointer.close()
        self._predictions.close()
