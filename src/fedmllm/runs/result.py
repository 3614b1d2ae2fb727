"""Result of a run: rows, adapter and history."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from fedmllm.core.errors import FedmllmError
from fedmllm.core.metrics import METRICS
from fedmllm.runs.folder import RECORD, SUMMARY, RunFolder
from fedmllm.runs.predictions import Evaluation, final_evaluations, groups_of
from fedmllm.runs.record import read
from fedmllm.runs.row_statistics import Calibration, Confusion, calibration, confusion, estimate_rows
from fedmllm.runs.slices import slices

if TYPE_CHECKING:
    import pandas

    from fedmllm.core.types import Params

COLUMNS = (
    "metric",
    "visible",
    "value",
    "std",
    "n",
    "scenario",
    "setting",
    "method",
    "prompt",
    "seed",
)  # of `_repr_html_`


@dataclass(frozen=True)
class Adapter:
    """A trained adapter as a PEFT folder.

    Attributes:
        path: The folder, which `PeftModel.from_pretrained` loads.
    """

    path: Path

    @cached_property
    def tensors(self) -> Params:
        """LoRA tensors under the names in which PEFT saves them, on the CPU."""
        from safetensors.torch import load_file

        tensors: Params = load_file(self.path / "adapter_model.safetensors")
        return tensors


@dataclass(frozen=True)
class History:
    """History of a run by round, as two tables.

    Attributes:
        rounds: One row per round: round, cohort size, mean loss and norm, bytes, seconds; and one column
            "METRIC/VISIBLE" per value that was evaluated after the round.
        clients: One row per round and client that was averaged: round, client, num_examples, norm, loss, ...; and
            `name`, if the rows name their sites.
    """

    rounds: tuple[dict[str, Any], ...]
    clients: tuple[dict[str, Any], ...]

    def to_frame(self, table: str = "rounds") -> pandas.DataFrame:
        """Return a table as a pandas data frame.

        Args:
            table: "rounds" or "clients".

        Raises:
            FedmllmError: pandas is not installed, or there is no such table.
        """
        if table not in ("rounds", "clients"):
            raise FedmllmError(f"table: got {table!r}; allowed: rounds, clients")
        return frame(self.rounds if table == "rounds" else self.clients)


@dataclass(frozen=True, eq=False)
class RunResult(Sequence[dict[str, Any]]):
    """The result of a finished run; as a sequence, the rows of its summary.

    Attributes:
        folder: The run's folder.
        rows: One row per metric and set of visible modalities: metric, value, visible, costs, settings.
    """

    folder: Path
    rows: tuple[dict[str, Any], ...] = field(repr=False)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Sequence[dict[str, Any]]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return list(self.rows) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def run_id(self) -> str:
        """The identity of the run's settings."""
        return str(self.rows[0]["run_id"])

    @property
    def adapter(self) -> Adapter | None:
        """The resulting adapter; None if the method trains none, such as "zero-shot", or one per client ("local")."""
        path = RunFolder(self.folder).adapter()
        return Adapter(path) if path.is_dir() else None

    @property
    def client_adapters(self) -> Mapping[int, Adapter]:
        """Client -> its adapter, for method "local"."""
        return {client: Adapter(path) for client, path in RunFolder(self.folder).client_adapters().items()}

    @cached_property
    def history(self) -> History:
        """Rounds and clients, read from the record.

        Raises:
            FedmllmError: The record is missing or damaged.
        """
        return read_history(RunFolder(self.folder).record)

    @cached_property
    def guarantee(self) -> Mapping[str, Any] | None:
        """Guarantee of the run's privacy mechanism, with everything that a claim has to name; None without privacy.

        Raises:
            FedmllmError: The record is missing or damaged.
        """
        lines = [line for line in read(RunFolder(self.folder).record) if line["event"] == "guarantee"]
        return dict(lines[-1]["guarantee"]) if lines else None

    def value(self, metric: str | None = None, visible: str | None = None) -> float | None:
        """Return one value of the summary.

        Args:
            metric: By default the first metric.
            visible: Modalities that the test rows keep; by default the first of the run.

        Returns:
            The value; None if the test rows do not define the metric.

        Raises:
            FedmllmError: The summary has no such row.
        """
        for row in self.rows:
            if metric in (None, row["metric"]) and visible in (None, row["visible"]):
                value: float | None = row["value"]
                return value
        there = ", ".join(dict.fromkeys(f"{row['metric']} ({row['visible']})" for row in self.rows))
        raise FedmllmError(f"{self.folder}: no value of {metric!r} with {visible!r} visible; there are: {there}")

    def evaluations(self, visible: str = "") -> list[Evaluation]:
        """Return the predictions of the result on the test rows.

        Args:
            visible: Modalities that the test rows keep; by default the first of the run.

        Returns:
            One evaluation, or one per client for a method whose clients have adapters of their own.

        Raises:
            FedmllmError: The run kept no predictions, or none with these modalities.
        """
        path = RunFolder(self.folder).predictions
        found = final_evaluations(path, visible or str(self.rows[0]["visible"])) if path.exists() else []
        if not found:
            there = dict.fromkeys(str(row["visible"]) for row in self.rows)
            reason = (
                f"none with {visible!r} visible; there are: {', '.join(there)}" if path.exists() else "no such file"
            )
            raise FedmllmError(f"{path}: {reason}")
        return found

    def rows_by(self, by: str, metric: str | None = None, visible: str = "", group: str = "") -> list[dict[str, Any]]:
        """Return a metric on groups of test rows.

        Args:
            by: "shows" (what the model received of a row), "site", or a column that the rows keep (`data.columns.keep`).
            metric: Its name; by default the first of the summary.
            visible: Modalities that the test rows keep; by default the first of the run.
            group: Column of rows that belong together, such as the patient, for the intervals.

        Returns:
            One dictionary per group, after one for all rows: by, name, num_rows, metric, value, and the 95 % interval over
            rows, low and high. The interval is None for fewer than five rows.

        Raises:
            ConfigError: No test row has the column.
            FedmllmError: The run kept no predictions, or there is no such metric.
        """
        name, found = metric or str(self.rows[0]["metric"]), self.evaluations(visible)
        if name not in METRICS:
            raise FedmllmError(f"metric: got {name!r}; allowed: {', '.join(sorted(METRICS))}")
        parts = {"all rows": list(range(len(found[0].predictions))), **slices(found[0], by)}
        rows = []
        for part, places in parts.items():
            chosen = [[one.predictions[i] for i in places] for one in found]
            e = estimate_rows(name, chosen, groups_of(chosen[0], group))
            values = {"num_rows": e.num_rows, "metric": name, "value": e.value, "low": e.low, "high": e.high}
            rows.append({"by": by, "name": part, **values})
        return rows

    def calibration(self, visible: str = "") -> Calibration | None:
        """Return the calibration of the closed questions, over all clients' adapters if there are several.

        Args:
            visible: Modalities that the test rows keep; by default the first of the run.

        Returns:
            Expected calibration error and its bins; None without closed questions.

        Raises:
            FedmllmError: The run kept no predictions.
        """
        return calibration([p for one in self.evaluations(visible) for p in one.predictions])

    def confusion(self, visible: str = "") -> Confusion | None:
        """Return truth against answer of the closed questions, over all clients' adapters if there are several.

        Args:
            visible: Modalities that the test rows keep; by default the first of the run.

        Returns:
            Labels and counts; None without closed questions.

        Raises:
            FedmllmError: The run kept no predictions.
        """
        return confusion([p for one in self.evaluations(visible) for p in one.predictions])

    def to_frame(self) -> pandas.DataFrame:
        """Return the rows as a pandas data frame.

        Returns:
            One row per metric and visibility, with the columns of `rows`.

        Raises:
            FedmllmError: pandas is not installed.
        """
        return frame(self.rows)

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        head = "".join(f"<th>{name}</th>" for name in COLUMNS)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell_text(row.get(name)))}</td>' for name in COLUMNS)}</tr>"
            for row in self.rows
        )
        caption = html.escape(str(self.folder))
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def load_run(folder: str | Path) -> RunResult:
    """Read the result of a finished run.

    Args:
        folder: The run's folder.

    Returns:
        What `run` returned.

    Raises:
        FedmllmError: The folder is not there, is not that of a run, or holds a run that is not finished.
    """
    place = RunFolder(Path(folder))
    if not place.path.is_dir():
        raise FedmllmError(f"{place.path}: no such folder; give the folder of a finished run")
    if not place.record.is_file():
        inner = sorted(path.parent.name for path in place.path.glob(f"*/{RECORD}"))
        advice = f"; runs in it: {', '.join(inner[:5])}{', ...' if len(inner) > 5 else ''}" if inner else ""
        raise FedmllmError(f"{place.path}: not the folder of a run: it has no {RECORD}{advice}")
    if not place.is_finished:
        raise FedmllmError(f"{place.path}: the run is not finished: it has no {SUMMARY}; continue it with --resume")
    return RunResult(place.path, tuple(place.read_rows()))


