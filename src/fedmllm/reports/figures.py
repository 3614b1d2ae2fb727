"""Figures of one data set's results, drawn by matplotlib."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedmllm.reports.answers import Group
from fedmllm.reports.names import metric_label
from fedmllm.reports.numerals import Scale, counted
from fedmllm.reports.reading import BySeed, DatasetResults, Draw, RunRecord
from fedmllm.reports.rows import RowResults
from fedmllm.reports.sent import BEFORE_TRAINING, sent_bytes
from fedmllm.reports.stats import Spread
from fedmllm.reports.svg import BASELINES, SERIES, SHOWS, STYLE, TEXT_COLOR, inline
from fedmllm.reports.tables import ResultTable
from fedmllm.runs.slices import BY_SHOWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_DRAWN = 10  # methods in one figure
WIDTH, HEIGHT = 3.7, 2.7  # inches: small enough for a phone, put side by side on a desk
MARKERS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "*": "★", "<": "◀", ">": "▶"}


@dataclass(frozen=True)
class Look:
    """Color and mark of a method, the same in every figure."""

    colour: str
    marker: str
    line: str

    @property
    def sign(self) -> str:
        """The marker as a character, for the legend."""
        return MARKERS.get(self.marker, {"x": "×", "_": "–"}.get(self.marker, "+"))


@dataclass(frozen=True)
class PageFigure:
    """A figure for the page."""

    title: str
    svg: str


def looks(dataset: DatasetResults) -> dict[str, Look]:
    """Candidates get colours in order; baselines, controls and bounds are grey."""
    found: dict[str, Look] = {}
    coloured = greys = 0
    for method in dataset.methods:
        if method in dataset.candidates:
            line = ("-", "-.")[coloured // len(SERIES) % 2]  # beyond ten methods the colours come again
            found[method] = Look(SERIES[coloured % len(SERIES)], list(MARKERS)[coloured % len(MARKERS)], line)
            coloured += 1
        else:
            line = ("--", ":", "-.")[greys % 3]
            found[method] = Look(BASELINES[greys % len(BASELINES)], ("_", "x", "+")[greys % 3], line)
            greys += 1
    return found


def draw_figure(
    title: str, description: str, key: str, paint: Callable[[Axes], None], size: tuple[float, float] = (WIDTH, HEIGHT)
) -> PageFigure:
    """A figure with one pair of axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        left, bottom, top, right = 0.62, 0.5, 0.08, 0.06  # inches; matplotlib's layout engines draw everything twice
        width, height = size
        figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
        paint(figure.add_subplot())
        return PageFigure(title, inline(figure, title, description, key))


def overview(chart: Sequence[Group], table: ResultTable, key: str) -> PageFigure | None:
    """The chart of the first screen: a 95 % interval over seeds for each group, seeds as dots, baselines as lines.

    None for fewer than two groups.
    """
    if len(chart) < 2:
        return None
    scale = table.scale
    means = [mean for group in chart for mean in [*map(_mean, group.baselines.values()), *group.federated.values()]]
    ends = [scale.clip(g.spread.mean + sign * (g.spread.half or 0)) for g in chart for sign in (-1, 1)]
    floor, top = _range([Spread(mean, None, 1) for mean in (*means, *ends)], scale)

    def paint(axes: Axes) -> None:
        baselines = list(dict.fromkeys(m for group in chart for m in group.baselines))
        for i, method in enumerate(baselines):
            line = ("--", ":", "-.")[i % 3]
            points = [(x, _mean(group.baselines[method])) for x, group in enumerate(chart) if method in group.baselines]
            for x, mean in points:
                axes.plot([x - 0.38, x + 0.38], [scale.factor * mean] * 2, line, color=BASELINES[i % len(BASELINES)])
            x, mean = points[0]
            others = [_mean(chart[x].baselines[m]) for m in baselines if m != method and m in chart[x].baselines]
            above = all(mean >= other for other in others)
            axes.annotate(
                method, (x - 0.38, scale.factor * mean), (0, 3 if above else -3), textcoords="offset points", ha="left",
                va="bottom" if above else "top", color=BASELINES[i % len(BASELINES)], fontsize=9,
            )  # fmt: skip
        for x, group in enumerate(chart):
            spread, values = group.spread, list(group.federated.values())
            if spread.half is not None:
                ends = [scale.factor * scale.clip(spread.mean + sign * spread.half) for sign in (-1, 1)]
                axes.plot([x, x], ends, "-", color=SERIES[0], linewidth=7, alpha=0.28, solid_capstyle="butt")
            dots = [x + 0.14 + 0.03 * (i - len(values) / 2) for i in range(len(values))]
            axes.plot(dots, [scale.factor * v for v in values], "o", color=SERIES[0], markersize=3.5, alpha=0.6)
            axes.plot([x], [scale.factor * spread.mean], "D", color=SERIES[0], markersize=7)
            axes.annotate(
                scale.number(spread.mean), (x - 0.09, scale.factor * spread.mean), ha="right", va="center", fontsize=11,
                fontweight="bold", color=TEXT_COLOR,
            )  # fmt: skip
        axes.set_xticks(range(len(chart)), [_two_lines(group.name) for group in chart], fontsize=9.5)
        axes.tick_params(axis="x", labelcolor=TEXT_COLOR, length=0)
        axes.set_xlim(-0.55, len(chart) - 0.45)
        axes.set_ylim(floor, top)
        axes.set_ylabel(_axis(table.metric, scale))
        axes.grid(visible=False, axis="x")

    words = "; ".join(
        f"{g.name}: {scale.spread(g.spread.mean, g.spread.std)}"
        + "".join(f", {m} {scale.number(_mean(seeds))}" for m, seeds in g.baselines.items())
        for g in chart
    )
    title = f"{metric_label(table.metric)} by missing data"
    return draw_figure(title, f"Means of the federated methods over seeds. {words}", key, paint, (5.6, 3.7))


