"""First screen of a report: three sentences and a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmllm.reports.comparisons import Comparison, mean_over_settings
from fedmllm.reports.names import AS_THEY_ARE, GROUPS, base_of, metric_label, visible_label
from fedmllm.reports.numerals import NO_BREAK, Scale, counted, counted_range, listed_words
from fedmllm.reports.reading import BySeed, DatasetResults
from fedmllm.reports.row_error import row_error
from fedmllm.reports.rows import RowResults
from fedmllm.reports.stats import LEVEL, Paired, Spread, mean_of, paired
from fedmllm.reports.tables import ResultTable
from fedmllm.runs.slices import BY_SHOWS

_GAPS = AS_THEY_ARE.capitalize()
MOST_LISTED = 6  # federated methods; that many or more are summed up


@dataclass(frozen=True)
class Answer:
    """A question of the first screen, and its answer in one sentence."""

    question: str
    text: str


@dataclass(frozen=True)
class Group:
    """Settings of one kind: the mean over the federated methods, and over each baseline."""

    name: str
    settings: tuple[str, ...]
    federated: BySeed
    methods: Mapping[str, BySeed]
    baselines: Mapping[str, BySeed]
    is_complete: bool  # rows with every modality: what the others are compared with
    loss: Paired | None = None  # against the complete rows, or the rows as they are, over the federated methods

    @property
    def spread(self) -> Spread:
        return Spread.of(self.federated.values())


def groups(dataset: DatasetResults) -> list[Group]:
    """Complete rows, random rows, mixed sites, one-modality sites: those that the runs have, over the methods in all.

    The complete group has the settings whose rows are split over sites as in the others, if there are any, so that the cost
    of label skew is not counted with that of missing data.
    """
    scenarios = [s for s in (*GROUPS, *dataset.scenarios) if s in dataset.scenarios]
    chosen = {name: _alike(dataset, name) for name in dict.fromkeys(scenarios)}
    values, plain = dataset.values(), dataset.plain()
    complete = next((n for n in chosen if n == "aligned" and _is_complete(dataset, chosen[n])), None)
    methods = [m for m in plain.candidates if all(mean_over_settings(values, m, s) for s in chosen.values())]
    found: list[Group] = []
    for scenario, settings in chosen.items():
        of_method = {m: mean_over_settings(values, m, settings) for m in methods}
        federated = mean_of(list(of_method.values()))
        if federated:
            lines = [m for m in plain.methods if m not in plain.candidates and plain.roles.get(m) != "control"]
            baselines = {m: mean_over_settings(values, m, settings) for m in lines}
            name = GROUPS.get(scenario, scenario) if scenario != "aligned" or scenario == complete else _GAPS
            whole = found[0].federated if found and (found[0].is_complete or found[0].name == _GAPS) else None
            loss = paired(federated, whole) if whole else None
            baselines = {m: seeds for m, seeds in baselines.items() if seeds}
            found.append(Group(name, tuple(settings), federated, of_method, baselines, scenario == complete, loss))
    return found


def _alike(dataset: DatasetResults, scenario: str) -> list[str]:
    """Settings of a scenario; of aligned, those that are split as in another scenario, if there are any."""
    settings = dataset.scenarios[scenario]
    if scenario != "aligned":
        return settings
    split = {s: dataset.pick(s)[0].settings["partition"] for s in dataset.settings}
    others = [split[s] for name, several in dataset.scenarios.items() if name != "aligned" for s in several]
    return [s for s in settings if split[s] in others] or settings


def _is_complete(dataset: DatasetResults, settings: Sequence[str]) -> bool:
    return all(run.is_complete is not False for setting in settings for run in dataset.pick(setting)[:1])


def ranked(dataset: DatasetResults, table: ResultTable) -> tuple[dict[str, BySeed], list[str]]:
    """(federated methods over the draws that all of them have, best first; methods without a shared draw, left out)."""
    values = dataset.values(table.metric)
    overall = {m: mean_over_settings(values, m, dataset.settings) for m in table.methods if m in dataset.candidates}
    kept: list[str] = []
    for method in sorted(overall, key=lambda m: -len(overall[m])):  # most seeds first
        if mean_of([overall[m] for m in (*kept, method)]):
            kept.append(method)
    shared = mean_of([overall[m] for m in kept])
    found = {m: {draw: overall[m][draw] for draw in shared} for m in kept}
    ordered = sorted(found, key=lambda m: _mean(found[m]), reverse=table.scale.higher_is_better)
    return {m: found[m] for m in ordered}, [m for m in overall if m not in found]


def answers(
    dataset: DatasetResults,
    table: ResultTable,
    pairs: Sequence[Comparison],
    chart: Sequence[Group],
    rows: Sequence[RowResults] = (),
) -> list[Answer]:
    """Return the answers of the first screen: the method to use, the cost of missing data, the certainty."""
    if dataset.metric in dataset.undefined:
        name = metric_label(dataset.metric)
        reason = " (AUC needs test rows of both classes)" if dataset.metric.startswith("auc") else ""
        return [
            Answer("Result", f"{name} is not defined on the test rows of these runs{reason}: there is no comparison.")
        ]
    found = [
        Answer("What to use", _use(dataset, table, pairs)),
        Answer("What missing data costs", " ".join(filter(None, [_gaps(rows), _costs(table.scale, chart)]))),
    ]
    found.append(Answer("How sure this is", _certainty(dataset, table, pairs, rows)))
    return [answer for answer in found if answer.text]


def _use(dataset: DatasetResults, table: ResultTable, pairs: Sequence[Comparison]) -> str:
    federated, left_out = ranked(dataset, table)
    scale, name, num = table.scale, metric_label(table.metric), len(dataset.settings)
    over = f" on average over {num} settings" if num > 1 else ""
    if not federated:
        listing = [
            f"{_with_role(table, m)} {scale.value(_mean(s))}" for m in table.methods if (s := _of(dataset, table, m))
        ]
        kinds = " but controls and bounds" if table.roles else ""
        return (
            f"No federated method{kinds} is here in every setting; {name} of the "
            f"{'others' if kinds else 'baselines'}: {listed_words(listing)}."
            if listing
            else ""
        )
    methods, means = list(federated), [_mean(seeds) for seeds in federated.values()]
    best = _established(methods, pairs)
    baselines = _baselines(dataset, table, mean_of(list(federated.values())), pairs if best else ())
    omitted = f" {listed_words(left_out)}: no seed shared with the others, so not compared." if left_out else ""
    if len(methods) == 1:
        only = "" if left_out else ", the only federated method here,"
        reached = f"{scale.value(means[0])} {name}{over}"
        return f"{methods[0]}{only} reaches {reached}{baselines}.{omitted}"
    if best:
        lead = scale.difference(min(abs(means[0] - mean) for mean in means[1:])).lstrip("+")
        num_others = len(methods) - 1
        above = (
            f"{lead} above {methods[1]}"
            if num_others == 1
            else f"at least {lead} above the other {num_others} federated methods"
        )
        return f"Use {best}: {scale.value(means[0])} {name}{over}, {above}{baselines}.{omitted}"
    if len(methods) < MOST_LISTED:
        reach = listed_words([f"{m} {scale.value(mean)}" for m, mean in zip(methods, means, strict=True)])
    else:
        lowest = scale.number(means[-1])
        reach = f"{len(methods)} federated methods from {lowest} to {scale.value(means[0])} ({methods[0]})"
    unsure = _unsure(methods, pairs, scale)
    return f"No method is established as best: {reach} {name}{over}; {unsure}{baselines}.{omitted}"


def _unsure(methods: Sequence[str], pairs: Sequence[Comparison], scale: Scale) -> str:
    """The reason that the first method is not called the best: the first lead that is not established."""
    first, of_pair = methods[0], {frozenset((c.higher, c.lower)): c for c in pairs}
    for other in methods[1:]:
        c = of_pair.get(frozenset((first, other)))
        if c is None or c.test.p is None:
            return "no tests" if c is None or c.test.n > 1 else "one shared seed: no tests"
        if c.higher != first:
            return f"over the seeds that they share {other} is above {first}"
        if not c.is_established:
            return f"the lead over {other}, {scale.difference(c.test.difference).lstrip('+')}, is {c.needed_text}"
        if c.disagrees:
            return f"{first} is above {other} in the mean, but below it in most cells"
    return "no tests"


def _established(methods: Sequence[str], pairs: Sequence[Comparison]) -> str:
    """The method that is above every other federated one, in its mean and in most cells; "" if there is none."""
    first = methods[0]
    above = {c.lower: c for c in pairs if c.higher == first}
    rest = [above.get(m) for m in methods[1:]]
    return first if rest and all(c and c.is_established and not c.disagrees for c in rest) else ""


def _of(dataset: DatasetResults, table: ResultTable, method: str) -> BySeed:
    return mean_over_settings(dataset.values(table.metric), method, dataset.settings)


def _baselines(dataset: DatasetResults, table: ResultTable, mean: BySeed, pairs: Sequence[Comparison]) -> str:
    """ "; Local 57.6 %, Zero-shot 55.9 %"."""
    found = []
    for method in table.methods:
        if method not in dataset.candidates and base_of(method, table.methods) is None:
            own = _of(dataset, table, method)
            if test := paired(mean, own):
                shared = {draw: own[draw] for draw in own if draw in mean}
                sure = "" if test.p is None or test.p < LEVEL else ", difference not established"
                found.append(f"{_with_role(table, method)} {table.scale.value(_mean(shared))}{sure}")
    return f"; {listed_words(found)}" if found else ""


def _with_role(table: ResultTable, method: str) -> str:
    """ "FedAvg + oracle (bound)"; a baseline's name alone."""
    return f"{method} ({table.roles[method]})" if method in table.roles else method


