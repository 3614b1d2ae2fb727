"""The tables as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedmllm.core.text import bytes_text
from fedmllm.reports.comparisons import Comparison
from fedmllm.reports.importance import Importance, about_importance
from fedmllm.reports.names import metric_label, visible_label
from fedmllm.reports.numerals import DASH, NO_BREAK, Scale, counted, counted_range, listed_words, p_text
from fedmllm.reports.reading import DatasetResults, RunRecord
from fedmllm.reports.roles import ROLE_TEXT
from fedmllm.reports.row_error import RowError
from fedmllm.reports.rows import RowResults, kind_label
from fedmllm.reports.shares import ShareTable, about_shares, share_text
from fedmllm.reports.stats import LEVEL, Spread, paired
from fedmllm.reports.tables import CostRow, Matrix, PublishedTable, ResultRow, ResultTable
from fedmllm.runs.row_statistics import PairedRows, RowEstimate


def results_markdown(table: ResultTable, error: RowError | None = None) -> str:
    """The main table, with the error that the test rows give, if it is known."""
    lines = _head(["scenario", "setting"], table.methods)
    for row in (*table.rows, *([table.overall] if table.overall else [])):
        lines.append(_line([row.scenario, row.setting, *(_cell(row, method, table.scale) for method in table.methods)]))
    return "\n".join(lines) + f"\n\n{about_table(table, error)}\n"


def about_table(table: ResultTable, error: RowError | None = None, unsure: str = "≈") -> str:
    """The caption of the main table: metric, seeds, marks, the difference that could be detected, error of the test rows.

    Args:
        table: The table.
        error: That the test rows give, if it is known.
        unsure: What marks a best method whose lead is not established.

    Returns:
        Markdown.
    """
    unit = " in percent" if table.scale.unit == "%" else ""
    of_cells = table.seeds()
    seeds = (
        f"mean ± standard deviation over {counted_range(of_cells, 'seed')}" if of_cells[1] > 1 else "one seed: no tests"
    )
    rows = "as they are" if table.visible == "all" else f"with {visible_label(table.visible)}"  # rows may have gaps
    parts = [f"{_upper(metric_label(table.metric))}{unit}; test rows {rows}; {seeds}."]
    lines = (*table.rows, *([table.overall] if table.overall else []))
    if any(cell.mark for row in lines for cell in row.cells.values()):
        parts.append("**Best** and _second_ federated method.")
        if of_cells[1] > 1:
            parts.append(f"{unsure}: the lead of the best is not established (paired t-test over seeds, 5 %).")
            parts += _families(table)
    for role, text in ROLE_TEXT.items():
        if names := [method for method, own in table.roles.items() if own == role]:
            parts.append(f"Not ranked: {listed_words(names)} ({text}).")
    if any(row.uneven for row in lines):
        parts.append(
            "n: seeds of a cell in rows whose methods have different seeds; federated methods with different seeds are not "
            "ranked."
        )
    if (one := table.detectable_row) is not None:
        mean = ""
        if table.overall and (whole := table.detectable_mean) is not None:
            of = "" if whole.of == one.of else f" of {whole.of}"
            mean = f" and {amount_text(whole.difference, table.scale)}{of} in the mean over settings"
        parts.append(
            f"Detectable difference of {one.of} (80 % power, 5 %): {amount_text(one.difference, table.scale)} in one "
            f"setting{mean}."
        )
    if error is not None:
        parts.append(error.error_text(table.scale))
    return " ".join(parts).replace(" %", f"{NO_BREAK}%")


def _families(table: ResultTable) -> list[str]:
    """The tests with which a mark is corrected, in words."""
    found = []
    if table.row_family:
        found.append(f"the {counted(table.row_family, 'pair')} of federated methods in the rows of settings")
    if table.mean_family:
        where = " in the mean over settings" if table.overall else ""
        found.append(f"the {counted(table.mean_family, 'pair')} of methods with a federated one among them{where}")
    return [f"Holm's correction is over {', and over '.join(found)}."] if found else []


def amount_text(difference: float, scale: Scale) -> str:
    """ "3.3 points", without a sign."""
    return scale.difference(abs(difference)).lstrip("+")


def _cell(row: ResultRow, method: str, scale: Scale) -> str:
    if method not in row.cells:
        return DASH
    cell = row.cells[method]
    text = scale.spread(cell.spread.mean, cell.spread.std)
    text = {"best": f"**{text}**", "second": f"_{text}_"}.get(cell.mark, text)
    text += f"{NO_BREAK}≈" if row.is_unsure(method) else ""
    return text + (f"{NO_BREAK}(n={cell.spread.n})" if row.uneven else "")


def results_latex(table: ResultTable, title: str) -> str:
    """The main table for `\\usepackage{booktabs}`: methods as rows if there are more settings than methods."""
    rows = (*table.rows, *([table.overall] if table.overall else []))
    head = " & ".join(["Setting", *map(_tex, table.methods)])
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_tex(title)}: {_tex(about_table(table).replace('**', '').replace('_', ''))}}}",
        f"\\begin{{tabular}}{{l{'r' * len(table.methods)}}}",
        "\\toprule",
        f"{head} \\\\",
        "\\midrule",
    ]
    for row in rows:
        lines += ["\\midrule"] if row is table.overall else []
        lines.append(
            " & ".join([_tex(row.setting), *(_tex_cell(row, m, table.scale) for m in table.methods)]) + " \\\\"
        )
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


def _tex_cell(row: ResultRow, method: str, scale: Scale) -> str:
    if method not in row.cells:
        return "--"
    cell = row.cells[method]
    text = _tex(scale.spread(cell.spread.mean, cell.spread.std))
    text = {"best": f"\\textbf{{{text}}}", "second": f"\\underline{{{text}}}"}.get(cell.mark, text)
    text += _tex(f"{NO_BREAK}≈") if row.is_unsure(method) else ""
    return text + (f"~(n={cell.spread.n})" if row.uneven else "")


def _tex(text: str) -> str:
    """The text with TeX's own characters escaped."""
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    special |= {c: f"\\{c}" for c in "&%$#_{}"}
    special |= {
        "±": "$\\pm$",
        NO_BREAK: "~",
        "\N{MINUS SIGN}": "$-$",
        DASH: "--",
        "≈": "$\\approx$",
        "<": "$<$",
        ">": "$>$",
    }
    return "".join(special.get(c, c) for c in text)