def rows_overview(rows: RowResults, key: str) -> PageFigure | None:
    """The chart of the first screen for data with gaps: the result on test rows by what they have.

    A 95 % interval over rows for the mean of the federated methods, baselines as lines; of the baselines alone if there is
    no federated method. None without two groups that define the metric.
    """
    scale, groups = rows.scale, [rows.whole, *rows.by(BY_SHOWS)]
    baselines = [m for m in rows.methods if m not in rows.federated]
    points = [(g, g.federated or next(iter(g.cells.values()))) for g in groups]
    points = [(g, e) for g, e in points if e.value is not None]
    if len(points) < 3:  # all rows, and two groups
        return None
    values = [
        v for g, e in points for v in (e.value, e.low, e.high, *(c.value for c in g.cells.values())) if v is not None
    ]
    floor, top = _range([Spread(v, None, 1) for v in values], scale)

    def paint(axes: Axes) -> None:
        for i, method in enumerate(baselines):
            line, colour = ("--", ":", "-.")[i % 3], BASELINES[i % len(BASELINES)]
            at = [(x, g.cells[method].value) for x, (g, _) in enumerate(points) if method in g.cells]
            for x, value in at:
                if value is not None:
                    axes.plot([x - 0.38, x + 0.38], [scale.factor * value] * 2, line, color=colour)
            if at and at[0][1] is not None:
                axes.annotate(
                    method, (-0.38, scale.factor * at[0][1]), (0, 3), textcoords="offset points", ha="left", va="bottom",
                    color=colour, fontsize=9,
                )  # fmt: skip
        for x, (_, e) in enumerate(points):
            assert e.value is not None
            if e.low is not None and e.high is not None:
                ends = [scale.factor * e.low, scale.factor * e.high]
                axes.plot([x, x], ends, "-", color=SERIES[0], linewidth=7, alpha=0.28, solid_capstyle="butt")
            axes.plot([x], [scale.factor * e.value], "D", color=SERIES[0], markersize=7)
            axes.annotate(
                scale.number(e.value), (x + 0.09, scale.factor * e.value), ha="left", va="center", fontsize=11,
                fontweight="bold", color=TEXT_COLOR,
            )  # fmt: skip
        names = [f"{_two_lines(g.name)}\n{counted(g.num_rows, 'row')}" for g, _ in points]
        axes.set_xticks(range(len(points)), names, fontsize=9.5)
        axes.tick_params(axis="x", labelcolor=TEXT_COLOR, length=0)
        axes.set_xlim(-0.55, len(points) - 0.45)
        axes.set_ylim(floor, top)
        axes.set_ylabel(_axis(rows.metric, scale))
        axes.grid(visible=False, axis="x")

    words = "; ".join(f"{g.name} ({g.num_rows} rows): {scale.number(e.value or 0)}" for g, e in points)
    title = f"{metric_label(rows.metric)} by what a test row has"
    return draw_figure(title, f"Mean of the federated methods. {words}", key, paint, (5.6, 3.7))


def _two_lines(words: str) -> str:
    """Broken at the blank nearest to the middle."""
    blanks = [i for i, c in enumerate(words) if c == " "]
    middle = min(blanks, key=lambda i: abs(i - len(words) / 2), default=-1)
    return words if middle < 0 or len(words) < 14 else f"{words[:middle]}\n{words[middle + 1 :]}"


