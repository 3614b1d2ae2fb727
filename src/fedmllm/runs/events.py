"""Events of a run, for its record and other sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar, Self, TypeAlias

from fedmllm.core.errors import FedmllmError

RENAMED = {"alone": "client", "away": "dropped_out"}  # keys of round events in records of earlier releases


@dataclass(frozen=True)
class Event:
    """One thing that happened in a run. A field that equals its default is left out of the JSON."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Event]]] = {}

    def __init_subclass__(cls) -> None:
        cls.kinds[cls.kind] = cls

    def to_json(self) -> dict[str, Any]:
        """Return the event as a JSON object; `event` is its kind."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {"event": self.kind, **values}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Event:
        """Return the event of a record's line.

        Args:
            line: A JSON object as `to_json` makes it; other keys, such as `time`, are left out.

        Raises:
            FedmllmError: The kind is unknown, or a key is missing.
        """
        kind = cls.kinds.get(str(line.get("event")))
        if kind is None:
            raise FedmllmError(f"event: got {line.get('event')!r}; allowed: {', '.join(cls.kinds)}")
        table = renamed(line)
        if missing := [
            f.name for f in fields(kind) if f.name not in table and f.default is f.default_factory is MISSING
        ]:
            raise FedmllmError(f"event {kind.kind}: missing: {', '.join(missing)}")
        return kind(**{f.name: table[f.name] for f in fields(kind) if f.name in table})


Sink: TypeAlias = Callable[[Event], None]  # a record file, a progress bar, a tracker: all receive the same events


def fan_out(sinks: Sequence[Sink]) -> Sink:
    """Return a sink that passes each event to several others in their order."""

    def emit(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return emit


def with_site_names(emit: Sink, names: Mapping[int, str]) -> Sink:
    """Return a sink that passes events on with the site's name, `name`, next to each client's number.

    Args:
        emit: Receives the events.
        names: Client -> its site, if the rows name their sites; without names the events stay as they are.
    """

    def name_of(clients: Sequence[int]) -> str:
        return " + ".join(names.get(client, str(client)) for client in clients)

    def named(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {"client": entry["client"], "name": name_of(entry.get("clients") or [entry["client"]]), **entry}

    def emit_named(event: Event) -> None:
        changes: dict[str, Any] = {}
        if isinstance(event, RoundEnd | CompletionRound):
            changes["clients"] = [named(entry) for entry in event.clients]
        if isinstance(event, RoundEnd):
            changes["dropped"] = [named(entry) for entry in event.dropped]
        if isinstance(event, RoundEnd | Evaluated | Validated) and event.client is not None:
            changes["name"] = name_of([event.client])
        if isinstance(event, Evaluated) and event.own:
            changes["own"] = [named(entry) for entry in event.own]
        if isinstance(event, EmptyClients):
            changes["names"] = [name_of([client]) for client in event.clients]
        emit(replace(event, **changes))

    return emit_named if names else emit


def renamed(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's line with the present names of its keys."""
    if line.get("event") != "round":
        return dict(line)
    return {RENAMED.get(key, key): value for key, value in line.items()}


@dataclass(frozen=True)
class Started(Event):
    """The first line of a record: what runs, where, and on which rows."""

    kind = "experiment"
    run_id: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    device: Mapping[str, Any]
    digests: Mapping[str, str]  # of rows, partition and base
    num_train: int
    num_test: int
    rows_per_client: list[int]
    clients: list[dict[str, Any]]
    num_skipped: int
    skipped: list[str]  # the first ones
    plugins: list[dict[str, Any]] = field(default_factory=list)  # of all code outside the package
    notes: Sequence[str] = ()  # findings about the rows, such as pictures that are in training and test
    withheld: str = ""  # what this line does not have, and why
    role: str = "method"  # or "control" or "bound", which reports do not rank


@dataclass(frozen=True)
class Resumed(Event):
    """A run continues from a checkpoint."""

    kind = "resumed"
    round: int
    num_rounds_done: int  # over all of the run's federations
    versions: Mapping[str, str]
    device: Mapping[str, Any]
    changed: list[str]  # versions and devices that differ: the last bits of what follows may differ, too
    sent_bytes: int = 0  # up and down, in the rounds done


@dataclass(frozen=True)
class Extended(Event):
    """A run gets more rounds than its first line says. The rounds before are those of a run that had them from the start."""

    kind = "extended"
    round: int  # after which it continues
    num_rounds: int  # as of now
    run_id: str  # of the experiment with that number of rounds