def published_markdown(table: PublishedTable) -> str:
    """Published numbers next to ours, of the settings that agree."""
    ours = [m for m in table.methods if any(m in row.ours for row in table.rows)]
    lines = _head(["setting"], [*(f"here: {m}" for m in ours), *(f"published: {m}" for m in table.methods)])
    for row in table.rows:
        published = [f"{row.published[m]:.1f}" for m in table.methods]
        lines.append(_line([row.setting, *(row.ours.get(m, DASH) for m in ours), *published]))
    if len(table.rows) > 1:
        lines.append(
            _line(["mean of these settings", *("" for _ in ours), *(f"{table.mean[m]:.1f}" for m in table.methods)])
        )
    return "\n".join(lines) + f"\n\n{about_published(table)}\n"


def about_published(table: PublishedTable) -> str:
    """Source, and agreement of orderings with its chance level."""
    p = table.source
    text = f"Published: {p.title}, {p.metric}, {p.model} ({p.source}). {p.note}"
    text += "" if p.same_data else " They are of another model and of real data: only orderings can be compared."
    if table.num_orderings:
        text += (
            f" Of {table.num_orderings} published orderings of two methods in a setting, {table.agreeing} are the same "
            f"here; by chance it would be {table.num_orderings / 2:g}."
        )
    if table.num_stable:
        text += (
            f" Of the {table.num_stable} that are the same for every seed here, {table.stable} agree (by chance "
            f"{table.num_stable / 2:g})."
        )
    return text


def shares_markdown(table: ShareTable, num_settings: int) -> str:
    """Shares of the ceiling, a row for each method."""
    lines = _head(["method"], [visible_label(visible) for visible in table.ceilings])
    for method, of_method in table.rows.items():
        lines.append(_line([method, *(share_text(of_method.get(visible)) for visible in table.ceilings)]))
    return "\n".join(lines) + f"\n\n{about_shares(table, num_settings)}\n"


BEFORE_TEXT = (
    "Before training: bytes up and down in which a completion is learned; they are in the bytes of all runs and not in up and "
    "down, and their time is in the wall time."
)


