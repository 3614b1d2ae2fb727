"""Inputs of an experiment, loaded once, and its engine."""

from __future__ import annotations

import importlib
import math
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.relations import One, Related, profile_of
from fedmllm.backbones.base import Backbone
from fedmllm.config.engine import Engine as EngineSettings
from fedmllm.config.experiment import Experiment
from fedmllm.config.train import Train
from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.tensors import params_digest as tensors_digest
from fedmllm.core.types import Example, Params, Shard, State, answer_label, visible_of
from fedmllm.data.overlap import overlap, twins
from fedmllm.data.pictures import check_rows, check_shards
from fedmllm.federation.client import Clients, RowStore, planned_steps
from fedmllm.federation.public_loss import MeanLoss, masks_like
from fedmllm.federation.rounds import RoundEngine
from fedmllm.runs.checkpoint import read_peft_adapter
from fedmllm.runs.events import Started
from fedmllm.runs.fingerprint import rows_digest
from fedmllm.runs.own_rows import OwnRows, split_test_rows
from fedmllm.scenarios.assign import assign, shards_digest
from fedmllm.scenarios.availability import Always
from fedmllm.scenarios.modalities.completion import (
    Completer,
    CompletionSite,
    Nothing,
    hidden_slots,
    rows_to_learn_from,
)
from fedmllm.scenarios.modalities.dropout import NoDropout
from fedmllm.scenarios.partitions import value_of