@dataclass(frozen=True)
class EmptyClients(Event):
    """Clients without rows."""

    kind = "empty_clients"
    clients: list[int]
    note: str
    names: Sequence[str] = ()  # of their sites, if the rows name them


@dataclass(frozen=True)
class EngineNote(Event):
    """Facts about an engine's computation of the rounds."""

    kind = "engine"
    note: str


@dataclass(frozen=True)
class CompletionRound(Event):
    """A round is finished in which a completion was learned, before training. Its bytes are not in those of the rounds."""

    kind = "completion_round"
    round: int
    num_rounds: int
    clients: list[dict[str, Any]]  # those averaged: client, num_examples, norm, loss
    up_bytes: int
    down_bytes: int
    wall_s: float


@dataclass(frozen=True)
class RoundEnd(Event):
    """A round is finished. Bytes are those of the round, over all its clients."""

    kind = "round"
    round: int
    cohort: list[int]
    clients: list[dict[str, Any]]  # those averaged: client, num_examples, norm, loss, num_steps, num_tokens, time_s
    dropped: list[dict[str, Any]]  # client, reason: their updates were left out
    up_bytes: int
    up_lora_bytes: int
    down_bytes: int
    down_lora_bytes: int
    server_s: float
    wall_s: float
    lr: float
    num_rounds: int  # of the federation
    aggregation_error: float | None = None  # relative distance of the result from the mean of the clients' products
    aggregation_error_sketch: int | None = None  # columns of the random projection that estimates it; None = exact
    aggregation_note: str = ""  # why `aggregation_error` was left out
    truncation_error: float | None = None  # relative, of the cut to the rank of the adapter, if the aggregator cuts
    result_rank: int | None = None  # of the global model as one adapter
    relation: dict[str, Any] | None = None  # numbers of a learned relation: loss on the public rows
    dropped_out: list[int] | None = None  # clients that received the adapter and did not answer
    note: str = ""
    client: int | None = None  # whose training alone it is, for method "local"
    name: str = ""  # of that client's site, if the rows name their sites

    @property
    def whose(self) -> str:
        """Whose rounds these are, as a title of a progress bar."""
        return "rounds" if self.client is None else f"{self.name or f'client {self.client}'} alone"


@dataclass(frozen=True)
class Privatized(Event):
    """A noisy mean was released."""

    kind = "privacy"
    round: int
    clip: float
    noise_std: float  # of each number of the mean
    claim: str  # over all rounds so far, whatever the draw


@dataclass(frozen=True)
class Guaranteed(Event):
    """Guarantee of the run's privacy mechanism, with all that a claim has to name (`Guarantee.to_json`)."""

    kind = "guarantee"
    guarantee: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluated(Event):
    """Metrics of an adapter on the test rows for one set of visible modalities."""

    kind = "eval"
    visible: str
    metrics: Mapping[str, float | None]
    num_rows: int
    wall_s: float
    round: int | None = None
    client: int | None = None
    node: str = ""  # of a graph's adapters the one that is not the result: "mean"
    name: str = ""  # of the client's site, if the rows name their sites
    own: list[dict[str, Any]] | None = None  # client, num_rows and metrics on each client's own test rows


@dataclass(frozen=True)
class Validated(Event):
    """The selection metric of a round's adapter on the validation rows."""

    kind = "validation"
    round: int
    metric: str
    value: float | None
    visible: str
    best_round: int | None
    client: int | None = None
    name: str = ""  # of the client's site, if the rows name their sites


@dataclass(frozen=True)
class Learned(Event):
    """The result of a run against the frozen model and the most frequent training answer, on the same test rows."""

    kind = "learned"
    metric: str
    visible: str
    num_rows: int
    value: float
    baselines: list[dict[str, Any]]  # name, value, difference, low, high: 95 % interval over rows, or null
    advice: list[str]  # settings that are likely to be the reason, if nothing was learned

    @property
    def beaten(self) -> list[str]:
        """Names of the baselines that the result is better than, by more than the interval."""
        return [b["name"] for b in self.baselines if b["low"] is not None and b["low"] > 0]

    @property
    def nothing(self) -> bool:
        """True if a baseline is not beaten, although its interval is known."""
        return any(b["low"] is not None and b["low"] <= 0 for b in self.baselines)


@dataclass(frozen=True)
class Ended(Event):
    """The run is finished; its summary follows."""

    kind = "end"
    num_rows: int  # of the summary


@dataclass(frozen=True)
class Stopped(Event):
    """The run was stopped by an error or a signal."""

    kind = "stopped"
    reason: str

    @classmethod
    def by(cls, error: BaseException) -> Self:
        """Return the event for an exception."""
        return cls(f"{type(error).__name__}: {error}")
