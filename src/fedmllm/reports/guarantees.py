"""Privacy of a report's runs.

Claims with all that they need to name, the price of the noise, and audits.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmllm.core.errors import FedmllmError
from fedmllm.reports.names import metric_label
from fedmllm.reports.numerals import DASH, counted
from fedmllm.reports.reading import DatasetResults, RunRecord

AUDITS = "audit*.json"  # as `fedmllm audit --out` writes them, in the folder of a run or above it
# Settings that differ between a run with privacy and the same run without: what privacy requires, and what changes no result.
_NOT_COMPARED = ("privacy", "update_filter", "cohort", "engine", "checkpoint", "imports")
_FACTS = {
    "unit": "unit",
    "relation": "relation",
    "adversary": "adversary",
    "delta": "delta",
    "accountant": "accountant",
    "noise_multiplier": "noise multiplier",
    "clip": "clip",
    "denominator": "denominator of the mean",
    "num_releases": "releases counted",
    "sampling": "sampling",
    "noise": "noise",
}


@dataclass(frozen=True)
class PrivacyTable:
    """The privacy of one method in one setting, over its seeds.

    Attributes:
        method: As in the other tables.
        setting: As in the other tables.
        epsilon: The claim in a few words: the largest epsilon of the runs, or why there is none.
        facts: Label -> text, all that the claim needs to mean something.
    """

    method: str
    setting: str
    epsilon: str
    facts: Mapping[str, str]


def privacy_tables(dataset: DatasetResults) -> list[PrivacyTable]:
    """The privacy of all runs that state one.

    Args:
        dataset: Runs on one data set.

    Returns:
        One table for each method and setting.
    """
    found = []
    for setting in dataset.settings:
        for method in dataset.methods:
            runs = [run for run in dataset.pick(setting, method) if run.guarantee]
            if runs:
                found.append(_table(dataset, runs))
    return found


def _table(dataset: DatasetResults, runs: Sequence[RunRecord]) -> PrivacyTable:
    stated = [run.guarantee or {} for run in runs]
    worst = max(stated, key=lambda one: float("inf") if one["epsilon"] is None else one["epsilon"])
    claim = str(worst["claim"])
    facts = {"claim": claim}
    for key, label in _FACTS.items():
        facts[label] = _joined(
            DASH if key == "denominator" and not one.get(key) else _text(one.get(key)) for one in stated
        )  # row-dp has no mean of clients
    facts["who knows the draw"] = _joined(
        "the one who draws, and epsilon counts that" if one["sampling_is_secret"] else "everyone; it does not help"
        for one in stated
    )
    facts["outside of the guarantee"] = _joined(text for one in stated for text in one["outside"])
    facts |= {"utility": _utility(dataset, runs), "audit": _audits(runs)}
    return PrivacyTable(runs[0].method, runs[0].setting, claim, facts)


def _joined(texts: Any) -> str:
    return "; ".join(dict.fromkeys(texts))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _utility(dataset: DatasetResults, runs: Sequence[RunRecord]) -> str:
    """Mean of the main metric with noise and without it, over the seeds that have both."""
    without = {_key(run): run for run in dataset.runs if not run.guarantee}
    pairs = []
    for run in runs:
        metric, visible = run.headline
        other = without.get(_key(run))
        values = [r.value(metric, visible) for r in (run, other) if r]
        if len(values) == 2 and None not in values:
            pairs.append([float(value or 0.0) for value in values])
    if not pairs:
        return "no run without noise on the same seeds is in this report"
    noisy, plain = (statistics.fmean(side) for side in zip(*pairs, strict=True))
    metric = metric_label(runs[0].headline[0])
    return f"{metric} {noisy:.3f}, without noise {plain:.3f} on the same {counted(len(pairs), 'seed')}"


def _key(run: RunRecord) -> str:
    settings = {key: value for key, value in run.settings.items() if key not in _NOT_COMPARED}
    settings["train"] = {**settings["train"], "clip_norm": 0}  # row-dp clips rows instead
    return json.dumps([settings, run.draw], sort_keys=True, default=str)


def _audits(runs: Sequence[RunRecord]) -> str:
    """Return the results of the audits of these runs, by the run ids that their files name."""
    texts = []
    for run in runs:
        for path in sorted({*run.folder.glob(AUDITS), *run.folder.parent.glob(AUDITS)}):
            try:
                table = json.loads(path.read_text(encoding="utf-8"))
                if table["run_id"] != run.run_id:
                    continue
                for row in table["rows"]:
                    bound = (
                        f"epsilon at least {row['bound']:.3g}" if row["kind"] == "one-run" else f"{row['bound']:.3g}"
                    )
                    result = row["reason"] or "not broken by this attack"
                    texts.append(f"{row['kind']}: {bound}; claimed {row['claim']}; {row['attack']}; {result}")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise FedmllmError(f"{path}: not a table of `fedmllm audit`: {type(error).__name__}: {error}") from None
    return _joined(texts) or "none in the folders of these runs (`fedmllm audit EXPERIMENT.toml --out RUN/audit.json`)"


def shared_facts(tables: Sequence[PrivacyTable]) -> dict[str, str]:
    """The facts that all tables have in common, which a page needs to state once.

    Args:
        tables: Of one data set.

    Returns:
        Label -> text; {} for a single table, whose facts stand together.
    """
    if len(tables) < 2:
        return {}
    first, *others = (table.facts for table in tables)
    return {fact: text for fact, text in first.items() if all(other[fact] == text for other in others)}


def privacy_markdown(tables: Sequence[PrivacyTable]) -> str:
    """The tables as Markdown: what they share as a list, then one row a method and setting.

    Args:
        tables: Of one data set.

    Returns:
        Text that ends with a line feed.
    """
    shared = shared_facts(tables)
    lines = [f"- {fact}: {text}" for fact, text in shared.items()]
    lines += [""] if shared else []
    own = [fact for fact in tables[0].facts if fact not in shared]
    lines += ["| method | setting | " + " | ".join(own) + " |", "|---|---|" + "---|" * len(own)]
    for table in tables:
        lines.append(f"| {table.method} | {table.setting} | " + " | ".join(table.facts[fact] for fact in own) + " |")
    return "\n".join(lines) + "\n"
