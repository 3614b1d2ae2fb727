"""Importance of each modality for each client, as the clients report it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmllm.core.types import Modality
from fedmllm.reports.numerals import DASH
from fedmllm.reports.reading import DatasetResults, RunRecord
from fedmllm.reports.stats import Spread
from fedmllm.runs.folder import RECORD

IMPORTANCE_KEY = "importance_"  # of the keys in a client's entry of a round
MOST_CLIENTS = 20  # with a row each; more clients share three rows


@dataclass(frozen=True)
class ClientImportance:
    """Mean Shapley values of the modalities in nats, of one setting and method.

    Attributes:
        setting: As in the other tables.
        method: As in the other tables.
        rows: Client -> modality -> value over the seeds; "mean", "lowest" and "highest" of many clients.
        num_clients: Clients that reported values.
        record: Of the first run, with the values of all clients and rounds.
    """

    setting: str
    method: str
    rows: Mapping[str, Mapping[Modality, Spread]]
    num_clients: int
    record: Path

    @property
    def modalities(self) -> list[Modality]:
        return list(next(iter(self.rows.values())))


def client_importances(dataset: DatasetResults) -> list[ClientImportance]:
    """Return one table for each setting and method whose clients measured importance; [] if none did.

    Args:
        dataset: Runs on one data set.
    """
    found = []
    for setting in dataset.settings:
        for method in dataset.methods:
            runs = dataset.pick(setting, method)
            reported: dict[tuple[int, str], dict[Modality, list[float]]] = {}
            measured = {run.folder / RECORD: last for run in runs if (last := _last_values(run))}
            for of_run in measured.values():
                for client, values in of_run.items():
                    for modality, value in values.items():
                        reported.setdefault(client, {}).setdefault(modality, []).append(value)
            if reported:
                rows = {
                    name: {m: Spread.of(values) for m, values in reported[number, name].items()}
                    for number, name in sorted(reported)
                }
                listed = rows if len(rows) <= MOST_CLIENTS else _extremes(list(rows.values()))
                found.append(ClientImportance(setting, method, listed, len(rows), next(iter(measured))))
    return found


def _last_values(run: RunRecord) -> dict[tuple[int, str], dict[Modality, float]]:
    """(client, its name) -> modality -> value in the last round in which the client took part."""
    names = {client["client"]: str(client.get("name", client["client"])) for client in run.clients}
    last: dict[int, dict[Modality, float]] = {}
    for event in run.rounds:
        for entry in event.get("clients") or []:
            known = {k: v for k, v in entry.items() if k.startswith(IMPORTANCE_KEY) and isinstance(v, (int, float))}
            values = {k.removeprefix(IMPORTANCE_KEY): v for k, v in known.items()}
            if values:
                last[entry["client"]] = values
    return {(client, names.get(client, str(client))): values for client, values in last.items()}


def _extremes(rows: Sequence[Mapping[Modality, Spread]]) -> dict[str, dict[Modality, Spread]]:
    """Mean, lowest and highest of the clients' means, for each modality by itself."""
    means = {m: [row[m].mean for row in rows if m in row] for m in rows[0]}
    return {
        "mean": {m: Spread.of(values) for m, values in means.items()},
        "lowest": {m: Spread.of([min(values)]) for m, values in means.items()},
        "highest": {m: Spread.of([max(values)]) for m, values in means.items()},
    }


def about_client_importance(tables: Sequence[ClientImportance]) -> str:
    """The caption of all tables.

    Args:
        tables: Of one data set.
    """
    text = (
        "Mean Shapley value of each modality in nats, on complete rows of the client, in the last round in which it took part; "
        "± is the standard deviation over seeds. A client without complete rows measures nothing."
    )
    if many := [table for table in tables if table.num_clients > len(table.rows)]:
        most = max(table.num_clients for table in many)
        text += (
            f" With up to {most} clients: mean ± standard deviation, lowest and highest over clients. The values of each "
            f"client are in the records, as {IMPORTANCE_KEY}{many[0].modalities[0]} in the clients' entries of rounds: "
            f"{many[0].record}, for one."
        )
    return text


def nats(spread: Spread) -> str:
    """Return "0.123 ± 0.010".

    Args:
        spread: Values in nats.
    """
    text = f"{spread.mean:.3f}" + ("" if spread.std is None else f" ± {spread.std:.3f}")
    return text.replace("-", "\N{MINUS SIGN}")


def client_importance_markdown(tables: Sequence[ClientImportance]) -> str:
    """Return the tables as one in Markdown.

    Args:
        tables: Of one data set, at least one.
    """
    modalities = tables[0].modalities
    lines = [
        "| method | setting | client | " + " | ".join(modalities) + " |",
        "|---|---|---|" + "---:|" * len(modalities),
    ]
    for table in tables:
        for client, values in table.rows.items():
            cells = (nats(values[m]) if m in values else DASH for m in modalities)
            lines.append(f"| {table.method} | {table.setting} | {client} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{about_client_importance(tables)}\n"
