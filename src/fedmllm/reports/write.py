"""`fedmllm report`: one HTML page, the same tables as Markdown, and two CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedmllm.core.storage import write_atomically
from fedmllm.reports.findings import findings
from fedmllm.reports.page import page
from fedmllm.reports.reading import Book, read_book
from fedmllm.reports.stats import all_pairs
from fedmllm.reports.tables import costs, matrices, results
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
    book = read_book(folders)
    stem = out.name.removesuffix(".html")  # "tiny-0.5" is a name, not a name and an ending
    texts = {
        out.with_name(f"{stem}.html"): page(book),
        out.with_name(f"{stem}.md"): markdown(book),
        out.with_name(f"{stem}-results.csv"): results_csv(book.chapters),
        out.with_name(f"{stem}-costs.csv"): costs_csv(book.chapters, [costs(c) for c in book.chapters]),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write_atomically(path, text)
    return list(texts)


def markdown(book: Book) -> str:
    """The whole report as Markdown, without its figures."""
    parts = [f"# {book.title}\n"]
    for chapter in book.chapters:
        table = results(chapter)
        parts.append(f"## {chapter.data}\n")
        parts.append("\n".join(f"- {f.text} {f.detail}".rstrip() for f in findings(chapter, table)) + "\n")
        parts.append(results_markdown(table, len(chapter.seeds)))
        parts.append("### Which orderings hold\n")
        parts.append(pairs_markdown(all_pairs(chapter)))
        for matrix in matrices(chapter):
            parts.append(f"### What was missing in training x what test rows show: {matrix.method}\n")
            parts.append(matrix_markdown(matrix))
        parts.append("### Costs of a run\n")
        parts.append(costs_markdown(costs(chapter)))
    return "\n".join(parts)
