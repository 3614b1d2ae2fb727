"""Figures of one data set's results, drawn by matplotlib."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedmllm.reports.names import metric_label
from fedmllm.reports.reading import DatasetResults, RunRecord
from fedmllm.reports.stats import Spread
from fedmllm.reports.svg import BASELINES, MUTED, SERIES, SHOWS, STYLE, inline
from fedmllm.reports.tables import ResultTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_DRAWN = 10  # methods in one figure
WIDTH, HEIGHT = 3.7, 2.7  # inches: small enough for a phone, put side by side on a desk
MARKERS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "*": "★", "<": "◀", ">": "▶"}


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in every figure."""

    colour: str
    marker: str
    line: str

    @property
    def sign(self) -> str:
        """The marker as a character, for the legend."""
        return MARKERS.get(self.marker, {"x": "×", "_": "–"}.get(self.marker, "+"))


@dataclass(frozen=True)
class Picture:
    """A figure for the page."""

    title: str
    svg: str


def looks(dataset: DatasetResults) -> dict[str, Look]:
    """Federated methods get colours in order; baselines are grey."""
    found: dict[str, Look] = {}
    coloured = greys = 0
    for method in dataset.methods:
        if dataset.pick(method=method)[0].federated:
            line = ("-", "-.")[coloured // len(SERIES) % 2]  # beyond ten methods the colours come again
            found[method] = Look(SERIES[coloured % len(SERIES)], list(MARKERS)[coloured % len(MARKERS)], line)
            coloured += 1
        else:
            line = ("--", ":", "-.")[greys % 3]
            found[method] = Look(BASELINES[greys % len(BASELINES)], ("_", "x", "+")[greys % 3], line)
            greys += 1
    return found


def draw(
    title: str, description: str, key: str, paint: Callable[[Axes], None], size: tuple[float, float] = (WIDTH, HEIGHT),
    polar: bool = False,
) -> Picture:  # fmt: skip
    """A figure with one pair of axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        if polar:
            figure.subplots_adjust(left=0.17, right=0.83, bottom=0.12, top=0.88)
        else:  # margins in inches; matplotlib's layout engines draw everything twice
            left, bottom, top, right = 0.62, 0.44, 0.08, 0.06
            width, height = size
            figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
        paint(figure.add_subplot(projection="polar" if polar else None))
        return Picture(title, inline(figure, title, description, key))


def radar(table: ResultTable, style: Mapping[str, Look], key: str) -> Picture | None:
    """All settings as spokes, one line a method, error bars of one standard deviation; None for fewer than 3 settings."""
    if len(table.rows) < 3:
        return None
    angles = [2 * math.pi * i / len(table.rows) for i in range(len(table.rows))]
    floor, top = _range([cell.spread for row in table.rows for cell in row.cells.values()])

    def paint(axes: Axes) -> None:
        polar: Any = axes
        polar.set_theta_zero_location("N")
        polar.set_theta_direction(-1)
        for method in table.methods:
            points = [
                (a, row.cells[method].spread) for a, row in zip(angles, table.rows, strict=True) if method in row.cells
            ]
            whole = len(points) == len(angles)
            around = [*points, points[0]] if whole else points
            look = style[method]
            polar.plot([a for a, _ in around], [100 * s.mean for _, s in around], look.line, color=look.colour)
            polar.errorbar(
                [a for a, _ in points], [100 * s.mean for _, s in points],
                yerr=[
                    [min(100 * (s.std or 0.0), max(0.0, 100 * s.mean - floor)) for _, s in points],
                    [min(100 * (s.std or 0.0), max(0.0, top - 100 * s.mean)) for _, s in points],
                ],
                fmt=look.marker, color=look.colour, markersize=3.5, elinewidth=1.0,
            )  # fmt: skip
        polar.set_xticks(angles, [row.setting for row in table.rows], color=MUTED)
        polar.tick_params(axis="x", pad=17)
        polar.set_ylim(floor, top)
        rings = range(int(floor) + 10, int(top) + 1, 10)
        words = [f"{ring}" if ring < top - 5 else "" for ring in rings]  # on the rim it would touch the settings' names
        polar.set_yticks(list(rings), words)
        polar.set_rlabel_position(180 / len(table.rows))
        polar.spines["polar"].set_visible(False)

    words = "; ".join(f"{row.setting}: " + _said({m: c.spread for m, c in row.cells.items()}) for row in table.rows)
    title = f"{metric_label(table.metric)} (%) in {len(table.rows)} settings; the centre is {floor:g}, not 0"
    return draw(title, f"Radar. Means over seeds. {words}", key, paint, (4.6, 4.4), polar=True)


def panels(table: ResultTable, style: Mapping[str, Look], key: str) -> list[Picture]:
    """One picture a scenario: its settings side by side, methods as points with error bars."""
    floor, top = _range([cell.spread for row in table.rows for cell in row.cells.values()])
    found = []
    for scenario in dict.fromkeys(row.scenario for row in table.rows):
        rows = [row for row in table.rows if row.scenario == scenario]

        def paint(axes: Axes, rows: list[Any] = rows) -> None:
            width = 0.76 / max(1, len(table.methods))
            for i, method in enumerate(table.methods):
                offset = (i - (len(table.methods) - 1) / 2) * width
                points = [(x + offset, row.cells[method].spread) for x, row in enumerate(rows) if method in row.cells]
                look = style[method]
                axes.errorbar(
                    [x for x, _ in points], [100 * s.mean for _, s in points],
                    yerr=[100 * (s.std or 0.0) for _, s in points],
                    fmt=look.marker, color=look.colour, elinewidth=1.4, capsize=0,
                )  # fmt: skip
            axes.set_xticks(range(len(rows)), [row.setting for row in rows])
            axes.set_xlim(-0.5, len(rows) - 0.5)
            axes.set_ylim(floor, top)
            axes.grid(visible=False, axis="x")
            axes.set_ylabel(f"{metric_label(table.metric)} (%)")

        words = "; ".join(f"{row.setting}: " + _said({m: c.spread for m, c in row.cells.items()}) for row in rows)
        found.append(draw(scenario, f"Means and standard deviations over seeds. {words}", f"{key}-{scenario}", paint))
    return found


def curves(dataset: DatasetResults, style: Mapping[str, Look], key: str) -> list[Picture]:
    """One picture a setting: the metric of the global adapter over the rounds; bands are one standard deviation."""
    found, points_of = [], values_by_round(dataset)
    everything = [Spread(value, None, 1) for points in points_of.values() for _, value in points]
    floor, top = _range(everything) if everything else (0.0, 100.0)
    for number, setting in enumerate(dataset.settings):
        lines: dict[str, dict[int, Spread]] = {}
        for method in dataset.methods:
            by_round: dict[int, list[float]] = {}
            for run in dataset.pick(setting, method):
                for round_, value in points_of.get(run.run_id, []):
                    by_round.setdefault(round_, []).append(value)
            if len(by_round) > 1:
                lines[method] = {round_: Spread.of(by_round[round_]) for round_ in sorted(by_round)}
        if not lines:
            continue

        def paint(axes: Axes, lines: Mapping[str, Mapping[int, Spread]] = lines) -> None:
            for method, points in lines.items():
                _line(axes, style[method], list(points), list(points.values()))
            axes.set_xlabel("round")
            axes.set_ylim(floor, top)
            axes.set_ylabel(f"{metric_label(dataset.metric)} (%)")

        last = {method: list(points.values())[-1] for method, points in lines.items()}
        words = f"{metric_label(dataset.metric)} over rounds; after the last: {_said(last)}"
        found.append(draw(setting, words, f"{key}-{number}", paint, (WIDTH, 2.3)))
    return found


def values_by_round(dataset: DatasetResults) -> dict[str, list[tuple[int, float]]]:
    """Run id -> (round, value) of the global adapter, headline only; round 0 is the zero-shot run of the same seed."""
    metric, visible = dataset.metric, dataset.visible
    start = {_start(r): r.value(metric, visible) for r in dataset.runs if r.settings["method"] == "zero-shot"}
    found: dict[str, list[tuple[int, float]]] = {}
    for run in dataset.runs:
        if run.federated:
            evals = [e for e in run.evals if e["visible"] == visible and "round" in e]
            points = [(0, start.get(_start(run))), *((e["round"], e["metrics"].get(metric)) for e in evals)]
            found[run.run_id] = [(round_, value) for round_, value in points if value is not None]
    return found


def _start(run: RunRecord) -> tuple[str, int, str]:
    return run.setting, run.seed, run.settings["prompt"]["name"]


def against_cost(dataset: DatasetResults, style: Mapping[str, Look], key: str) -> list[Picture]:
    """The metric, averaged over settings and seeds, against megabytes sent and against seconds of client work."""
    kinds: dict[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
        "bytes": ("MB sent, up and down", lambda e: (e["up_bytes"] + e["down_bytes"]) / 1e6),
        "time": ("seconds of rounds (wall)", lambda e: e["wall_s"]),
    }
    found, points_of = [], values_by_round(dataset)
    for kind, (words, cost) in kinds.items():
        lines: dict[str, tuple[list[float], list[Spread]]] = {}
        for method in dataset.methods:
            points: dict[int, list[tuple[float, float]]] = {}
            for run in dataset.pick(method=method):
                spent, total = {}, 0.0
                for event in run.rounds:
                    total += cost(event)
                    spent[event["round"]] = total
                for round_, value in points_of.get(run.run_id, []):
                    points.setdefault(round_, []).append((spent.get(round_, 0.0), value))
            if points:
                rounds = sorted(points)
                x = [statistics.fmean(c for c, _ in points[r]) for r in rounds]
                lines[method] = (
                    x,
                    [Spread(statistics.fmean(v for _, v in points[r]), None, len(points[r])) for r in rounds],
                )
        if not lines:
            continue

        def paint(
            axes: Axes, lines: Mapping[str, tuple[list[float], list[Spread]]] = lines, words: str = words
        ) -> None:
            for method, (x, spreads) in lines.items():
                _line(axes, style[method], x, spreads, marker=True)
            axes.set_xlabel(words)
            axes.set_ylabel(f"{metric_label(dataset.metric)} (%), all settings")
            axes.set_xlim(left=0)

        said = "; ".join(f"{m} {100 * s[-1].mean:.1f} % after {x[-1]:.1f}" for m, (x, s) in lines.items())
        found.append(draw(f"Against {words}", f"{words}: {said}", f"{key}-{kind}", paint))
    return found


def _line(axes: Axes, look: Look, x: Sequence[float], spreads: Sequence[Spread], marker: bool = False) -> None:
    means = [100 * s.mean for s in spreads]
    axes.plot(x, means, look.line, color=look.colour, marker=look.marker if marker or len(x) < 9 else "", markersize=4)
    if any(s.std for s in spreads):
        low = [m - 100 * (s.std or 0) for m, s in zip(means, spreads, strict=True)]
        high = [m + 100 * (s.std or 0) for m, s in zip(means, spreads, strict=True)]
        axes.fill_between(x, low, high, color=look.colour, alpha=0.13, linewidth=0)


def _range(spreads: Sequence[Spread]) -> tuple[float, float]:
    """Percent, rounded outwards to tens, with error bars inside."""
    low = min(s.mean - (s.std or 0) for s in spreads)
    high = max(s.mean + (s.std or 0) for s in spreads)
    return max(0.0, math.floor(10 * low - 0.2) * 10.0), min(100.0, math.ceil(10 * high) * 10.0) + 1.0


def _said(spreads: Mapping[str, Spread]) -> str:
    def one(s: Spread) -> str:
        return f"{100 * s.mean:.1f}" + (f" ± {100 * s.std:.1f}" if s.std is not None else "")

    return ", ".join(f"{method} {one(spread)}" for method, spread in spreads.items())


def kind_of(shows: str, num_modalities: int) -> str:
    """ "image+text" -> "both"; other combinations of more modalities count as "both" if more than one is visible."""
    if shows in SHOWS:
        return shows
    return "both" if "+" in shows or num_modalities == 1 else ("image" if shows != "text" else "text")