@dataclass(frozen=True)
class Inputs:
    """Inputs of an experiment, loaded once: rows, their partition, and the frozen model."""

    experiment: Experiment
    train: Sequence[Example]
    validation: tuple[Example, ...]  # () unless evaluate.select asks for them
    test: tuple[Example, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]  # findings about the rows that stop nothing
    shards: tuple[Shard, ...]
    backbone: Backbone
    start: Params  # the adapter before any training: a new one, or that of `backbone.adapter`
    public: tuple[Example, ...] = ()  # complete rows that all clients may read
    completer: Completer | None = None  # None: rows stay as they are
    own_rows: OwnRows = field(default_factory=list)  # of each client among the test rows; [] = not evaluated

    @classmethod
    def load(cls, experiment: Experiment) -> Inputs:
        """Read the rows, split and mask them, and read their visible pictures. The model is loaded last: it is expensive."""
        data, modalities = experiment.data, experiment.data.modalities()
        evaluated = frozenset[str]().union(*(visible_of(v, modalities) for v in experiment.evaluate.visible))
        train, test = data.load("train"), data.load(experiment.evaluate.rows)
        limit = experiment.evaluate.limit or None
        validation = data.load("validation").examples if experiment.evaluate.select == "validation" else ()
        if experiment.evaluate.select == "validation" and not validation:
            raise ConfigError(
                f"evaluate.select: got 'validation', but {data.name} has no validation rows; allowed: last"
            )
        if experiment.evaluate.rows == "validation" and not test.examples:
            raise ConfigError(f"evaluate.rows: got 'validation', but {data.name} has no validation rows; allowed: test")
        shards = assign(train.examples, modalities, experiment.partition, experiment.scenario, experiment.seed)
        read = [unmasked(shard, modalities) for shard in shards] if experiment.completion.sees_hidden else shards
        checked, bad_train, of_train = check_shards(train.examples, read, data.on_bad_row)
        shards = checked if read is shards else masked_as(shards, checked)
        of_learning = ""
        if experiment.completion.learns:
            of_learning = clients_left_out(experiment, shards, train.examples)
        public = experiment.public.load(data) if experiment.public.rows else ()
        of_public = public_notes(experiment, shards, train.examples, public, test.examples[:limit])
        test_rows, bad_test, of_test = check_rows(test.examples[:limit], evaluated, data.on_bad_row)
        validation, bad_validation, _ = check_rows(validation[:limit], evaluated, data.on_bad_row)
        shared = overlap(train.examples, test_rows, data.group_column())
        rows = train.examples
        if experiment.public.client:
            held = range(len(rows), len(rows) + len(public))
            mask = frozenset(modalities)
            shards = (*shards, Shard(len(shards), tuple(held), (mask,) * len(public), "public"))
            rows = (*rows, *public)
        of_dropout = dropout_note(experiment, shards)
        own_rows, no_own = split_test_rows(experiment, shards, train.examples, test_rows)
        if not test_rows and experiment.metrics():  # a server of real sites may have no test rows
            raise DataError(f"{data.name}: no usable test row")
        backbone = experiment.backbone.load(experiment.seed)
        if experiment.backbone.adapter:
            experiment.backbone.check_adapter(Path(experiment.backbone.adapter))
            backbone.set_lora(read_peft_adapter(Path(experiment.backbone.adapter), experiment.backbone.lora, backbone))
        return cls(
            experiment=experiment,
            train=rows,
            validation=validation,
            test=test_rows,
            skipped=(*train.skipped, *test.skipped, *bad_train, *bad_test, *bad_validation),
            notes=tuple(
                dict.fromkeys(
                    (
                        *train.notes,
                        *test.notes,
                        *of_train,
                        *of_test,
                        *shared,
                        *of_public,
                        *filter(None, [of_learning, of_dropout, no_own]),
                    )
                )
            ),
            shards=shards,
            backbone=backbone,
            start=backbone.lora(),
            public=public,
            completer=completer_of(experiment, backbone, public),
            own_rows=own_rows,
        )

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """LoRA ranks of the clients, in turn; () = all have the adapter's.

        Raises:
            DataError: The rows of a client do not state one rank.
        """
        lora = self.experiment.backbone.lora
        if not lora.rank_column or not self.experiment.federates:
            return lora.ranks if self.experiment.federates else ()
        return tuple(
            stated_rank([self.train[row] for row in shard.rows], lora.rank_column, lora.r, shard.client)
            for shard in self.shards
        )

    def clients(self, num_rounds: float) -> Clients:
        """Return the clients as local training uses them; for method "centralised" one client that holds all rows.

        Args:
            num_rounds: Of the federation; 5.56 rounds end within the sixth.
        """
        e, whole = self.experiment, math.ceil(num_rounds)
        train, shards = (e.train, self.shards) if e.method != "centralised" else pooled(e.train, self.shards)
        return Clients(
            backbone=self.backbone,
            objective=e.objective,
            train=train,
            store=RowStore(self.backbone, e.prompt, self.train, self.completer),
            shards=shards,
            modalities=e.data.modalities(),
            num_rounds=whole,
            last_share=num_rounds - whole + 1,
            seed=e.seed,
            availability=e.availability if e.federates else Always(),
            aggregator=e.server(),
            dropout=e.modality_dropout,
            experiment=e,
        )

    def aggregator(self) -> Aggregator:
        """Return the aggregator of the federation; on each node of the graph if there is one."""
        e = self.experiment
        if e.relation == One():
            return e.server()
        profiles = tuple(profile_of(shard, e.data.modalities()) for shard in self.shards)
        return Related(name=e.aggregator.name, inner=e.server(), relation=e.relation, profiles=profiles)

    def with_public_loss(self, aggregator: Aggregator) -> Aggregator:
        """Return the server's aggregator: one whose relation learns measures adapters on the public rows.

        Args:
            aggregator: The clients' one, which may travel to other processes and has no model.
        """
        e = self.experiment
        if not isinstance(aggregator, Related) or not e.relation.needs_public:
            return aggregator
        store = RowStore(self.backbone, e.prompt, self.public, self.completer)
        masks = [masks_like(p, len(self.public), e.data.modalities(), e.seed) for p in aggregator.node_profiles()]
        return aggregator.model_copy(update={"public_loss": MeanLoss(self.backbone, store, masks, e.train.batch_size)})

    def initial_state(self) -> State:
        """Return the server's state before the first round: of the aggregator, and of the privacy mechanism."""
        return {**self.aggregator().init(self.start), **self.experiment.privacy.init()}

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of the rows with their pictures, of who holds and sees which of them, and of the frozen model.

        Validation rows and public rows have digests of their own. Public rows that a client holds are in `public` alone:
        runs with and without this client are compared on the same rows of the other clients and the same test rows.
        """
        num_public = len(self.public) if self.experiment.public.client else 0
        own = self.train[: len(self.train) - num_public]
        shards = self.shards[:-1] if num_public else self.shards
        rows = rows_digest(own, (), self.test)
        validation = {"validation": rows_digest(self.validation)} if self.validation else {}
        public = {"public": rows_digest(self.public)} if self.public else {}
        adapter = {"adapter": tensors_digest(self.start)} if self.experiment.backbone.adapter else {}
        base = {"base": self.backbone.digest, **adapter}
        return {"rows": rows, "partition": shards_digest(shards, own), **base, **public, **validation}


def stated_rank(rows: Sequence[Example], column: str, most: int, client: int) -> int:
    """Return the LoRA rank that a client's rows state.

    Args:
        rows: Of the client; without any, it has the largest rank.
        column: With a whole number above 0, the same in all rows.
        most: Largest rank.
        client: For the message.

    Raises:
        DataError: A row lacks the column, or the values are not one such number.
    """
    values = {value_of(row, column) for row in rows}
    if not values:
        return most
    (first, *others) = sorted(values)
    if others or not first.isdecimal() or not int(first):
        raise DataError(
            f"backbone.lora.rank_column: client {client} has {column!r} = {', '.join(map(repr, sorted(values)[:3]))}; allowed: "
            "one whole number above 0 for all rows of a client"
        )
    return min(most, int(first))


def clients_left_out(experiment: Experiment, shards: Sequence[Shard], train: Sequence[Example]) -> str:
    """Say how many clients have too few complete rows to take part in learning a completion.

    Args:
        experiment: One whose completion learns.
        shards: All clients without the public one.
        train: Training rows.

    Returns:
        A note for the record; "" if each client with complete rows takes part.

    Raises:
        ConfigError: Nothing can be learned, or from one row alone, of which it would send a copy to all clients.
    """
    e, least = experiment, experiment.completion.min_rows()
    own = [len(rows) for rows in rows_to_learn_from(e.completion, train, shards, e.data.modalities()).values()]
    counts = [*own, *([e.public.rows] if e.public.client else [])]
    if sum(count for count in counts if count >= least) < 2:
        fault = "no client has a complete row to learn it from"
        if any(counts) and max(counts) < least:
            fault = (
                f"no client has {least} complete rows to learn it from, the least that may take part (least_rows); the most is "
                f"{max(counts)}"
            )
        elif any(counts):
            fault = "the clients have one complete row together, and what is learned from it is a copy of it"
        raise ConfigError(
            f"completion: got {e.completion.name!r}, but {fault}; set public.rows and public.client = true, or choose another "
            "scenario"
        )
    few, with_rows = sum(0 < count < least for count in counts), sum(count > 0 for count in counts)
    if not few:
        return ""
    return (
        f"completion {e.completion.name}: {few} of {with_rows} clients with complete rows have fewer than {least} and take no "
        "part in learning it"
    )


def dropout_note(experiment: Experiment, shards: Sequence[Shard]) -> str:
    """Say that a modality dropout has no effect, because no client has a complete row.

    Args:
        experiment: Its modality dropout and data set.
        shards: All clients, the public one included.

    Returns:
        A note for the record; "" if there is a complete row, or no dropout.
    """
    dropout, modalities = experiment.modality_dropout, frozenset(experiment.data.modalities())
    if dropout == NoDropout() or any(modalities <= visible for shard in shards for visible in shard.visible):
        return ""
    measured = ", and no importance is measured" if dropout.measured_rows() else ""
    return f"modality_dropout {dropout.name}: no client has a complete row, so no row loses a modality{measured}"


def completer_of(experiment: Experiment, backbone: Backbone, public: tuple[Example, ...]) -> Completer | None:
    """Return what fills or converts rows; None if they stay as they are.

    Args:
        experiment: Its completion and seed.
        backbone: The frozen model.
        public: Complete public rows.
    """
    e = experiment
    if e.completion == Nothing():
        return None
    ordered = tuple(sorted(public, key=lambda row: str(row.id)))
    return Completer(e.completion, CompletionSite(backbone, ordered, e.data.modalities(), e.seed))


def public_notes(
    experiment: Experiment,
    shards: Sequence[Shard],
    train: Sequence[Example],
    public: Sequence[Example],
    test: Sequence[Example],
) -> list[str]:
    """Return findings about completion and public rows for the record.

    Raises:
        DataError: Rows of `public.data` are the clients' own.
    """
    e = experiment
    notes = [f"public rows: {note}" for note in overlap(public, test, e.data.group_column())]
    if own := twins(public, train):
        row, twin = own[0]
        found = f"{len(own)} of {len(public)} public rows are also training rows"
        first = f"the first is {row.where}, id {row.id}, which is {twin.where}, id {twin.id}"
        if e.public.data not in (None, e.data):
            raise DataError(f"public.data: {found} of the clients; {first}. allowed: rows that no client holds")
        notes.append(f"public rows: {found}; {first}")
    if e.completion.name == "none":
        return notes
    hidden = hidden_slots(shards, e.data.modalities())
    slots = ", ".join(f"{number} x {modality}" for modality, number in hidden.items()) or "none"
    source = f" from {len(public)} public rows" if e.completion.needs_public else ""
    notes.append(f"completion {e.completion.label()}{source}; hidden in the training rows: {slots}")
    if e.completion.sees_hidden:
        notes.append(f"completion {e.completion.name} gets what the masks hide: a bound, not a method")
    if e.completion.may_leak():
        notes.append(f"completion {e.completion.name}: what it fills into training rows can give their answers away")
    return [*notes, *e.completion.notes(train, public)]


def unmasked(shard: Shard, modalities: Sequence[str]) -> Shard:
    """Return the shard with nothing hidden."""
    return replace(shard, visible=(frozenset(modalities),) * len(shard.rows))


def masked_as(shards: Sequence[Shard], kept: Sequence[Shard]) -> tuple[Shard, ...]:
    """Return the rows of `kept` with the masks that they have in `shards`."""
    masks = [dict(zip(shard.rows, shard.visible, strict=True)) for shard in shards]
    return tuple(replace(s, visible=tuple(m[row] for row in s.rows)) for s, m in zip(kept, masks, strict=True))


def pooled(train: Train, shards: Sequence[Shard]) -> tuple[Train, tuple[Shard, ...]]:
    """Return the settings and the one client of centralised training.

    The client holds all rows, hidden as they are on the clients. With `train.max_steps` it may make as many steps a round
    as all clients together, so that it sees as many rows.
    """
    rows = tuple(row for shard in shards for row in shard.rows)
    visible = tuple(mask for shard in shards for mask in shard.visible)
    if train.max_steps:
        steps = sum(planned_steps(train, len(shard.rows)) for shard in shards if shard.rows)
        train = train.model_copy(update={"max_steps": steps})
    return train, (Shard(0, rows, visible),)


def start_engine(settings: EngineSettings, clients: Clients) -> RoundEngine:
    """The engine that the settings name."""
    module, _, factory = settings.import_path.partition(":")
    engine: RoundEngine = getattr(importlib.import_module(module), factory)(settings, clients)
    return engine


def about_client(shard: Shard, examples: Sequence[Example]) -> dict[str, Any]:
    """Count a client's rows by label, and by available modalities ("image+text", "none")."""
    labels = Counter(answer_label(examples[row]) for row in shard.rows)
    shows = Counter("+".join(sorted(visible)) or "none" for visible in shard.visible)
    name = shard.name or str(shard.client)
    return {
        "client": shard.client,
        "name": name,
        "labels": dict(sorted(labels.items())),
        "shows": dict(sorted(shows.items())),
    }


