"""Secret keys and the ledger of a run with privacy.

`noise.key` and `cohort.key` in the run's folder hold 32 bytes each, readable by their owner alone. They are never copied
into a record, checkpoint or summary: noise that others can compute does not protect. `releases.jsonl` has a line per noisy
release with a tag; the same round with the same tag is the same release.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmllm.algorithms.privacy.client_dp import ClientDp, NoisyMean
from fedmllm.algorithms.privacy.guarantee import Guarantee
from fedmllm.algorithms.privacy.noise import NOISE_KEY_BYTES, simulation_key
from fedmllm.algorithms.privacy.row_dp import RowDp, RowNoise
from fedmllm.config.engine import FlowerSites
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.storage import sync, writing
from fedmllm.core.types import Example, Shard
from fedmllm.federation.client import grouped
from fedmllm.runs.events import Privatized

NOISE_KEY, COHORT_KEY, RELEASES = "noise.key", "cohort.key", "releases.jsonl"
_PUBLIC = ("client", "up_bytes", "down_bytes")  # of a client's entry in the record
_DROPPED = "no usable update"  # any other reason may have a number of the client's update


class CentralPrivacy:
    """Keys, releases and guarantee of a run with privacy "client-dp".

    Args:
        experiment: What runs.
        settings: Its privacy.
        folder: Of the run.
        members: Clients that can be drawn.
        draw: Makes the function (round -> clients asked) from the cohort key.
        resumed: Whether the run continues from a checkpoint: then its key must be there.

    Raises:
        ConfigError: delta is too large for the number of clients.
        FedmllmError: A key file is missing, damaged or readable by others.
    """

    def __init__(
        self,
        experiment: Experiment,
        settings: ClientDp,
        folder: Path,
        num_clients: int,
        draw: Callable[[bytes], Callable[[int], list[int]]],
        resumed: bool,
    ) -> None:
        if settings.delta * num_clients >= 1:
            raise ConfigError(
                f"privacy.delta: got {settings.delta:g}; allowed: below 1 / number of clients, 1 / {num_clients}"
            )
        self._experiment, self._settings, self._num_clients = experiment, settings, num_clients
        self.secret_cohorts = experiment.cohort == "poisson"
        public = simulation_key(experiment.seed)
        simulated = settings.simulate_noise

        def key(name: str) -> bytes:
            return public if simulated else secret_key(folder / name, resumed)

        self.draw = draw(key(COHORT_KEY) if self.secret_cohorts else b"")
        self._releases = Releases(folder / RELEASES, resumed)
        self.mean = NoisyMean(settings, experiment.cohort_size, key(NOISE_KEY), self._releases.add)

    def guarantee(self, round_: int, count_draw: bool = True) -> Guarantee:
        """Return the guarantee after a round, over all releases. Without `count_draw` epsilon is quick and may be too large."""
        counts = (
            Counter(dict.fromkeys(range(1, round_ + 1), 1)) | self._releases.counts
        )  # later rounds before a stop, too
        most = list(counts.values())
        if not self.secret_cohorts:
            asked: dict[int, list[int]] = {}
            for done, count in counts.items():
                for client in self.draw(done):
                    asked.setdefault(client, []).append(count)
            most = max(asked.values(), key=sum, default=[])
        e = self._experiment
        outside: tuple[str, ...] = ()
        if e.evaluate.select == "validation":
            outside += ("the validation rows, which pick the adapter",)
        if self.secret_cohorts:
            outside += ("the number of clients of each round, by the bytes in the record",)
        return self._settings.guarantee(
            e.cohort_size, self._num_clients, most, self.secret_cohorts, outside, count_draw
        )

    def public_log(self, log: Mapping[str, Any]) -> dict[str, Any]:
        """A round's log without the numbers about single clients, and without who was asked if that is a secret."""
        table = {key: value for key, value in log.items() if key != "privacy"}
        table["clients"] = [{k: entry[k] for k in _PUBLIC} for entry in log["clients"]]
        table["dropped"] = [{"client": entry["client"], "reason": _DROPPED} for entry in log["dropped"]]
        if self.secret_cohorts:
            table |= {"cohort": [], "clients": [], "dropped": []}
            table.pop("dropped_out", None)
        return table