def costs_markdown(rows: Sequence[CostRow]) -> str:
    """Costs of a run of each method."""
    names = ["runs", "rounds", "up", "down", "LoRA of it", "client s", "server s", "wall s", "peak memory", "tokens"]
    learns = any(r.before_training_bytes for r in rows)
    names += ["before training"] if learns else []
    lines = _head(["method"], names)
    for r in rows:
        share = DASH if r.lora_share is None else f"{100 * r.lora_share:.0f}{NO_BREAK}%"
        words = [
            r.method,
            f"{r.num_runs}",
            f"{r.num_rounds:.0f}",
            bytes_text(r.up_bytes),
            bytes_text(r.down_bytes),
            share,
        ]
        words += [f"{r.client_s:.1f}", f"{r.server_s:.2f}", f"{r.wall_s:.1f}"]
        words += [bytes_text(r.peak_host_bytes + r.peak_device_bytes), f"{r.num_tokens:,.0f}"]
        lines.append(_line([*words, *([bytes_text(r.before_training_bytes)] if learns else [])]))
    total_s = sum(r.total_wall_s for r in rows)
    sent = bytes_text(sum(r.total_bytes for r in rows))
    return (
        "\n".join(lines)
        + f"\n\nMeans over runs; peak memory is the largest seen.{f' {BEFORE_TEXT}' if learns else ''} "
        f"All runs: {total_s / 3600:.2f} h, {sent} sent.\n"
    )


def importance_markdown(table: Importance, scale: Scale) -> str:
    """Return the contribution of each modality of the test rows, for one method."""
    modalities = list(next(iter(table.rows.values())))
    lines = _head(["trained on"], modalities)
    for setting, cells in table.rows.items():
        lines.append(_line([setting, *(scale.spread(cells[m].mean, cells[m].std) for m in modalities)]))
    return "\n".join(lines) + f"\n\n{about_importance(table)}\n"


def matrix_markdown(matrix: Matrix, scale: Scale) -> str:
    """Train setting x test modalities of one method."""
    lines = _head(["trained on"], [visible_label(c, matrix.gaps) for c in matrix.columns])
    for setting, cells in matrix.rows.items():
        lines.append(_line([setting, *(scale.spread(cells[c].mean, cells[c].std) for c in matrix.columns)]))
    return "\n".join(lines) + "\n"


def comparisons_markdown(tests: Sequence[Comparison], scale: Scale) -> str:
    """Tests of differences, with what each establishes."""
    if tests and all(c.test.p is None for c in tests):
        return f"{no_tests(tests)}\n"
    lines = _head(
        ["higher", "lower", "difference"],
        ["95 % interval", "detectable", "p", "p (Holm)", "cells won", "stable", "reversed", "established"],
    )
    for c in tests:
        cells = [f"{c.wins} of {c.cells}", f"{len(c.stable)}", f"{len(c.reversed)}"] if c.cells else [DASH] * 3
        words = [
            c.higher,
            c.lower,
            scale.difference(c.test.difference),
            interval(c, scale),
            detectable_text(c, scale),
            p_text(c.test.p),
            p_text(c.p_holm),
        ]
        lines.append(_line([*words, *cells, verdict_text(c)]))
    return "\n".join(lines) + f"\n\n{about_comparisons(tests)}\n"


def about_comparisons(tests: Sequence[Comparison]) -> str:
    """The caption of a table of tests."""
    over = "the labels that a claim leaves open" if tests[0].declared else "settings"
    family = counted(tests[0].family, "test")
    parts = [
        f"Paired t-test over seeds, of the mean over {over}; Holm over the {family} of this table. Detectable: smallest true "
        "difference that the test of the row finds with 80 % power at the 5 % level, before the correction."
    ]
    if any(c.cells for c in tests):
        parts += [
            "The table has every pair with a federated method among them; these tests also decide whether the lead of the best "
            "in the mean over settings is established. Stable: settings in which the first is above the second for every "
            "seed; reversed: below for every seed."
        ]
    return " ".join(parts).replace(" %", f"{NO_BREAK}%")


def detectable_text(comparison: Comparison, scale: Scale) -> str:
    """ "0.9 points"; a dash without a spread over seeds."""
    found = comparison.test.detectable
    return DASH if found is None else amount_text(found, scale)


def no_tests(tests: Sequence[Comparison]) -> str:
    """The reason that none of the comparisons has a test."""
    n = max(c.test.n for c in tests)
    return (
        "One shared seed: no tests."
        if n == 1
        else f"{counted(n, 'shared seed')} without any spread in the differences: no tests."
    )


