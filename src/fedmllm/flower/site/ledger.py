"""A site's own account of privacy, over all runs of its SITE.toml."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fedmllm.algorithms.privacy.accounting import gaussian_epsilon
from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import make_folder, sync

LEDGER = "privacy.jsonl"  # in the site's state folder


@dataclass(frozen=True)
class Entry:
    """One request that was trained.

    Attributes:
        run_id: As the request named its run.
        round: Of the run.
        noise_multiplier: z of each step.
        num_visits: Steps that contain one row.
        time: Seconds since 1970.
    """

    run_id: str
    round: int
    noise_multiplier: float
    num_visits: int
    time: float

    @property
    def squared_mu(self) -> float:
        """mu^2 of the entry as a Gaussian mechanism; those of all entries add up."""
        return self.num_visits / self.noise_multiplier**2


def spent(entries: list[Entry], delta: float) -> float:
    """Epsilon of all entries together.

    Args:
        entries: Of one site's rows.
        delta: At which epsilon is stated.

    Returns:
        Epsilon of one Gaussian mechanism with the summed mu^2: composition of Gaussian mechanisms is exact.
    """
    squared = sum(entry.squared_mu for entry in entries)
    return gaussian_epsilon(1 / math.sqrt(squared), 1, delta) if squared else 0.0


class Ledger:
    """The file of a site's entries. One is written, and on the disk, before its training begins.

    Args:
        path: The file; made by the first entry.
        key: The site's key of noise, which is made after the first entry: if it is there, the file has to be there, too.
    """

    def __init__(self, path: Path, key: Path | None = None) -> None:
        self._path, self._key = path, key

    def entries(self) -> list[Entry]:
        """All entries.

        Returns:
            In the order in which they were written.

        Raises:
            FedmllmError: The file is damaged, or lost: what has been spent is then unknown.
        """
        if self._key and self._key.exists() and not self._path.exists():
            raise FedmllmError(
                f"{self._path}: missing, but {self._key} was used: what has been spent is unknown. Put the ledger back; "
                "for other rows choose another SITE.toml"
            )
        try:
            lines = self._path.read_bytes().splitlines() if self._path.exists() else []
            entries = [Entry(**json.loads(line)) for line in lines]
            if any(not (e.noise_multiplier > 0 and e.num_visits >= 0) for e in entries):
                raise ValueError("a number is not positive")
        except (OSError, ValueError, TypeError) as error:
            raise FedmllmError(f"{self._path}: cannot be read ({type(error).__name__}: {error})") from None
        return entries

    def charge(
        self, run_id: str, round_: int, noise_multiplier: float, num_visits: int, most: float | None, delta: float
    ) -> str:
        """Add an entry, unless epsilon would then pass the limit.

        Args:
            run_id: Of the request.
            round_: Of the request.
            noise_multiplier: z, above 0.
            num_visits: Steps that will contain one row.
            most: Largest epsilon of all entries together; None = no limit.
            delta: At which epsilon is counted.

        Returns:
            The reason to refuse; "" = the entry is on the disk.

        Raises:
            FedmllmError: The file is damaged or lost.
        """
        with self._locked():
            entries = self.entries()
            entry = Entry(run_id, round_, noise_multiplier, num_visits, round(time.time(), 3))
            before, after = spent(entries, delta), spent([*entries, entry], delta)
            if most is not None and after > most:
                return f"epsilon would be {after:.4g} at delta {delta:g}; spent so far {before:.4g}; this site allows {most:g}"
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
            sync(self._path)
        return ""

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Two processes of one site must not spend the same budget."""
        make_folder(self._path.parent)
        descriptor = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except ImportError:  # Windows
                pass
            yield
        finally:
            os.close(descriptor)
