"""One self-contained HTML page: no network, light and dark, phone and desk."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedmllm.display import bytes_text
from fedmllm.report.clients import label_skew, labels_of, who_sees_what
from fedmllm.report.figures import Look, Picture, against_cost, curves, looks, panels, radar
from fedmllm.report.findings import Finding, findings, p_text
from fedmllm.report.names import SCENARIOS, SHOWN, metric_label
from fedmllm.report.reading import Book, Chapter
from fedmllm.report.stats import Versus, all_pairs
from fedmllm.report.svg import SHOWS, variable
from fedmllm.report.tables import CostRow, Matrix, Results, costs, matrices, results
from fedmllm.report.texts import spread_text


@dataclass(frozen=True)
class Section:
    """Everything that the page shows of one chapter."""

    chapter: Chapter
    table: Results
    others: tuple[Results, ...]  # further metrics
    findings: list[Finding]
    looks: dict[str, Look]
    radar: Picture | None
    panels: list[Picture]
    curves: list[Picture]
    against_cost: list[Picture]
    sees: list[Picture]
    labels: list[Picture]
    label_colours: dict[str, str]
    matrices: list[Matrix]
    pairs: list[Versus]
    costs: list[CostRow]


def section(chapter: Chapter, key: str) -> Section:
    """Tables and figures of a chapter; `key` keeps its ids apart from other chapters'."""
    table, style = results(chapter), looks(chapter)
    metrics = [row["metric"] for row in chapter.runs[0].rows if row["metric"] not in (table.metric, "unparsed")]
    return Section(
        chapter=chapter,
        table=table,
        others=tuple(results(chapter, metric) for metric in dict.fromkeys(metrics)),
        findings=findings(chapter, table),
        looks=style,
        radar=radar(table, style, f"{key}-radar"),
        panels=panels(table, style, f"{key}-panel"),
        curves=curves(chapter, style, f"{key}-curve"),
        against_cost=against_cost(chapter, style, f"{key}-cost"),
        sees=who_sees_what(chapter, key),
        labels=label_skew(chapter, key),
        label_colours=labels_of(chapter),
        matrices=matrices(chapter),
        pairs=all_pairs(chapter),
        costs=costs(chapter),
    )


def page(book: Book) -> str:
    """The whole page as text."""
    environment = Environment(
        loader=PackageLoader("fedmllm.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        metric_label=metric_label,
        variable=variable,
        spread_text=spread_text,
        bytes_text=bytes_text,
        p_text=p_text,
        SCENARIOS=SCENARIOS,
        SHOWN=SHOWN,
        SHOWS=SHOWS,
    )
    folder = files("fedmllm.report") / "page"
    first = book.runs[0].heading
    return environment.get_template("page.html.j2").render(
        book=book,
        sections=[section(chapter, f"c{i}") for i, chapter in enumerate(book.chapters)],
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        versions=first["versions"],
        device=first["device"],
        hours=sum(run.wall_s for run in book.runs) / 3600,
        sent=bytes_text(sum(run.rows[0]["up_bytes"] + run.rows[0]["down_bytes"] for run in book.runs)),
        seeds=sorted({run.seed for run in book.runs}),
        backbones=sorted({run.settings["backbone"]["name"] for run in book.runs}),
    )
