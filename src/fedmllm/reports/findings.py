"""Findings in sentences, each with its paired test over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from fedmllm.reports.names import base_of, metric_label
from fedmllm.reports.reading import DatasetResults, Seeds
from fedmllm.reports.stats import Paired, Spread, holm, mean_over_settings, paired
from fedmllm.reports.tables import ResultTable

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
    tag: str = "note"  # "clear", "weak" = more than noise taken alone but not among all claims, "noise"


Claim = tuple[str, Paired | None]  # a sentence that wants a difference, and its test; None = no shared seed


def findings(dataset: DatasetResults, table: ResultTable) -> list[Finding]:
    """The short list at the top of the page. Its claims are tested together: Holm's correction over all of them."""
    values = dataset.values(table.metric)
    federated = [m for m in table.methods if dataset.pick(method=m)[0].federated]
    overall = {m: mean_over_settings(values, m, dataset.settings) for m in table.methods}
    overall = {m: seeds for m, seeds in overall.items() if seeds}
    ranked = sorted((m for m in federated if m in overall), key=lambda m: -_mean(overall[m]))
    notes: list[Finding] = []
    claims: list[Claim] = []
    if ranked:
        best, name = ranked[0], metric_label(table.metric)
        num = len(dataset.settings)
        reached = f"{name} {_percent(overall[best])}" + (f", mean of {num} settings" if num > 1 else "")
        if len(ranked) > 1:
            text = f"{best} comes first of {len(ranked)} federated methods: {reached}. Its lead over {ranked[1]}:"
            claims.append((text, paired(overall[best], overall[ranked[1]])))
        else:
            notes.append(Finding(f"{best} is the only federated method here: {reached}."))
        for baseline in (m for m in overall if m not in federated and base_of(m, overall) is None):
            words = f"{best} against {baseline} ({_percent(overall[baseline])}):"
            claims.append((words, paired(overall[best], overall[baseline])))
        claims += losses(dataset, values, best)
    claims += additions({m: overall[m] for m in ranked})
    corrected = holm({str(i): test.p for i, (_, test) in enumerate(claims) if test and test.p is not None})
    tests = [claim_finding(text, test, corrected.get(str(i)), len(corrected)) for i, (text, test) in enumerate(claims)]
    return [*notes, *tests, *agreement(table, values)]


def losses(dataset: DatasetResults, values: Mapping[tuple[str, str], Seeds], method: str) -> list[Claim]:
    """What each scenario costs against complete rows that were split over clients in the same way, where there are such."""
    split = {setting: dataset.pick(setting)[0].settings["partition"] for setting in dataset.settings}
    complete = dataset.scenarios.get("aligned", [])
    found: list[Claim] = []
    for scenario, settings in dataset.scenarios.items():
        alike = [s for s in complete if split[s] in [split[other] for other in settings]]
        whole = mean_over_settings(values, method, alike or complete)
        seeds = mean_over_settings(values, method, settings)
        if scenario in LOST and whole and seeds:
            words = "complete rows, split alike" if alike else "complete rows"
            text = f"{LOST[scenario]}: {method} goes from {_percent(whole)} ({words}) to {_percent(seeds)},"
            found.append((text, paired(seeds, whole)))
    return found


def additions(overall: Mapping[str, Seeds]) -> list[Claim]:
    """What an addition is worth, "agnostic prompt" for one: the mean over all methods that were run with it and without."""
    found: dict[str, list[tuple[str, str]]] = {}
    for method in overall:
        if base := base_of(method, overall):
            found.setdefault(base[1], []).append((method, base[0]))
    claims: list[Claim] = []
    for addition, pairs in found.items():
        seeds = set.intersection(*(overall[with_it].keys() & overall[without].keys() for with_it, without in pairs))
        sides = [{k: statistics.fmean(overall[pair[side]][k] for pair in pairs) for k in seeds} for side in (0, 1)]
        one = f"{pairs[0][0]} against {pairs[0][1]}:"
        several = f"{addition}: {len(pairs)} methods with it against the same without, on average"
        claims.append((one if len(pairs) == 1 else several, paired(*sides)))
    return claims


def agreement(table: ResultTable, values: Mapping[tuple[str, str], Seeds]) -> list[Finding]:
    """Of the published orderings of two methods in a setting: how many do we find, and how many of those that are stable."""
    pairs = agreements(table, values)
    if table.published is None or not pairs:
        return []
    stable = [same for same, is_stable in pairs if is_stable]
    text = (
        f"Of {len(pairs)} published orderings of two methods in a setting, {sum(s for s, _ in pairs)} are found here; of the "
        f"{len(stable)} that come out the same way for every one of our seeds, {sum(stable)} agree."
    )
    p = table.published
    other = "" if p.same_data else f"Published: {p.title} with {p.model}, single runs; here: another model and data."
    return [Finding(text, other)]


def agreements(table: ResultTable, values: Mapping[tuple[str, str], Seeds]) -> list[tuple[bool, bool]]:
    """(same direction as published?, same direction in every seed?) of each setting and pair of methods."""
    found = []
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
                found.append((mean * theirs > 0, all(d * mean > 0 for d in ours) and len(ours) > 1))
    return found


def _mean(seeds: Seeds) -> float:
    return sum(seeds.values()) / len(seeds)


def _percent(seeds: Seeds) -> str:
    s = Spread.of(list(seeds.values()))
    return f"{100 * s.mean:.1f}" + (f" ± {100 * s.std:.1f} %" if s.std is not None else " %")


def claim_finding(text: str, test: Paired | None, p_holm: float | None, num_claims: int) -> Finding:
    """The claim with what may be said of it; `p_holm` is corrected for all `num_claims`."""
    if test is None:
        return Finding(f"{text} no shared seed.")
    points = f"{text} {100 * test.difference:+.1f} points"
    if test.p is None or p_holm is None:
        return Finding(f"{points}.", "One seed: no test is possible.", False, "noise")
    interval = f"95 % interval {100 * (test.low or 0):+.1f} to {100 * (test.high or 0):+.1f}"
    among = f", {p_text(p_holm)} as one of {num_claims} claims" if num_claims > 1 else ""
    detail = f"Paired t-test over {test.n} seeds: p {_equals(test.p)}{among}; {interval}."
    if p_holm < 0.05:
        return Finding(f"{points}.", detail, True, "clear")
    if test.p < 0.05:
        return Finding(
            f"{points}: more than noise taken alone, not as one of {num_claims} claims.", detail, False, "weak"
        )
    return Finding(f"{points}, within noise.", detail, False, "noise")


def _equals(p: float) -> str:
    return text if "<" in (text := p_text(p)) else f"= {text}"


def p_text(p: float | None) -> str:
    """0.0312 -> "0.031"; tiny ones as "< 0.001"."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