def interval(comparison: Comparison, scale: Scale) -> str:
    """95 % interval of the difference."""
    test = comparison.test
    return DASH if test.low is None or test.high is None else scale.interval(test.low, test.high)


def rows_interval(test: PairedRows, scale: Scale) -> str:
    """ " (95 % interval -20.1 to -5.0)"; "" without one."""
    return (
        ""
        if test.low is None or test.high is None
        else f" (95{NO_BREAK}% interval {scale.interval(test.low, test.high)})"
    )


def estimate_text(estimate: RowEstimate, scale: Scale) -> str:
    """ "85.1 (77.9 to 91.6)", without its unit."""
    if estimate.value is None:
        return DASH
    text = scale.number(estimate.value)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({scale.number(estimate.low)} to {scale.number(estimate.high)})"


def rows_markdown(rows: RowResults) -> str:
    """Results by group of test rows, paired tests, calibration and confusion of one setting."""
    scale = rows.scale
    lines = _head(["test rows"], ["n", *rows.methods])
    for one in (rows.whole, *rows.slices):
        name = f"{kind_label(one.by)}: {one.name}" if one.by else one.name
        lines.append(_line([name, str(one.num_rows), *(estimate_text(one.cells[m], scale) for m in rows.methods)]))
    unit = f" in {scale.unit}" if scale.unit else ""
    lines += ["", f"{_upper(metric_label(rows.metric))}{unit}, with 95{NO_BREAK}% intervals over test rows."]
    for hidden in rows.hidden:
        lines += [
            "",
            f"Test rows that have everything, with {visible_label(hidden.visible)} visible: "
            f"{scale.difference(hidden.test.difference)}{rows_interval(hidden.test, scale)}.",
        ]
    if rows.tests:
        lines += [
            "",
            *_head(["higher", "lower"], ["difference", f"95{NO_BREAK}% interval", "right alone", "p", "p (Holm)"]),
        ]
        for t in rows.tests:
            low, high = t.test.low, t.test.high
            ends = DASH if low is None or high is None else scale.interval(low, high)
            alone = DASH if t.test.only_a is None else f"{t.test.only_a} : {t.test.only_b}"
            words = [scale.difference(t.test.difference), ends, alone, p_text(t.test.p), p_text(t.p_holm)]
            lines.append(_line([t.higher, t.lower, *words]))
    if rows.calibrations:
        lines += ["", *_head(["closed questions"], ["accuracy", "mean confidence", "calibration error (ECE)"])]
        for method, c in rows.calibrations.items():
            lines.append(_line([method, *(f"{100 * v:.1f}" for v in (c.accuracy, c.confidence, c.ece))]))
    for method, matrix in rows.confusions.items():
        lines += ["", *_head([f"{method}: truth"], [f"answer: {label}" for label in matrix.labels])]
        lines += [_line([label, *map(str, counts)]) for label, counts in zip(matrix.labels, matrix.counts, strict=True)]
    return "\n".join(lines) + "\n"


def rows_csv(datasets: Sequence[tuple[str, Sequence[RowResults]]]) -> str:
    """One line a data set, setting, group of test rows and method: the value and its 95 % interval over rows."""
    head = ["data", "setting", "by", "name", "num_rows", "method", "metric", "value", "low", "high"]
    lines = (
        [data, r.setting, one.by, one.name, one.num_rows, method, r.metric, *map(_plain, (e.value, e.low, e.high))]
        for data, several in datasets
        for r in several
        for one in (r.whole, *r.slices)
        for method, e in one.cells.items()
    )
    return _csv(head, lines)


def verdict_text(comparison: Comparison) -> str:
    """ "yes", "the opposite", or "not established with 3 seeds, about 12 needed"."""
    c = comparison
    if c.p_holm is None:
        return "no test: one shared seed" if c.test.n < 2 else "no test: no spread over seeds"
    if c.is_established:
        return "yes, but most cells are against it" if c.cells and c.disagrees else "yes"
    return "the opposite" if c.p_holm < LEVEL else c.needed_text


def results_csv(datasets: Sequence[DatasetResults]) -> str:
    """One line a data set, setting, method, test modalities and metric; p against the best federated method, uncorrected."""
    head = ["data", "scenario", "setting", "method", "test_shows", "metric", "mean", "std", "n", "seeds", "p_vs_best"]
    return _csv(head, (line for dataset in datasets for line in _result_lines(dataset)))


