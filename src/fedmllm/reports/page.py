"""One self-contained HTML page: no network, light and dark, phone and desk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedmllm.core.text import bytes_text
from fedmllm.reports.clients import label_skew, labels_of, who_sees_what
from fedmllm.reports.figures import MOST_DRAWN, Look, Picture, against_cost, curves, looks, panels, radar
from fedmllm.reports.findings import Finding, findings, p_text
from fedmllm.reports.names import SCENARIOS, VISIBLE, metric_label
from fedmllm.reports.reading import DatasetResults, ReportData
from fedmllm.reports.stats import Versus, all_pairs
from fedmllm.reports.svg import SHOWS, variable
from fedmllm.reports.tables import CostRow, Matrix, ResultTable, costs, matrices, result_table
from fedmllm.reports.texts import spread_text


@dataclass(frozen=True)
class Section:
    """Everything that the page shows of one dataset."""

    dataset: DatasetResults
    table: ResultTable
    others: tuple[ResultTable, ...]  # further metrics
    findings: list[Finding]
    looks: dict[str, Look]
    num_left_out: int  # methods that no figure shows, because another one with an addition is
    radar: Picture | None
    panels: list[Picture]
    curves: list[Picture]
    against_cost: list[Picture]
    sees: list[Picture]
    labels: list[Picture]
    label_colours: dict[str, str]
    matrices: list[Matrix]
    heat: tuple[float, float]  # lowest and highest mean of the matrices
    pairs: list[Versus]
    costs: list[CostRow]


def section(dataset: DatasetResults, key: str) -> Section:
    """Tables and figures of a dataset; `key` keeps its ids apart from other datasets'."""
    table = result_table(dataset)
    drawn = dataset if len(table.methods) <= MOST_DRAWN else dataset.plain()
    drawn_table, style = result_table(drawn), looks(drawn)
    trained = matrices(dataset)
    means = [spread.mean for matrix in trained for row in matrix.rows.values() for spread in row.values()]
    metrics = [row["metric"] for row in dataset.runs[0].rows if row["metric"] not in (table.metric, "unparsed")]
    return Section(
        dataset=dataset,
        table=table,
        others=tuple(result_table(dataset, metric) for metric in dict.fromkeys(metrics)),
        findings=findings(dataset, table),
        looks=style,
        num_left_out=len(table.methods) - len(drawn_table.methods),
        radar=radar(drawn_table, style, f"{key}-radar"),
        panels=panels(drawn_table, style, f"{key}-panel"),
        curves=curves(drawn, style, f"{key}-curve"),
        against_cost=against_cost(drawn, style, f"{key}-cost"),
        sees=who_sees_what(dataset, key),
        labels=label_skew(dataset, key),
        label_colours=labels_of(dataset),
        matrices=trained,
        heat=(min(means, default=0.0), max(means, default=1.0)),
        pairs=all_pairs(dataset),
        costs=costs(dataset),
    )


def model_of(backbone: Mapping[str, Any]) -> str:
    """The folder's name where the model lies in one: "MiniCPM-V-2_6"; else the backbone's."""
    return PurePath(str(backbone.get("path") or "")).name or str(backbone["name"])


def page(report: ReportData) -> str:
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
        variable=variable,
        spread_text=spread_text,
        bytes_text=bytes_text,
        p_text=p_text,
        SCENARIOS=SCENARIOS,
        VISIBLE=VISIBLE,
        SHOWS=SHOWS,
    )
    folder = files("fedmllm.reports") / "page"
    first = report.runs[0].heading
    return environment.get_template("page.html.j2").render(
        report=report,
        sections=[section(dataset, f"c{i}") for i, dataset in enumerate(report.datasets)],
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        versions=first["versions"],
        device=first["device"],
        hours=sum(run.wall_s for run in report.runs) / 3600,
        sent=bytes_text(sum(run.rows[0]["up_bytes"] + run.rows[0]["down_bytes"] for run in report.runs)),
        seeds=sorted({run.seed for run in report.runs}),
        models=sorted({model_of(run.settings["backbone"]) for run in report.runs}),
    )