def read_history(record: Path) -> History:
    """Return the rounds and clients of a record as two tables.

    Raises:
        FedmllmError: The record is missing or damaged.
    """
    rounds: list[dict[str, Any]] = []
    clients: list[dict[str, Any]] = []
    places: dict[tuple[int | None, int | None], dict[str, Any]] = {}  # (client, round); round None = the last one
    for line in read(record):
        try:
            owner = {key: line[key] for key in ("client", "name") if line.get(key) is not None}
            if line["event"] == "round":
                row = {"round": line["round"], **owner, **round_columns(line)}
                places[line.get("client"), line["round"]] = places[line.get("client"), None] = row
                rounds.append(row)
                clients += [{"round": line["round"], **entry} for entry in line["clients"]]
            elif (
                line["event"] == "eval"
                and not line.get("node")
                and (place := (line.get("client"), line.get("round"))) in places
            ):
                values = line["metrics"].items()
                places[place] |= {f"{name}/{line['visible']}": value for name, value in values}
        except (KeyError, TypeError, AttributeError) as error:
            raise FedmllmError(f"{record}: an event of kind {line['event']!r} lacks {error}") from None
    return History(tuple(rounds), tuple(clients))


def round_columns(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a round: means over its clients, counts and costs."""
    entries = line["clients"]
    known = {key: [entry[key] for entry in entries if key in entry] for key in ("loss", "norm")}
    means = {key: sum(values) / len(values) if values else None for key, values in known.items()}
    counts = {
        "num_clients": len(line["cohort"]),
        "num_averaged": sum(len(entry.get("clients") or (0,)) for entry in entries),
        "num_dropped": len(line["dropped"]),
        "num_dropped_out": len(line.get("dropped_out") or ()),
    }
    costs = ("lr", "up_bytes", "down_bytes", "server_s", "wall_s")
    return {**counts, **means, **{key: line[key] for key in costs if key in line}}


def frame(rows: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """Return a table as a pandas data frame. Raises FedmllmError if pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise FedmllmError("to_frame: pandas is not installed; pip install pandas, or use .rows") from None
    return pandas.DataFrame(list(rows))


def cell_text(value: Any) -> str:
    """Return a value as the text of a table's cell."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