def _result_lines(dataset: DatasetResults) -> Iterator[list[Any]]:
    kinds = dict.fromkeys((row["metric"], row["visible"]) for run in dataset.runs for row in run.rows)
    scenario = {setting: name for name, settings in dataset.scenarios.items() for setting in settings}
    for metric, visible in kinds:
        values = dataset.values(metric, visible)
        means = {place: Spread.of(seeds.values()).mean for place, seeds in values.items()}
        best: dict[str, str] = {}
        for setting, method in values:
            if method in dataset.candidates:
                best[setting] = max(best.get(setting, method), method, key=lambda m: means[setting, m])
        for (setting, method), seeds in values.items():
            s, first = Spread.of(seeds.values()), best.get(setting, method)
            test = paired(values[setting, first], seeds) if first != method else None
            p = "" if test is None or test.p is None else f"{test.p:.4g}"
            std = "" if s.std is None else f"{s.std:.6g}"
            names = [dataset.data, scenario[setting], setting, method, visible, metric]
            yield [*names, f"{s.mean:.6g}", std, s.n, " ".join(str(draw.seed) for draw in sorted(seeds)), p]


def costs_csv(datasets: Sequence[DatasetResults], rows: Sequence[Sequence[CostRow]]) -> str:
    """One line a data set and method, in plain numbers (bytes, seconds)."""
    fields = list(CostRow.__dataclass_fields__)
    lines = (
        [dataset.data, *(_plain(getattr(row, field)) for field in fields)]
        for dataset, of_dataset in zip(datasets, rows, strict=True)
        for row in of_dataset
    )
    return _csv(["data", *fields], lines)


ROUND = ("round", "client", "name", "lr", "up_bytes", "down_bytes", "server_s", "wall_s")


def rounds_csv(datasets: Sequence[DatasetResults]) -> str:
    """One line a round of a run: its costs, its mean loss, and the metrics of the global adapter after it, if evaluated.

    `client` and `name` say whose rounds they are if a client trains alone; `sites` lists the clients that were averaged, by
    name if their rows name them.
    """
    kinds = dict.fromkeys(
        (name, event["visible"]) for d in datasets for run in d.runs for event in run.evals for name in event["metrics"]
    )
    head = ["data", "setting", "method", "seed", "run_id", *ROUND, "sites", "num_clients", "num_dropped", "loss"]
    head += [f"{name} ({visible})" for name, visible in kinds]
    return _csv(head, (line for d in datasets for run in d.runs for line in _round_lines(run, list(kinds))))


def _round_lines(run: RunRecord, kinds: Sequence[tuple[str, str]]) -> Iterator[list[Any]]:
    scores: dict[tuple[Any, Any], dict[tuple[str, str], Any]] = {}
    for event in run.evals:
        at = scores.setdefault((event.get("client"), event.get("round")), {})
        at |= {(name, event["visible"]): value for name, value in event["metrics"].items()}
    for event in run.rounds:
        clients = event.get("clients") or []
        rows = sum(c.get("num_examples") or 0 for c in clients)
        losses = [(c.get("num_examples") or 0, c["loss"]) for c in clients if isinstance(c.get("loss"), (int, float))]
        loss = sum(n * value for n, value in losses) / rows if rows and len(losses) == len(clients) else None
        found = scores.get((event.get("client"), event["round"]), {})
        values = [event.get(key) for key in ROUND]
        about = [run.data, run.setting, run.method, run.seed, run.run_id]
        sites = "; ".join(str(c.get("name", c.get("client", ""))) for c in clients)
        counts = [sites, len(clients), len(event.get("dropped") or []) + len(event.get("dropped_out") or []), loss]
        yield [*about, *map(_plain, [*values, *counts, *(found.get(kind) for kind in kinds)])]


def _plain(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def _csv(head: Sequence[str], lines: Iterator[list[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return buffer.getvalue()


def settings_markdown(meanings: Mapping[str, str]) -> str:
    """A legend of the settings."""
    return "\n".join(f"- {setting}: {meaning}" for setting, meaning in meanings.items()) + "\n"


def _head(words: Sequence[str], numbers: Sequence[str]) -> list[str]:
    return [_line([*words, *numbers]), _line(["---"] * len(words) + ["---:"] * len(numbers))]


def _line(words: Sequence[str]) -> str:
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]
