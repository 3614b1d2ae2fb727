"""A site's own account of all requests.

Over all runs, servers and site files of the same rows.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from fedmllm.algorithms.privacy.accounting import gaussian_epsilon
from fedmllm.core.errors import FedmllmError, Reason
from fedmllm.core.storage import make_folder, sync, writing
from fedmllm.flower.site.config import Site

LEDGER = "privacy.jsonl"  # in the site's state folder
LEDGER_MARK = ".fedmllm-ledger"  # in the folder of the rows: which ledger is theirs


@dataclass(frozen=True)
class Entry:
    """One request that was trained.

    Attributes:
        run_id: As the request named its run.
        round: Of the run.
        noise_multiplier: z of each step; 0 = a request without noise, for which no epsilon holds.
        num_visits: Steps that contain one row.
        time: Seconds since 1970.
        unit: What was clipped: "row", or "group 'patient'".
    """

    run_id: str
    round: int
    noise_multiplier: float
    num_visits: int
    time: float
    unit: str = "row"

    @property
    def squared_mu(self) -> float:
        """mu^2 of the entry as a Gaussian mechanism; those of all entries add up."""
        if not self.num_visits:
            return 0.0
        return self.num_visits / self.noise_multiplier**2 if self.noise_multiplier else math.inf


def spent(entries: list[Entry], delta: float) -> float:
    """Epsilon of all entries together.

    Args:
        entries: Of one site's rows.
        delta: At which epsilon is stated.

    Returns:
        Epsilon of one Gaussian mechanism with the summed mu^2: composition of Gaussian mechanisms is exact. Infinity if a
        request had no noise.
    """
    squared = sum(entry.squared_mu for entry in entries)
    if not squared or math.isinf(squared):
        return squared
    return gaussian_epsilon(1 / math.sqrt(squared), 1, delta)


class Ledger:
    """The file of a site's entries. One is written, and on the disk, before its training begins.

    Args:
        path: The file; made by the first entry.
        key: The site's key of noise, which is made after the first entry: if it is there, the file has to be there, too.
        rows: The folder of the rows; None = there is none, or no entry is to be about them.
        part: Which of these rows: (column, value), or ("", "") for all.
    """

    def __init__(
        self, path: Path, key: Path | None = None, rows: Path | None = None, part: tuple[str, str] = ("", "")
    ) -> None:
        self._path, self._key, self._rows, self._part = path.absolute(), key, rows, part
        self._claimed = False

    @classmethod
    def of(cls, site: Site, folder: Path, key: Path) -> Ledger:
        """Return the ledger of a site's rows.

        Args:
            site: Its own file.
            folder: Of its state.
            key: Of its noise.
        """
        root = getattr(site.data, "root", None) or next(iter(site.data.folders()), None)
        return cls(site.ledger or folder / LEDGER, key, root and Path(root), (site.column, site.value))

    def entries(self, since: date | None = None) -> list[Entry]:
        """All entries.

        Args:
            since: The first day of those that are read; None = from the beginning.

        Returns:
            In the order in which they were written.

        Raises:
            FedmllmError: The file is damaged, or lost: what has been spent is then unknown.
        """
        if self._key and self._key.exists() and not self._path.exists():
            raise self._lost(f"{self._key} was used")
        try:
            lines = self._path.read_bytes().splitlines() if self._path.exists() else []
            entries = [Entry(**json.loads(line)) for line in lines]
            if any(not (e.noise_multiplier >= 0 and e.num_visits >= 0) for e in entries):
                raise ValueError("a number is negative")
        except (OSError, ValueError, TypeError) as error:
            raise FedmllmError(f"{self._path}: cannot be read ({type(error).__name__}: {error})") from None
        first = time.mktime(since.timetuple()) if since else -math.inf
        return [entry for entry in entries if entry.time >= first]

    def claim(self) -> None:
        """Mark the folder of the rows with this ledger, so that no other site file counts the same rows in another one.

        Raises:
            FedmllmError: The rows have another ledger, this one is lost, or the folder cannot be marked.
        """
        if self._claimed or self._rows is None:
            return
        self._refuse_other()  # before anything is written there; once more under the lock
        mark = self._rows / LEDGER_MARK
        try:
            with self._locked(mark):
                self._refuse_other()
                marks = _read_marks(mark)
                own = {"column": self._part[0], "value": self._part[1], "ledger": str(self._path.resolve())}
                if own in marks:
                    if not self._path.exists():
                        raise self._lost(f"{mark} names it")
                else:
                    make_folder(self._path.parent)
                    self._path.touch()
                    sync(self._path)
                    mark.write_text(json.dumps([*marks, own], indent=1) + "\n", encoding="utf-8")
                    sync(mark)
        except OSError as error:
            raise FedmllmError(
                f"{mark}: cannot be written ({error.strerror}), so another site file over these rows would not be noticed. Let "
                "the site write there once: the file names the ledger of the rows"
            ) from None
        self._claimed = True

    def _refuse_other(self) -> None:
        """Raise FedmllmError if the folder of the rows, or one above or below it, has another ledger for some of them."""
        for mark in _marks_near(self._rows) if self._rows else ():
            for known in _read_marks(mark):
                part, ledger = (known["column"], known["value"]), Path(known["ledger"])
                if _overlap(part, self._part) and ledger != self._path.resolve():
                    raise FedmllmError(
                        f"{mark}: these rows have the ledger {ledger}, and this site file {self._path}: two would each "
                        f'allow the whole epsilon. Write ledger = "{ledger}" in the site file, or, if the file was moved, '
                        f"its new place in {mark}"
                    )

    def charge(
        self, entry: Entry, most: float | None, delta: float, since: date | None = None, spend: bool = True
    ) -> Reason:
        """Add an entry, unless epsilon would then pass the limit.

        Args:
            entry: Of the request.
            most: Largest epsilon of all entries together; None = no limit.
            delta: At which epsilon is counted.
            since: The first day of the entries that count; None = all.
            spend: False = only look whether it could be added.

        Returns:
            The reason to refuse; "" = the entry is on the disk, or could be.

        Raises:
            FedmllmError: The file is damaged or lost, or the rows have another one.
        """
        if entry.noise_multiplier or most is not None:
            self.claim()
        else:  # leaves no mark, but must not answer in the clear about rows whose epsilon another ledger counts
            self._refuse_other()
        make_folder(self._path.parent)
        with self._locked(self._path.with_suffix(".lock")):
            entries = self.entries(since)
            units = {e.unit for e in [*entries, entry] if e.noise_multiplier}
            if most is not None and len(units) > 1:
                return Reason(
                    f"privacy.unit: this site's ledger counts epsilon for another unit than {entry.unit}",
                    f"units: {', '.join(sorted(units))}; allow.settings sets the one that is allowed",
                )
            before, after = spent(entries, delta), spent([*entries, entry], delta)
            if most is not None and after > most:
                if math.isinf(before):
                    return Reason(
                        "this site answered requests without noise, so that no allow.max_epsilon holds",
                        "allow.epsilon_since sets the day from which rows are new",
                    )
                numbers = f"{after:.4g} at delta {delta:g}, spent so far {before:.4g}, limit {most:g}"
                return Reason("epsilon would pass allow.max_epsilon", numbers)
            if not spend:
                return Reason("")
            with writing(self._path):
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(entry)) + "\n")
                sync(self._path)
        return Reason("")

    def _lost(self, why: str) -> FedmllmError:
        return FedmllmError(
            f"{self._path}: missing, but {why}: what has been spent is unknown. Put the ledger back; for other rows choose "
            "another SITE.toml"
        )

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Two processes of one site must not spend the same budget."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except ImportError:  # Windows
                pass
            yield
        finally:
            os.close(descriptor)


def _overlap(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Return whether two parts of a folder may have a row in common: only two values of one column have none."""
    return one[0] != other[0] or not one[0] or one[1] == other[1]


def _marks_near(rows: Path) -> list[Path]:
    """The marks of a folder, of those above it and of those below: the same rows can be named from each of them."""
    here = rows.resolve()
    above = [folder / LEDGER_MARK for folder in (here, *here.parents)]
    below = [Path(folder) / LEDGER_MARK for folder, _, files in os.walk(here) if LEDGER_MARK in files]
    return [mark for mark in dict.fromkeys((*above, *below)) if _is_file(mark)]


def _is_file(path: Path) -> bool:
    """Return whether it is a file; False in a folder that may not be read, for which `Path.is_file` raises."""
    try:
        return path.is_file()
    except OSError:
        return False


def _read_marks(path: Path) -> list[dict[str, Any]]:
    try:
        marks = json.loads(path.read_text(encoding="utf-8") or "[]")
        if not all(isinstance(mark[key], str) for mark in marks for key in ("column", "value", "ledger")):
            raise ValueError("a value is not a text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedmllmError(f"{path}: cannot be read ({type(error).__name__}: {error}): it names the ledger") from None
    return list(marks)
