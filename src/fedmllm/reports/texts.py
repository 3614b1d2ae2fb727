"""The tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from fedmllm.core.text import bytes_text
from fedmllm.reports.findings import p_text
from fedmllm.reports.names import VISIBLE, metric_label
from fedmllm.reports.reading import DatasetResults
from fedmllm.reports.stats import Spread, Versus, paired
from fedmllm.reports.tables import CostRow, Matrix, ResultRow, ResultTable

NOTE = (
    "Percent, mean ± standard deviation over seeds. **Best**, _second_; ≈: the lead of the first place is within noise "
    "(paired t-test over seeds, Holm over the rows, 5 %)."
)


def results_markdown(table: ResultTable, num_seeds: int) -> str:
    """The main table; published numbers in columns of their own."""
    theirs = list(table.published.values) if table.published else []
    head = ["scenario", "setting", *table.methods, *(f"published: {m}" for m in theirs)]
    lines = [_line(head), _line(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for row in (*table.rows, *([table.overall] if table.overall else [])):
        values = [_cell(row, method) for method in table.methods]
        published = [f"{row.published[m]:.1f}" if m in row.published else "" for m in theirs]
        lines.append(_line([row.scenario, row.setting, *values, *published]))
    shows, seeds = VISIBLE.get(table.visible, table.visible), "seed" if num_seeds == 1 else "seeds"
    about = f"{metric_label(table.metric)}, test rows show {shows}; {num_seeds} {seeds}. {NOTE}"
    if table.published:
        p = table.published
        other = "" if p.same_data else " Published numbers are of another model and data; compare orderings."
        about += f" Published: {p.title}, {p.metric}, {p.model} ({p.source}). {p.note}{other}"
    return "\n".join(lines) + f"\n\n{about}\n"


def _cell(row: ResultRow, method: str) -> str:
    if method not in row.cells:
        return ""
    cell = row.cells[method]
    text = {"best": f"**{cell.text}**", "second": f"_{cell.text}_"}.get(cell.mark, cell.text)
    return text + (" ≈" if cell.mark == "best" and not row.is_clear else "")


def costs_markdown(rows: Sequence[CostRow]) -> str:
    """What a run of each method costs."""
    head = [
        "method",
        "runs",
        "rounds",
        "up",
        "down",
        "LoRA of it",
        "client s",
        "server s",
        "wall s",
        "peak memory",
        "tokens",
    ]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for r in rows:
        share = "" if r.lora_share is None else f"{100 * r.lora_share:.0f} %"
        words = [
            r.method,
            f"{r.num_runs}",
            f"{r.num_rounds:.0f}",
            bytes_text(r.up_bytes),
            bytes_text(r.down_bytes),
            share,
        ]
        words += [f"{r.client_s:.1f}", f"{r.server_s:.2f}", f"{r.wall_s:.1f}"]
        lines.append(_line([*words, bytes_text(r.peak_host_bytes + r.peak_device_bytes), f"{r.num_tokens:,.0f}"]))
    total_s = sum(r.total_wall_s for r in rows)
    sent = bytes_text(sum(r.total_bytes for r in rows))
    return (
        "\n".join(lines)
        + f"\n\nMeans over runs; peak memory is the largest seen. All runs: {total_s / 3600:.2f} h, {sent} sent.\n"
    )


def matrix_markdown(matrix: Matrix) -> str:
    """Train setting x test modalities of one method."""
    lines = [
        _line(["trained on", *(VISIBLE.get(c, c) for c in matrix.columns)]),
        _line(["---", *["---:"] * len(matrix.columns)]),
    ]
    lines += [
        _line([setting, *(spread_text(cells[c]) for c in matrix.columns)]) for setting, cells in matrix.rows.items()
    ]
    return "\n".join(lines) + "\n"


def pairs_markdown(pairs: Sequence[Versus]) -> str:
    """Every pair of methods over all settings."""
    head = ["higher", "lower", "difference", "p", "p (Holm)", "cells won", "stable", "reversed"]
    lines = [_line(head), _line(["---", "---", *["---:"] * (len(head) - 2)])]
    for v in pairs:
        words = [v.a, v.b, f"{100 * v.paired.difference:+.1f}", p_text(v.paired.p), p_text(v.p_holm)]
        lines.append(_line([*words, f"{v.wins} of {v.cells}", f"{len(v.stable)}", f"{len(v.reversed)}"]))
    return "\n".join(lines) + (
        "\n\nDifference in points of the mean over settings, paired t-test over seeds. Stable: the first is above the second "
        "for every seed; reversed: below for every seed; all other settings change with the seed.\n"
    )


def results_csv(datasets: Sequence[DatasetResults]) -> str:
    """One line a data set, setting, method, test modalities and metric."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["data", "scenario", "setting", "method", "test_shows", "metric", "mean", "std", "n", "seeds", "p_vs_best"]
    )
    for dataset in datasets:
        kinds = dict.fromkeys((row["metric"], row["visible"]) for run in dataset.runs for row in run.rows)
        scenario = {setting: name for name, settings in dataset.scenarios.items() for setting in settings}
        for metric, visible in kinds:
            values = dataset.values(metric, visible)
            best: dict[str, str] = {}
            for setting, method in values:
                held = best.setdefault(setting, method)
                if _mean(values[setting, method]) > _mean(values[setting, held]):
                    best[setting] = method
            for (setting, method), seeds in values.items():
                s = Spread.of(list(seeds.values()))
                test = paired(values[setting, best[setting]], seeds) if best[setting] != method else None
                p = "" if test is None or test.p is None else f"{test.p:.4g}"
                std = "" if s.std is None else f"{s.std:.6g}"
                names = [dataset.data, scenario[setting], setting, method, visible, metric]
                writer.writerow([*names, f"{s.mean:.6g}", std, s.n, " ".join(map(str, sorted(seeds))), p])
    return buffer.getvalue()


def costs_csv(datasets: Sequence[DatasetResults], rows: Sequence[Sequence[CostRow]]) -> str:
    """One line a data set and method, in plain numbers (bytes, seconds)."""
    buffer = io.StringIO()
    fields = list(CostRow.__dataclass_fields__)
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["data", *fields])
    for dataset, of_dataset in zip(datasets, rows, strict=True):
        for row in of_dataset:
            values = [getattr(row, field) for field in fields]
            writer.writerow(
                [dataset.data, *("" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values)]
            )
    return buffer.getvalue()


def spread_text(spread: Spread) -> str:
    """Percent: "97.3 ± 0.4"."""
    return f"{100 * spread.mean:.1f}" + (f" ± {100 * spread.std:.1f}" if spread.std is not None else "")


def _mean(seeds: dict[int, float]) -> float:
    return sum(seeds.values()) / len(seeds)


def _line(words: Sequence[str]) -> str:
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"
