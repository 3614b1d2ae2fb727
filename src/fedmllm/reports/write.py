"""`fedmllm report`: an HTML page, and its tables as Markdown and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import make_folder, write_atomically, writing
from fedmllm.reports.findings import findings
from fedmllm.reports.page import page
from fedmllm.reports.reading import ReportData, read_results
from fedmllm.reports.stats import all_pairs
from fedmllm.reports.tables import costs, matrices, result_table
from fedmllm.reports.texts import (
    costs_csv,
    costs_markdown,
    matrix_markdown,
    pairs_markdown,
    results_csv,
    results_markdown,
)


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Read the folders' runs; write OUT.html, OUT.md, OUT-results.csv and OUT-costs.csv -> these paths.

    Raises FedmllmError where there is no finished run.
    """
    if out.is_dir():
        raise FedmllmError(f"{out}: cannot be written: it is a folder; name a file")
    report = read_results(folders)
    stem = out.name.removesuffix(".html")  # "tiny-0.5" is a name, not a name and an ending
    texts = {
        out.with_name(f"{stem}.html"): page(report),
        out.with_name(f"{stem}.md"): markdown(report),
        out.with_name(f"{stem}-results.csv"): results_csv(report.datasets),
        out.with_name(f"{stem}-costs.csv"): costs_csv(report.datasets, [costs(c) for c in report.datasets]),
    }
    with writing(out):
        make_folder(out.parent)
    for path, text in texts.items():
        write_atomically(path, text)
    return list(texts)


def markdown(report: ReportData) -> str:
    """The whole report as Markdown, without its figures."""
    parts = [f"# {report.title}\n"]
    for dataset in report.datasets:
        table = result_table(dataset)
        parts.append(f"## {dataset.data}\n")
        parts.append("\n".join(f"- {f.text} {f.detail}".rstrip() for f in findings(dataset, table)) + "\n")
        parts.append(results_markdown(table, len(dataset.seeds)))
        parts.append("### Which orderings hold\n")
        parts.append(pairs_markdown(all_pairs(dataset)))
        for matrix in matrices(dataset):
            parts.append(f"### What was missing in training x what test rows show: {matrix.method}\n")
            parts.append(matrix_markdown(matrix))
        parts.append("### Costs of a run\n")
        parts.append(costs_markdown(costs(dataset)))
    return "\n".join(parts)