def _axis(metric: str, scale: Scale) -> str:
    return f"{metric_label(metric)} ({scale.unit})" if scale.unit else metric_label(metric)


def panels(dataset: DatasetResults, table: ResultTable, style: Mapping[str, Look], key: str) -> list[PageFigure]:
    """One picture a scenario: federated methods with their 95 % intervals, seeds as dots, baselines as lines."""
    values, scale = dataset.values(table.metric, ""), table.scale
    floor, top = _range([Spread(v, None, 1) for seeds in values.values() for v in seeds.values()], scale)
    federated = [method for method in table.methods if method in dataset.candidates]
    found = []
    for scenario in dict.fromkeys(row.scenario for row in table.rows):
        rows = [row for row in table.rows if row.scenario == scenario]

        def paint(axes: Axes, rows: list[Any] = rows) -> None:
            width = 0.8 / max(1, len(federated))
            for method in table.methods:
                look, place = style[method], federated.index(method) if method in federated else -1
                for x, row in enumerate(rows):
                    if method not in row.cells:
                        continue
                    spread = row.cells[method].spread
                    mean = scale.factor * spread.mean
                    if place < 0:
                        axes.plot([x - 0.45, x + 0.45], [mean] * 2, look.line, color=look.colour, linewidth=1.3)
                        continue
                    at = x + (place - (len(federated) - 1) / 2) * width
                    if spread.half is not None:
                        ends = [scale.factor * scale.clip(spread.mean + sign * spread.half) for sign in (-1, 1)]
                        axes.plot([at, at], ends, "-", color=look.colour, linewidth=1.2, alpha=0.5)
                    own = [scale.factor * v for v in values.get((row.setting, method), {}).values()]
                    axes.plot([at + 0.25 * width] * len(own), own, ".", color=look.colour, markersize=3, alpha=0.7)
                    axes.plot([at], [mean], look.marker, color=look.colour)
            axes.set_xticks(range(len(rows)), [row.setting for row in rows])
            axes.set_xlim(-0.5, len(rows) - 0.5)
            axes.set_ylim(floor, top)
            axes.grid(visible=False, axis="x")
            axes.set_ylabel(_axis(table.metric, scale))

        words = "; ".join(
            f"{row.setting}: " + _text(scale, {m: c.spread for m, c in row.cells.items()}) for row in rows
        )
        found.append(
            draw_figure(
                scenario,
                f"Means and standard deviations over seeds. {words}",
                f"{key}-{scenario.replace(' ', '-')}",
                paint,
            )
        )
    return found


def curves(dataset: DatasetResults, table: ResultTable, style: Mapping[str, Look], key: str) -> list[PageFigure]:
    """One picture a setting: the metric of the global adapter over the rounds; bands are one standard deviation."""
    found, points_of, scale = [], values_by_round(dataset), table.scale
    everything = [Spread(value, None, 1) for points in points_of.values() for _, value in points]
    floor, top = _range(everything, scale)
    for number, setting in enumerate(dataset.settings):
        lines: dict[str, dict[int, Spread]] = {}
        for method in dataset.methods:
            by_round: dict[int, list[float]] = {}
            for run in dataset.pick(setting, method):
                for round_, value in points_of.get(id(run), []):
                    by_round.setdefault(round_, []).append(value)
            if len(by_round) > 1:
                lines[method] = {round_: Spread.of(by_round[round_]) for round_ in sorted(by_round)}
        if not lines:
            continue

        def paint(axes: Axes, lines: Mapping[str, Mapping[int, Spread]] = lines) -> None:
            for method, points in lines.items():
                _line(axes, style[method], list(points), list(points.values()), scale)
            axes.set_xlabel("round")
            axes.set_ylim(floor, top)
            axes.set_ylabel(_axis(table.metric, scale))

        last = {method: list(points.values())[-1] for method, points in lines.items()}
        words = f"{metric_label(table.metric)} over rounds; after the last: {_text(scale, last)}"
        found.append(draw_figure(setting, words, f"{key}-{number}", paint, (WIDTH, 2.3)))
    return found


def values_by_round(dataset: DatasetResults) -> dict[int, list[tuple[int, float]]]:
    """id(run) -> (round, value) of the global adapter, main metric only; round 0 is the zero-shot run of the same draw."""
    metric, visible = dataset.metric, dataset.visible
    start = {_start(r): r.value(metric, visible) for r in dataset.runs if r.settings["method"] == "zero-shot"}
    found: dict[int, list[tuple[int, float]]] = {}
    for run in dataset.runs:
        if run.federated:
            evals = [e for e in run.evals if e["visible"] == visible and "round" in e]
            points = [(0, start.get(_start(run))), *((e["round"], e["metrics"].get(metric)) for e in evals)]
            found[id(run)] = [(round_, value) for round_, value in points if value is not None]
    return found


