"""One self-contained HTML page: no network, light and dark, phone and desk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedmllm.core.text import bytes_text
from fedmllm.reports.answers import Answer, answers, groups, ranked
from fedmllm.reports.client_importance import ClientImportance, about_client_importance, client_importances, nats
from fedmllm.reports.clients import label_skew, labels_of, who_sees_what
from fedmllm.reports.comparisons import Comparison, additions, all_pairs, declared
from fedmllm.reports.figures import (
    MOST_DRAWN,
    Look,
    PageFigure,
    against_cost,
    curves,
    looks,
    overview,
    panels,
    rows_overview,
)
from fedmllm.reports.guarantees import PrivacyTable, privacy_tables
from fedmllm.reports.importance import Importance, about_importance, importances
from fedmllm.reports.names import SCENARIOS, TWO, VISIBLE, metric_label, setting_meaning, visible_label
from fedmllm.reports.numerals import DASH, NO_BREAK, counted, p_text
from fedmllm.reports.own_rows import OWN_TEXT, OwnRow, own_table
from fedmllm.reports.reading import DatasetResults, ReportData
from fedmllm.reports.row_error import RowError, row_error
from fedmllm.reports.rows import RowResults, kind_label, results_by_row
from fedmllm.reports.sent import sent_bytes
from fedmllm.reports.shares import ShareTable, about_shares, share_table, share_text
from fedmllm.reports.svg import SHOWS, variable
from fedmllm.reports.tables import (
    CostRow,
    Matrix,
    PublishedTable,
    ResultTable,
    costs,
    matrices,
    published_table,
    result_table,
)
from fedmllm.reports.texts import (
    BEFORE_TEXT,
    about_published,
    about_table,
    detectable_text,
    estimate_text,
    interval,
    no_tests,
    rows_interval,
    verdict_text,
)

SEEDS_NOTE = "Diamonds: mean of the federated methods. Bars: 95 % interval over seeds. Dots: seeds. Lines: baselines."
ROWS_NOTE = "Diamonds: mean of the federated methods. Bars: 95 % interval over test rows. Lines: baselines."


@dataclass(frozen=True)
class Section:
    """Everything that the page has on one data set."""

    dataset: DatasetResults
    table: ResultTable
    error: RowError | None  # that the test rows give to the values of the table
    others: tuple[ResultTable, ...]  # further metrics
    answers: list[Answer]
    overview: PageFigure | None
    overview_note: str
    rows: list[RowResults]  # results by test row, a setting each
    meanings: dict[str, str]  # of the settings
    looks: dict[str, Look]
    num_left_out: int  # methods that no figure has, because another one with an addition is there
    panels: list[PageFigure]
    curves: list[PageFigure]
    against_cost: list[PageFigure]
    sees: list[PageFigure]
    modalities: tuple[str, ...]  # of the figures in `sees`, if there are others than image and text
    labels: list[PageFigure]
    label_colours: dict[str, str]
    matrices: list[Matrix]
    importances: list[Importance]
    client_importances: list[ClientImportance]
    first_matrix: str  # the method whose train x test table is open
    heat: tuple[float, float]  # lowest and highest mean of the matrices
    shares: ShareTable | None  # of the ceiling, where the runs state one
    tests: dict[str, list[Comparison]]  # title -> tests that are corrected together
    published: PublishedTable | None
    costs: list[CostRow]
    own: list[OwnRow]
    privacy: list[PrivacyTable]


def section(report: ReportData, dataset: DatasetResults, key: str, rows: Sequence[RowResults]) -> Section:
    """Tables and figures of a data set; `key` keeps its ids distinct from those of other data sets."""
    table, pairs, chart = result_table(dataset), all_pairs(dataset), groups(dataset)
    drawn = dataset if len(table.methods) <= MOST_DRAWN else dataset.plain()
    drawn_table, style = result_table(drawn), looks(drawn)
    trained = matrices(dataset)
    means = [spread.mean for matrix in trained for row in matrix.rows.values() for spread in row.values()]
    metrics = [m for m in dataset.metrics if m != table.metric and m not in dataset.undefined]
    best, _ = ranked(dataset, table)
    gaps = next((one for one in rows if one.has_gaps), None)
    chart_picture = overview(chart, table, f"{key}-overview")
    of_rows = gaps is not None and chart_picture is None
    if gaps is not None and chart_picture is None:
        chart_picture = rows_overview(gaps, f"{key}-overview")
    claims = {
        "Claims declared in the suite file": declared(dataset, report.claims),
        "Pairs of methods": pairs,
        "Additions to a method": additions(dataset),
    }
    return Section(
        dataset=dataset,
        table=table,
        error=row_error(dataset, table, rows),
        others=tuple(result_table(dataset, metric) for metric in metrics),
        answers=answers(dataset, table, pairs, chart, rows),
        overview=chart_picture,
        overview_note=ROWS_NOTE if of_rows else SEEDS_NOTE,
        rows=list(rows),
        meanings={
            setting: setting_meaning(dataset.pick(setting)[0].settings, dataset.modalities)
            for setting in dataset.settings
        },
        looks=style,
        num_left_out=len(table.methods) - len(drawn_table.methods),
        panels=panels(drawn, drawn_table, style, f"{key}-panel"),
        curves=curves(drawn, drawn_table, style, f"{key}-curve"),
        against_cost=against_cost(drawn, drawn_table, style, f"{key}-cost"),
        sees=who_sees_what(dataset, key),
        modalities=dataset.modalities if set(dataset.modalities) - set(TWO) else (),
        labels=label_skew(dataset, key),
        label_colours=labels_of(dataset),
        matrices=trained,
        importances=importances(dataset),
        client_importances=client_importances(dataset),
        first_matrix=next((m for m in best if any(m == matrix.method for matrix in trained)), ""),
        heat=(min(means, default=0.0), max(means, default=1.0)),
        shares=share_table(dataset),
        tests={title: several for title, several in claims.items() if several},
        published=published_table(dataset, table),
        costs=costs(dataset),
        own=own_table(dataset),
        privacy=privacy_tables(dataset),
    )


def model_of(backbone: Mapping[str, Any]) -> str:
    """The folder's name if the model is in one: "MiniCPM-V-2_6"; else the backbone's."""
    return PurePath(str(backbone.get("path") or "")).name or str(backbone["name"])


def _about_table(table: ResultTable, error: RowError | None) -> str:
    """The caption without Markdown, and with the page's own mark."""
    return about_table(table, error, "A frame").replace("**", "").replace("_second_", "second")


