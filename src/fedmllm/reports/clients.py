"""Bars of visible modalities and of labels for each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmllm.reports.figures import WIDTH, PageFigure, draw_figure, kind_of
from fedmllm.reports.names import TWO, VISIBLE
from fedmllm.reports.reading import DatasetResults
from fedmllm.reports.svg import SERIES, SHOWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def who_sees_what(dataset: DatasetResults, key: str) -> list[PageFigure]:
    """One picture a setting, of the first seed: rows of each client by visible modalities; empty if all rows are alike.

    With other modalities than image and text: for each modality the share of each client's rows that show it.
    """
    found = []
    if set(dataset.modalities) - set(TWO):
        for number, setting in enumerate(dataset.settings):
            clients = _clients(dataset, setting)
            shares = {m: [_share(client, m) for client in clients] for m in dataset.modalities}
            if len({share for of_modality in shares.values() for share in of_modality}) > 1:
                found.append(_lanes(setting, shares, clients, f"{key}-sees-{number}"))
        return found
    for number, setting in enumerate(dataset.settings):
        clients = _clients(dataset, setting)
        stacks = {kind: [0] * len(clients) for kind in SHOWS}
        for i, client in enumerate(clients):
            for visible, count in client.get("shows", client.get("visible", {})).items():
                stacks[kind_of(visible, 2)][i] += count
        if sum(any(counts) for counts in stacks.values()) > 1:
            colours = {kind: SHOWS[kind] for kind in stacks}
            names = {kind: VISIBLE[kind] for kind in stacks}
            found.append(_bars(setting, stacks, colours, names, clients, f"{key}-sees-{number}"))
    return found


def _share(client: Mapping[str, Any], modality: str) -> float:
    shows: Mapping[str, int] = client.get("shows", client.get("visible", {}))
    total = sum(shows.values())
    return sum(n for names, n in shows.items() if modality in names.split("+")) / total if total else 0.0


def _lanes(
    title: str, shares: Mapping[str, Sequence[float]], clients: Sequence[Mapping[str, Any]], key: str
) -> PageFigure:
    """A lane of bars for each modality, the first one on top."""
    sites = [str(client.get("name", client["client"])) for client in clients]

    def paint(axes: Axes) -> None:
        for lane, (modality, of_client) in enumerate(reversed(list(shares.items()))):
            axes.bar(
                range(len(sites)), [0.86 * s for s in of_client], bottom=lane, color=SERIES[0], width=0.78, linewidth=0
            )
            axes.annotate(
                modality, (-0.5, lane + 0.43), (-4, 0), textcoords="offset points", ha="right", va="center", fontsize=8
            )
        axes.set_yticks(range(len(shares) + 1), [""] * (len(shares) + 1))
        axes.set_xlim(-0.5, len(sites) - 0.5)
        axes.set_ylim(0, len(shares))
        axes.set_xlabel("site")
        axes.grid(visible=False, axis="x")

    words = "; ".join(f"{m}: {', '.join(f'{s:.0%}' for s in of_client)}" for m, of_client in shares.items())
    return draw_figure(
        title,
        f"Share of rows of sites {', '.join(sites)} that show {words}",
        key,
        paint,
        (WIDTH, 1 + 0.3 * len(shares)),
    )


def label_skew(dataset: DatasetResults, key: str) -> list[PageFigure]:
    """One picture for each way in which the rows were split, of the first seed: rows of each client by label."""
    found, seen = [], set()
    for number, setting in enumerate(dataset.settings):
        clients = _clients(dataset, setting)
        digest = str([client["labels"] for client in clients])
        if not clients or digest in seen:
            continue
        seen.add(digest)
        labels = sorted({label for client in clients for label in client["labels"]})
        stacks = {label: [client["labels"].get(label, 0) for client in clients] for label in labels}
        colours = {label: SERIES[i % len(SERIES)] for i, label in enumerate(labels)}
        same = [s for s in dataset.settings if str([c["labels"] for c in _clients(dataset, s)]) == digest]
        title = setting if len(same) == 1 else f"{setting} and {len(same) - 1} more settings"
        found.append(
            _bars(title, stacks, colours, {label: label for label in labels}, clients, f"{key}-labels-{number}")
        )
    return found


def labels_of(dataset: DatasetResults) -> dict[str, str]:
    """Label -> the colour it has in `label_skew`."""
    labels = sorted({label for s in dataset.settings for client in _clients(dataset, s) for label in client["labels"]})
    return {label: SERIES[i % len(SERIES)] for i, label in enumerate(labels)}


def _clients(dataset: DatasetResults, setting: str) -> list[Mapping[str, Any]]:
    first = min((run for run in dataset.pick(setting) if run.clients), key=lambda run: run.seed, default=None)
    return first.clients if first else []


def _bars(
    title: str,
    stacks: Mapping[str, Sequence[int]],
    colours: Mapping[str, str],
    names: Mapping[str, str],
    clients: Sequence[Mapping[str, Any]],
    key: str,
) -> PageFigure:
    sites = [str(client.get("name", client["client"])) for client in clients]

    def paint(axes: Axes) -> None:
        below = [0] * len(sites)
        for kind, counts in stacks.items():
            if any(counts):
                axes.bar(range(len(sites)), counts, bottom=below, color=colours[kind], width=0.78, linewidth=0)
            below = [b + c for b, c in zip(below, counts, strict=True)]
        if len(sites) <= 20:
            long = max(map(len, sites), default=0) > 3
            axes.set_xticks(range(len(sites)), [site[:8] for site in sites], rotation=40 if long else 0)
        axes.set_xlabel("site")
        axes.set_ylabel("rows")
        axes.grid(visible=False, axis="x")

    words = "; ".join(f"{names[kind]}: {', '.join(map(str, counts))}" for kind, counts in stacks.items() if any(counts))
    return draw_figure(title, f"Rows of sites {', '.join(sites)}. {words}", key, paint, (WIDTH, 2.0))
