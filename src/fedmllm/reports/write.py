"""`fedmllm report`: an HTML page, Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import make_folder, write_atomically, writing
from fedmllm.reports.answers import answers, groups
from fedmllm.reports.archive import ARCHIVE
from fedmllm.reports.client_importance import client_importance_markdown, client_importances
from fedmllm.reports.comparisons import additions, all_pairs, declared
from fedmllm.reports.guarantees import privacy_markdown, privacy_tables
from fedmllm.reports.importance import importances
from fedmllm.reports.names import setting_meaning
from fedmllm.reports.own_rows import own_markdown, own_table
from fedmllm.reports.page import page
from fedmllm.reports.reading import DatasetResults, ReportData, paths_of, read_results
from fedmllm.reports.row_error import row_error
from fedmllm.reports.rows import RowResults, results_by_row
from fedmllm.reports.shares import share_table
from fedmllm.reports.tables import costs, matrices, published_table, result_table
from fedmllm.reports.texts import (
    comparisons_markdown,
    costs_csv,
    costs_markdown,
    importance_markdown,
    matrix_markdown,
    published_markdown,
    results_csv,
    results_latex,
    results_markdown,
    rounds_csv,
    rows_csv,
    rows_markdown,
    settings_markdown,
    shares_markdown,
)

_FORMATS = {".html": "html", ".htm": "html", ".md": "markdown", ".tex": "latex", ".csv": "csv"}
CSV = ("-results.csv", "-costs.csv", "-rounds.csv", "-rows.csv")
ENDINGS: dict[str, tuple[str, ...]] = {
    "html": (".html", ".md", *CSV),
    "markdown": (".md",),
    "latex": (".tex",),
    "csv": CSV,
}


def write_report(
    folders: str | Path | Sequence[str | Path], out: str | Path | None = None, format_: str = ""
) -> list[Path]:
    """Read the runs in the folders; write a report.

    Args:
        folders: Folders of runs or suites; one alone may stand without a list.
        out: The page, as in `results/page.html`; its ending names the format. Default: `report.html` in the first folder, or
            next to the first archive, under its name.
        format_: "html" (page, Markdown and CSV files), "markdown", "latex", "csv"; "" = that of `out`.

    Returns:
        The files written: OUT.html, OUT.md, OUT-results.csv, OUT-costs.csv, OUT-rounds.csv for "html"; and
        OUT-rows.csv if the runs kept the predictions of their test rows.

    Raises:
        FedmllmError: There is no finished run, the format is unknown, or a file cannot be written.
    """
    places = paths_of(folders)
    report = read_results(places)
    by_row = results_by_row(report)
    out, format_ = _place(Path(out) if out else _beside(places[0]), format_)
    makers = {
        ".html": lambda: page(report, by_row),
        ".md": lambda: markdown(report, by_row),
        ".tex": lambda: latex(report),
        "-results.csv": lambda: results_csv(report.datasets),
        "-costs.csv": lambda: costs_csv(report.datasets, [costs(d) for d in report.datasets]),
        "-rounds.csv": lambda: rounds_csv(report.datasets),
        "-rows.csv": lambda: rows_csv(list(by_row.items())),
    }
    endings = [ending for ending in ENDINGS[format_] if ending != "-rows.csv" or any(by_row.values())]
    texts = {out.with_name(f"{out.name}{ending}"): makers[ending]() for ending in endings}
    with writing(out):
        make_folder(out.parent)
    for path, text in texts.items():
        write_atomically(path, text)
    return list(texts)


def _beside(place: Path) -> Path:
    """The report of a folder is in it, that of an archive next to it."""
    is_archive = place.name.endswith(ARCHIVE) and not place.is_dir()
    return place.with_name(f"{place.name.removesuffix(ARCHIVE)}.html") if is_archive else place / "report"


def _place(out: Path, format_: str) -> tuple[Path, str]:
    """(path without its ending, format). "tiny-0.5" is a name, not a name and an ending. Raises FedmllmError."""
    if not out.name or _is_folder(out):
        raise FedmllmError(f"{out}: cannot be written: it is a folder; give the name of a page, as in report.html")
    ending = out.suffix.lower()
    if ending in _FORMATS:
        named = _FORMATS[ending]
        if format_ and format_ != named:
            raise FedmllmError(
                f"--out {out}: the ending {ending} is {named}, but --format is {format_}; change one of them"
            )
        return out.with_name(out.name[: -len(ending)]), named
    if ending[1:].isalpha():
        raise FedmllmError(f"--out {out}: unknown ending {ending}; allowed: {', '.join(_FORMATS)}")
    if format_ and format_ not in ENDINGS:
        raise FedmllmError(f"--format {format_}: unknown format; allowed: {', '.join(ENDINGS)}")
    return out, format_ or "html"


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the path is too long
        return False


def markdown(report: ReportData, by_row: Mapping[str, Sequence[RowResults]] | None = None) -> str:
    """The whole report as Markdown, without its figures."""
    parts = [f"# {report.title}\n", *(f"- {note}\n" for note in report.notes)]
    by_row = results_by_row(report) if by_row is None else by_row
    for dataset in report.datasets:
        parts += _section(report, dataset, by_row[dataset.data])
    return "\n".join(parts)


def _section(report: ReportData, dataset: DatasetResults, rows: Sequence[RowResults]) -> list[str]:
    table, pairs = result_table(dataset), all_pairs(dataset)
    parts = [f"## {dataset.data}\n"]
    found = answers(dataset, table, pairs, groups(dataset), rows)
    parts += ["\n".join(f"- **{answer.question}.** {answer.text}" for answer in found) + "\n"]
    if table.rows:
        parts.append(results_markdown(table, row_error(dataset, table, rows)))
    if shares := share_table(dataset):
        parts += ["### Share of the ceiling\n", shares_markdown(shares, len(dataset.settings))]
    for one in rows:
        parts += [f"### Test rows: {one.setting}\n", rows_markdown(one)]
    parts.append("### Settings\n")
    parts.append(
        settings_markdown(
            {s: setting_meaning(dataset.pick(s)[0].settings, dataset.modalities) for s in dataset.settings}
        )
    )
    if claims := declared(dataset, report.claims):
        parts += ["### Declared claims\n", comparisons_markdown(claims, table.scale)]
    if pairs:
        parts += ["### Pairs of methods\n", comparisons_markdown(pairs, table.scale)]
    if added := additions(dataset):
        parts += ["### Additions to a method\n", comparisons_markdown(added, table.scale)]
    for matrix in matrices(dataset):
        parts.append(f"### Missing in training x visible in test rows: {matrix.method}\n")
        parts.append(matrix_markdown(matrix, table.scale))
    for important in importances(dataset):
        parts += [f"### Importance of each modality: {important.method}\n", importance_markdown(important, table.scale)]
    if measured := client_importances(dataset):
        parts += ["### Importance of each modality for each client\n", client_importance_markdown(measured)]
    if published := published_table(dataset, table):
        parts += ["### Published numbers, settings that agree\n", published_markdown(published)]
    if own := own_table(dataset):
        parts += ["### Each client's own test rows\n", own_markdown(own, table.metric, table.scale)]
    if private := privacy_tables(dataset):
        parts += ["### Privacy\n", privacy_markdown(private)]
    return [*parts, "### Costs of a run\n", costs_markdown(costs(dataset))]


def latex(report: ReportData) -> str:
    """The main table of each data set."""
    return "\n".join(results_latex(result_table(dataset), dataset.data) for dataset in report.datasets)