def _costs(scale: Scale, chart: Sequence[Group]) -> str:
    complete = next((group for group in chart if group.is_complete or group.name == _GAPS), None)
    if complete is None:
        return ""
    found = []
    for group in chart:
        if group.loss is not None:
            unsure = group.loss.p is not None and group.loss.p >= LEVEL
            name = group.name[0].lower() + group.name[1:]
            amount = scale.difference(group.loss.difference).replace(f"{NO_BREAK}points", "")
            found.append(f"{name} {amount}" + (" (not established)" if unsure else ""))
    if not found:
        return ""
    start = scale.value(complete.spread.mean)
    losses = listed_words(found)
    if not complete.is_complete:
        return f"Hiding more in training, from {start} on the rows as they are: {losses} {scale.points}."
    return f"From {start} on complete rows, split over sites alike: {losses} {scale.points}, mean of federated methods."


def _gaps(rows: Sequence[RowResults]) -> str:
    """Results by what a test row has, if test rows have gaps; and what hiding more from complete ones costs."""
    found = next((one for one in rows if one.has_gaps), None)
    if found is None:
        return ""
    scale, parts = found.scale, []
    for one in found.by(BY_SHOWS):
        estimate = one.federated or next(iter(one.cells.values()))
        if estimate.value is not None:
            parts.append(f"{scale.value(estimate.value)} on test rows with {one.name} ({one.num_rows})")
    text = f"{metric_label(found.metric)} of the federated methods: {listed_words(parts)}." if len(parts) > 1 else ""
    if not found.federated:
        text = f"{metric_label(found.metric)} of {found.methods[0]}: {listed_words(parts)}." if len(parts) > 1 else ""
    lost = []
    for hidden in found.hidden:
        test = hidden.test
        interval = "" if test.low is None or test.high is None else f" ({scale.interval(test.low, test.high)})"
        lost.append(f"{visible_label(hidden.visible)} {scale.difference(test.difference)}{interval}")
    if lost:
        text += f" The same rows with less visible: {listed_words(lost)}."
    return text[:1].upper() + text[1:]


def _certainty(
    dataset: DatasetResults, table: ResultTable, pairs: Sequence[Comparison], rows: Sequence[RowResults]
) -> str:
    scale, seeds = table.scale, table.seeds(dataset.candidates)
    if table.seeds()[1] < 2:
        parts = ["One seed: no tests, and differences may be noise"]
    elif (found := table.detectable_mean) is not None:
        least = scale.difference(found.difference).lstrip("+")
        parts = [f"With {counted_range(seeds, 'seed')}, a difference of {found.of} below {least} may go undetected"]
        federated = [c for c in pairs if {c.higher, c.lower} <= set(dataset.candidates) and not c.is_established]
        if federated and federated[0].needed:
            c = federated[0]
            parts[0] += f" ({c.higher} and {c.lower}: about {counted(c.needed or 0, 'seed')} needed)"
    else:
        parts = [counted_range(seeds, "seed")]
    if error := row_error(dataset, table, rows):
        parts.append(error.interval_text(scale))
    return "; ".join(parts) + "."


def _mean(seeds: BySeed) -> float:
    return sum(seeds.values()) / len(seeds)