def _start(run: RunRecord) -> tuple[str, Draw, str]:
    return run.setting, run.draw, run.settings["prompt"]["name"]


def against_cost(dataset: DatasetResults, table: ResultTable, style: Mapping[str, Look], key: str) -> list[PageFigure]:
    """The metric, averaged over settings and seeds, against megabytes sent and against seconds of rounds."""
    kinds: dict[str, tuple[str, Callable[[Mapping[str, Any]], float], Callable[[Mapping[str, Any]], float]]] = {
        # label, cost of a round, cost before the rounds by a row of the summary
        "bytes": (
            "MB sent, up and down",
            lambda e: sent_bytes(e) / 1e6,
            lambda r: sent_bytes(r, BEFORE_TRAINING) / 1e6,
        ),
        "time": ("seconds of rounds (wall)", lambda e: e["wall_s"], lambda r: float(r.get("completion_s") or 0)),
    }
    found, points_of, scale = [], values_by_round(dataset), table.scale
    for kind, (words, cost, before) in kinds.items():
        drawn = {m: _cost_line(dataset.pick(method=m), points_of, cost, before) for m in dataset.methods}
        lines = {m: line for m, line in drawn.items() if line}
        if not lines:
            continue

        def paint(axes: Axes, lines: Mapping[str, Any] = lines, words: str = words) -> None:
            for method, (x, spreads) in lines.items():
                _line(axes, style[method], x, spreads, scale, marker=True)
            axes.set_xlabel(words)
            axes.set_ylabel(f"{_axis(table.metric, scale)}, all settings")
            axes.set_xlim(left=0)

        text = "; ".join(f"{m} {scale.value(s[-1].mean)} after {x[-1]:.1f}" for m, (x, s) in lines.items())
        found.append(draw_figure(f"Against {words}", f"{words}: {text}", f"{key}-{kind}", paint))
    return found


def _cost_line(
    runs: Sequence[RunRecord],
    points_of: Mapping[int, list[tuple[int, float]]],
    cost: Callable[[Mapping[str, Any]], float],
    before: Callable[[Mapping[str, Any]], float],
) -> tuple[list[float], list[Spread]] | None:
    """(mean cost so far, mean value) after each round that all runs were evaluated in."""
    points: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        spent, total = {}, before(run.rows[0])
        for event in run.rounds:
            total += cost(event)
            spent[event["round"]] = total
        for round_, value in points_of.get(id(run), []):
            points.setdefault(round_, []).append((spent.get(round_, 0.0), value))
    most = max(map(len, points.values()), default=0)
    rounds = sorted(round_ for round_, several in points.items() if len(several) == most)
    if not rounds:
        return None
    x = [statistics.fmean(c for c, _ in points[r]) for r in rounds]
    return x, [Spread(statistics.fmean(v for _, v in points[r]), None, most) for r in rounds]


def _line(
    axes: Axes, look: Look, x: Sequence[float], spreads: Sequence[Spread], scale: Scale, marker: bool = False
) -> None:
    means = [scale.factor * s.mean for s in spreads]
    axes.plot(x, means, look.line, color=look.colour, marker=look.marker if marker or len(x) < 9 else "", markersize=4)
    if any(s.std for s in spreads):
        low, high = ([scale.factor * scale.clip(s.mean + sign * (s.std or 0)) for s in spreads] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=look.colour, alpha=0.13, linewidth=0)


def _range(spreads: Sequence[Spread], scale: Scale) -> tuple[float, float]:
    """Ends of an axis: for percents rounded outwards to tens, within 0 to 100."""
    if not spreads:
        return 0.0, 100.0
    low, high = (scale.factor * end(s.mean for s in spreads) for end in (min, max))
    if scale.unit != "%":
        room = 0.08 * (high - low) or 1.0
        return low - room, high + room
    return max(0.0, math.floor(low / 10 - 0.2) * 10.0), min(100.0, math.ceil(high / 10 + 0.1) * 10.0) + 1.0


def _mean(seeds: BySeed) -> float:
    return sum(seeds.values()) / len(seeds)


def _text(scale: Scale, spreads: Mapping[str, Spread]) -> str:
    return ", ".join(f"{method} {scale.spread(s.mean, s.std)}" for method, s in spreads.items())


def kind_of(visible: str, num_modalities: int) -> str:
    """ "image+text" -> "both"; other combinations of more modalities count as "both" if more than one is visible."""
    if visible in SHOWS:
        return visible
    return "both" if "+" in visible or num_modalities == 1 else ("image" if visible != "text" else "text")