class RowPrivacy:
    """Noise and guarantee of a run with privacy "row-dp".

    Clients of one process draw their noise from one key in the run's folder. Real sites have keys and ledgers of their own.

    Args:
        experiment: What runs.
        settings: Its privacy.
        folder: Of the run.
        shards: Of all clients.
        examples: All training rows.
        draw: Round -> clients asked.
        resumed: Whether the run continues from a checkpoint.

    Raises:
        ConfigError: delta is too large for the number of rows or groups.
        DataError: With unit "group", a row has no group.
        FedmllmError: The file of the key or of the releases is missing, or damaged.
    """

    def __init__(
        self,
        experiment: Experiment,
        settings: RowDp,
        folder: Path,
        shards: Sequence[Shard],
        examples: Sequence[Example],
        draw: Callable[[int], list[int]],
        resumed: bool,
    ) -> None:
        self._experiment, self._settings, self._draw = experiment, settings, draw
        self._at_sites = isinstance(experiment.engine, FlowerSites)
        self._column = "" if self._at_sites else experiment.data.group_column()
        self._holders = holders(settings, shards, examples, self._column)
        counts = Counter(client for clients in self._holders for client in clients)
        most = max(counts.values() if self._holders else (len(shard.rows) for shard in shards), default=0)
        if settings.delta * most >= 1:
            raise ConfigError(
                f"privacy.delta: got {settings.delta:g}; a client has {most} {settings.unit}s; allowed: below 1 / number of "
                f"{settings.unit}s"
            )
        self.noise: RowNoise | None = None
        self._releases: Releases | None = None
        if not self._at_sites:
            public = simulation_key(experiment.seed)
            key = public if settings.simulate_noise else secret_key(folder / NOISE_KEY, resumed)
            self.noise = RowNoise(settings, key, experiment.run_id(), self._column)
            if not settings.simulate_noise:
                self._releases = Releases(folder / RELEASES, resumed)

    def released(self, round_: int) -> None:
        """Note a round before anything of it leaves. Computed again, after a stop, it counts once if all sums are equal."""
        if self.noise and self._releases:
            self._releases.add(round_, self.noise.tag(round_))

    def guarantee(self, round_: int) -> Guarantee:
        """Return the guarantee after a round for a row, or group, of the clients that were asked most often."""
        counts = Counter(dict.fromkeys(range(1, round_ + 1), 1)) | (
            self._releases.counts if self._releases else Counter()
        )
        cohorts = [self._draw(t) for t in counts.elements()]
        visits = self._experiment.train.epochs * most_rounds(cohorts, self._holders)
        outside: tuple[str, ...] = ()
        if self._at_sites:
            outside += ("rounds that a site trained twice: its own ledger counts them",)
            if self._settings.unit == "group":
                outside += ("groups with rows at several sites: what the sites' ledgers count adds up",)
        return self._settings.guarantee(visits, self._at_sites, outside, self._column)


def holders(
    settings: RowDp, shards: Sequence[Shard], examples: Sequence[Example], column: str
) -> tuple[frozenset[int], ...]:
    """The clients that hold rows of each group, one entry a group; () if single rows are clipped or no column is known.

    Raises:
        DataError: A row has no group.
    """
    if settings.unit == "row" or not column:
        return ()
    found: dict[str, set[int]] = {}
    for shard in shards:
        for places in grouped(examples, shard, column):
            found.setdefault(examples[shard.rows[places[0]]].columns[column], set()).add(shard.client)
    return tuple(map(frozenset, found.values()))


def most_rounds(cohorts: Iterable[Iterable[int]], holders: Sequence[frozenset[int]]) -> int:
    """Noisy sums with one row, or one group, in an epoch of each round: those of all clients that hold a part of it add up.

    Args:
        cohorts: The clients asked in each round.
        holders: As the function of that name returns them.
    """
    asked = Counter(client for cohort in cohorts for client in cohort)
    return max((sum(asked[c] for c in clients) for clients in holders) if holders else asked.values(), default=0)


def privacy_event(round_: int, entry: Mapping[str, Any], guarantee: Guarantee) -> Privatized:
    """The record's line about a release."""
    return Privatized(round_, entry["clip"], entry["noise_std"], guarantee.claim())


class Releases:
    """The noisy releases of a run, on disk before they are used.

    Args:
        path: The file.
        must_exist: Refuse to begin one: a run that continues has made releases.

    Raises:
        FedmllmError: The file is missing or damaged: the releases cannot be counted then.
    """

    def __init__(self, path: Path, must_exist: bool = False) -> None:
        if must_exist and not path.exists():
            raise FedmllmError(
                f"{path}: missing: without it the releases so far cannot be counted; choose another --out"
            )
        self._path = path
        self._tags: set[tuple[int, str]] = set()
        if path.exists():
            try:
                content = path.read_bytes()
                if not content.endswith(b"\n"):  # a kill cut the last line: that release was never used
                    content = content[: content.rfind(b"\n") + 1]
                    os.truncate(path, len(content))
                for line in content.splitlines():
                    entry = json.loads(line)
                    self._tags.add((int(entry["round"]), str(entry["tag"])))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise FedmllmError(
                    f"{path}: cannot be read ({type(error).__name__}: {error}); without it the releases cannot be counted"
                ) from None

    @property
    def counts(self) -> Counter[int]:
        """Round -> releases."""
        return Counter(round_ for round_, _ in self._tags)

    def add(self, round_: int, tag: str) -> None:
        """Note a release. A round that is computed again with equal updates is the same release."""
        if (round_, tag) in self._tags:
            return
        self._tags.add((round_, tag))
        with writing(self._path):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"round": round_, "tag": tag}) + "\n")
            sync(self._path)


def secret_key(path: Path, must_exist: bool = False) -> bytes:
    """Read a key file; make one if there is none.

    Args:
        path: The file. It is made with mode 0600.
        must_exist: Refuse to make one: a run that continues needs the key that it began with.

    Returns:
        32 bytes.

    Raises:
        FedmllmError: The file is missing, has another length, or others may read it.
    """
    if not path.exists():
        if must_exist:
            raise FedmllmError(
                f"{path}: missing: a run with secret noise cannot be resumed without its key; choose another --out"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(NOISE_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
    if os.name == "posix" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(path.stat().st_mode)
        raise FedmllmError(f"{path}: mode is {mode:04o}, others can read the key; allowed: 0600. Choose another --out")
    key = path.read_bytes()
    if len(key) != NOISE_KEY_BYTES:
        raise FedmllmError(f"{path}: {len(key)} bytes; a key has {NOISE_KEY_BYTES}. Choose another --out")
    return key