@cache
def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    return {name: version(name) for name in ("fedmllm", "torch", "transformers", "peft", "numpy")}


def device(inputs: Inputs) -> dict[str, Any]:
    """Return the device of the computation, or the devices."""
    names = list(inputs.backbone.devices) or [str(inputs.backbone.device)]
    if copies := getattr(inputs.experiment.engine, "devices", ()):
        from fedmllm.federation.engines.stacked.replicas import find_replica_devices  # other engines do without it

        names = list(map(str, find_replica_devices(copies, inputs.backbone.device)))
    return {
        "name": ", ".join(names),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


WITHHELD = (
    "num_train has one digit; rows per client, labels, modalities and bad rows are left out, as numbers without noise:"
)


def heading(inputs: Inputs) -> Started:
    """Return the first line of a record. Counts of the rows would leave without noise, so privacy leaves them out."""
    e = inputs.experiment
    started = Started(
        run_id=e.run_id(),
        settings=e.model_dump(mode="json"),
        versions=versions(),
        device=device(inputs),
        digests=inputs.digests,
        num_train=sum(len(shard.rows) for shard in inputs.shards),
        num_test=len(inputs.test),
        rows_per_client=[len(shard.rows) for shard in inputs.shards],
        clients=[about_client(shard, inputs.train) for shard in inputs.shards],
        num_skipped=len(inputs.skipped),
        skipped=list(inputs.skipped[:20]),
        notes=inputs.notes,
        plugins=[plugin.record() for plugin in e.plugins()],
        role=e.role(),
    )
    if e.privacy.name == "none" or getattr(e.privacy, "simulate_noise", False):
        return started
    coarse = float(f"{started.num_train:.0e}")
    nothing: dict[str, Any] = {"rows_per_client": [], "clients": [], "num_skipped": 0, "skipped": [], "notes": ()}
    return replace(started, num_train=int(coarse), **nothing, withheld=f"{WITHHELD} privacy {e.privacy.name}")
