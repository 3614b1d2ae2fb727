"""What a chapter shows, in sentences; each claim bears its paired test over seeds and how many seeds there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from fedmllm.report.names import metric_label
from fedmllm.report.reading import Chapter, Seeds
from fedmllm.report.stats import Paired, Spread, mean_over_settings, paired
from fedmllm.report.tables import Results

LOST = {
    "missing": "Rows that lost text or image at random",
    "cross": "Clients that see only images or only text",
    "hybrid": "Clients that each keep a modality by chance",
}


@dataclass(frozen=True)
class Finding:
    """A sentence, the test behind it, and whether it is more than noise (None: nothing is claimed)."""

    text: str
    detail: str = ""
    is_clear: bool | None = None


def findings(chapter: Chapter, table: Results) -> list[Finding]:
    """The short list at the top of the page."""
    values = chapter.values(table.metric)
    federated = [m for m in table.methods if chapter.pick(method=m)[0].federated]
    overall = {m: mean_over_settings(values, m, chapter.settings) for m in table.methods}
    overall = {m: seeds for m, seeds in overall.items() if seeds}
    ranked = sorted((m for m in federated if m in overall), key=lambda m: -_mean(overall[m]))
    found: list[Finding] = []
    if ranked:
        best, name = ranked[0], metric_label(table.metric)
        num = len(chapter.settings)
        over = f"{name} {_percent(overall[best])}" + (f", mean of {num} settings" if num > 1 else "")
        text = f"{best} comes first of the federated methods: {over}"
        if len(ranked) > 1:
            found.append(_tested(f"{text}. Its lead over {ranked[1]}:", paired(overall[best], overall[ranked[1]])))
        else:
            found.append(Finding(text + "."))
        for baseline in (m for m in table.methods if m in overall and m not in federated):
            words = f"{best} against {baseline} ({_percent(overall[baseline])}):"
            found.append(_tested(words, paired(overall[best], overall[baseline])))
        found += losses(chapter, values, best)
    found += strategies(overall)
    found += agreement(table, values)
    return found


def losses(chapter: Chapter, values: Mapping[tuple[str, str], Seeds], method: str) -> list[Finding]:
    """What each scenario costs against complete rows."""
    groups = {s: mean_over_settings(values, method, settings) for s, settings in chapter.scenarios.items()}
    whole = groups.get("aligned", {})
    return [
        _tested(f"{LOST[scenario]}: {method} goes from {_percent(whole)} to {_percent(seeds)},", paired(seeds, whole))
        for scenario, seeds in groups.items()
        if scenario in LOST and whole and seeds
    ]


def strategies(overall: Mapping[str, Seeds]) -> list[Finding]:
    """A method with an addition against the method without: "FedAdam, agnostic prompt" against "FedAdam"."""
    found = []
    for method in overall:
        parts = method.split(", ")
        plain = [m for m in overall if m != method and _without(parts, m.split(", "))]
        for base in plain[:1]:
            found.append(_tested(f"{method} against {base}:", paired(overall[method], overall[base])))
    return found


def _without(parts: list[str], base: list[str]) -> bool:
    """Is `base` the same method with a plain word, or none, where `parts` has another one?"""
    plain = {"plain", "none", "-"}
    if len(base) == len(parts):
        different = [(p, b) for p, b in zip(parts, base, strict=True) if p != b]
        return len(different) == 1 and different[0][1] in plain
    return len(base) == len(parts) - 1 and base[0] == parts[0] and len(base) == 1


def agreement(table: Results, values: Mapping[tuple[str, str], Seeds]) -> list[Finding]:
    """Of the published orderings of two methods in a setting: how many do we find, and how many of those that are stable."""
    told = agreements(table, values)
    if table.published is None or not told:
        return []
    stable = [same for same, is_stable in told if is_stable]
    text = (
        f"Of {len(told)} published orderings of two methods in a setting, {sum(s for s, _ in told)} are found here; of the "
        f"{len(stable)} that come out the same way for every one of our seeds, {sum(stable)} agree."
    )
    p = table.published
    other = "" if p.same_data else f"Published: {p.title} with {p.model}, single runs; here: another model and data."
    return [Finding(text, other)]


def agreements(table: Results, values: Mapping[tuple[str, str], Seeds]) -> list[tuple[bool, bool]]:
    """(same direction as published?, same direction in every seed?) of each setting and pair of methods."""
    told = []
    published = table.published.values if table.published else {}
    for row in table.rows:
        shared = [
            m for m in table.methods if m in published and row.setting in published[m] and (row.setting, m) in values
        ]
        for a, b in combinations(shared, 2):
            ours = [
                values[row.setting, a][k] - values[row.setting, b][k]
                for k in values[row.setting, a]
                if k in values[row.setting, b]
            ]
            theirs = published[a][row.setting] - published[b][row.setting]
            if ours and theirs:
                mean = sum(ours) / len(ours)
                told.append((mean * theirs > 0, all(d * mean > 0 for d in ours) and len(ours) > 1))
    return told


def _mean(seeds: Seeds) -> float:
    return sum(seeds.values()) / len(seeds)


def _percent(seeds: Seeds) -> str:
    s = Spread.of(list(seeds.values()))
    return f"{100 * s.mean:.1f}" + (f" ± {100 * s.std:.1f} %" if s.std is not None else " %")


def _tested(text: str, test: Paired | None) -> Finding:
    if test is None:
        return Finding(f"{text} no shared seed.")
    points = f"{text} {100 * test.difference:+.1f} points"
    if test.p is None:
        return Finding(f"{points}.", "One seed: this cannot be told from noise.", False)
    interval = f"95 % interval {100 * (test.low or 0):+.1f} to {100 * (test.high or 0):+.1f}"
    p = p_text(test.p)
    detail = f"Paired t-test over {test.n} seeds: p {p if '<' in p else f'= {p}'}; {interval}."
    return Finding(f"{points}{'' if test.p < 0.05 else ', within noise'}.", detail, test.p < 0.05)


def p_text(p: float | None) -> str:
    """0.0312 -> "0.031"; tiny ones as "< 0.001"."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