def page(report: ReportData, by_row: Mapping[str, Sequence[RowResults]] | None = None) -> str:
    """The whole page as text."""
    environment = Environment(
        loader=PackageLoader("fedmllm.reports", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        metric_label=metric_label,
        OWN_TEXT=OWN_TEXT,
        BEFORE_TEXT=BEFORE_TEXT,
        variable=variable,
        bytes_text=bytes_text,
        p_text=p_text,
        counted=counted,
        about_table=_about_table,
        about_published=about_published,
        about_importance=about_importance,
        about_client_importance=about_client_importance,
        nats=nats,
        about_shares=about_shares,
        share_text=share_text,
        interval=interval,
        detectable_text=detectable_text,
        estimate_text=estimate_text,
        rows_interval=rows_interval,
        kind_label=kind_label,
        no_tests=no_tests,
        verdict_text=verdict_text,
        SCENARIOS=SCENARIOS,
        VISIBLE=VISIBLE,
        visible_label=visible_label,
        SHOWS=SHOWS,
        DASH=DASH,
        NB=NO_BREAK,
    )
    by_row = results_by_row(report) if by_row is None else by_row
    folder = files("fedmllm.reports") / "page"
    first = report.runs[0].heading
    return environment.get_template("page.html.j2").render(
        report=report,
        sections=[section(report, dataset, f"c{i}", by_row[dataset.data]) for i, dataset in enumerate(report.datasets)],
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        versions=first.get("versions") or {},
        device=first.get("device") or {},
        digests=report.runs[0].digests,
        hours=sum(run.wall_s for run in report.runs) / 3600,
        sent=bytes_text(sum(sent_bytes(run.rows[0]) for run in report.runs)),
        seeds=sorted({run.seed for run in report.runs}),
        models=sorted({model_of(run.settings["backbone"]) for run in report.runs}),
    )
