"""Comparisons of methods, corrected together: declared claims, or pairs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from fedmllm.reports.names import base_of
from fedmllm.reports.numerals import counted
from fedmllm.reports.reading import BySeed, DatasetResults, Draw, RunRecord
from fedmllm.reports.stats import LEVEL, Paired, holm, mean_of, paired


@dataclass(frozen=True)
class Comparison:
    """Two sides, the test of their difference, and what it establishes among `family` tests made together."""

    higher: str
    lower: str
    test: Paired
    p_holm: float | None = None  # corrected for the family
    family: int = 1  # tests that are corrected together
    wins: int = 0  # (setting, seed) cells in which the first is strictly above the second
    cells: int = 0
    stable: tuple[str, ...] = ()  # settings in which the first is above the second for every seed
    reversed: tuple[str, ...] = ()  # settings in which the second is above the first for every seed
    text: str = ""  # of a declared claim
    declared: bool = False

    @property
    def is_established(self) -> bool:
        """True if the difference is above zero at the 5 % level, after the correction."""
        return self.p_holm is not None and self.p_holm < LEVEL and self.test.difference > 0

    @property
    def disagrees(self) -> bool:
        """True if mean and number of cells point to different methods."""
        return 2 * self.wins < self.cells

    @property
    def needed(self) -> int | None:
        """Seeds with which a true difference of this size would be established in this family."""
        return self.test.needed(LEVEL / self.family)

    @property
    def needed_text(self) -> str:
        """ "not established with 10 seeds, about 14 needed"."""
        return not_established(self.test, self.family)


def not_established(test: Paired, family: int = 1) -> str:
    """Return the verdict on a test whose corrected p is 0.05 or above.

    Args:
        test: Over seeds.
        family: Tests that are corrected together.

    Returns:
        "not established with 10 seeds, about 14 needed".
    """
    needed = test.needed(LEVEL / family)
    words = "over 10,000" if needed is None else f"about {needed:,}"
    return f"not established with {counted(test.n, 'seed')}, {words} needed"


def mean_over_settings(values: Mapping[tuple[str, str], BySeed], method: str, settings: Sequence[str]) -> BySeed:
    """Draw -> mean over the settings; a draw that lacks one of them is left out."""
    return mean_of([values.get((setting, method), {}) for setting in settings])


def all_pairs(dataset: DatasetResults, metric: str = "", visible: str = "") -> list[Comparison]:
    """Every pair of methods with a candidate among them, the higher mean first, over the draws that both have.

    These pairs are one family, each counted once: the best method is chosen on the same results, and the correction for all
    of them covers that choice. Baselines, controls and bounds are not compared with each other.
    """
    values = dataset.values(metric, visible)
    found = []
    for a, b in combinations(dataset.methods, 2):
        if a in dataset.candidates or b in dataset.candidates:
            found += _pair(dataset, values, a, b)
    order = {m: n for n, m in enumerate(sorted(dataset.methods, key=lambda m: -_overall(values, m)))}
    return corrected(sorted(found, key=lambda c: (order[c.higher], order[c.lower])))


def _pair(dataset: DatasetResults, values: Mapping[tuple[str, str], BySeed], a: str, b: str) -> list[Comparison]:
    shared = [s for s in dataset.settings if values.get((s, a)) and values.get((s, b))]
    test = paired(mean_over_settings(values, a, shared), mean_over_settings(values, b, shared))
    if test is None:
        return []
    if test.difference < 0:
        return _pair(dataset, values, b, a)
    cells = {s: [(x, values[s, b][k]) for k, x in values[s, a].items() if k in values[s, b]] for s in shared}
    flat = [pair for several in cells.values() for pair in several]
    return [
        Comparison(
            higher=a,
            lower=b,
            test=test,
            wins=sum(x > y for x, y in flat),
            cells=len(flat),
            stable=tuple(s for s, several in cells.items() if several and all(x > y for x, y in several)),
            reversed=tuple(s for s, several in cells.items() if several and all(x < y for x, y in several)),
        )
    ]


def corrected(tests: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with Holm's correction over all of them that have a test."""
    p_values = {str(i): c.test.p for i, c in enumerate(tests) if c.test.p is not None}
    adjusted = holm(p_values)
    return [replace(c, p_holm=adjusted.get(str(i)), family=max(1, len(p_values))) for i, c in enumerate(tests)]


def _overall(values: Mapping[tuple[str, str], BySeed], method: str) -> float:
    own = [value for (_, m), seeds in values.items() if m == method for value in seeds.values()]
    return statistics.fmean(own) if own else 0.0


def additions(dataset: DatasetResults) -> list[Comparison]:
    """An addition, "agnostic prompt" for one, over all methods that were run with it and without; a family of its own."""
    values, settings = dataset.values(), dataset.settings
    overall = {m: seeds for m in dataset.candidates if (seeds := mean_over_settings(values, m, settings))}
    pairs: dict[str, list[tuple[str, str]]] = {}
    for method in overall:
        if base := base_of(method, overall):
            pairs.setdefault(base[1], []).append((method, base[0]))
    found = []
    for addition, several in pairs.items():
        sides = [mean_of([overall[pair[side]] for pair in several]) for side in (0, 1)]
        if test := paired(*sides):
            names = several[0] if len(several) == 1 else (f"with {addition}", f"without, {len(several)} methods each")
            found.append(Comparison(*names, test))
    return corrected(found)


def declared(dataset: DatasetResults, claims: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """The claims of the suite file, corrected over these claims alone."""
    found = []
    for claim in claims:
        sides = [_side(dataset, claim, side) for side in ("higher", "lower")]
        shared = sides[0].keys() & sides[1].keys()
        columns = [[side[key] for key in side if key in shared] for side in sides]
        if test := paired(*(mean_of([c for several in side for c in several]) for side in columns)):
            names = [" / ".join(map(_words, claim[side].values())) for side in ("higher", "lower")]
            text = str(claim.get("text") or f"{names[0]} is above {names[1]}")
            found.append(Comparison(names[0], names[1], test, text=text, declared=True))
    return corrected(found)


def _side(dataset: DatasetResults, claim: Mapping[str, Any], side: str) -> dict[tuple[str, ...], list[BySeed]]:
    """Labels of the axes that the claim leaves open -> the results of the side's cells, a draw each."""
    chosen = {axis: _list(labels) for axis, labels in claim[side].items()}
    closed = {*claim["higher"], *claim["lower"], "seeds"}
    cells: dict[tuple[tuple[str, ...], tuple[str, ...]], BySeed] = {}
    for run in dataset.runs:
        if run.labels and all(run.labels.get(axis) in labels for axis, labels in chosen.items()):
            value = _value(dataset, run, claim)
            if value is not None:
                free = tuple(label for axis, label in run.labels.items() if axis not in closed)
                own = tuple(label for axis, label in run.labels.items() if axis in closed and axis != "seeds")
                cells.setdefault((free, own), {})[run.draw] = value
    found: dict[tuple[str, ...], list[dict[Draw, float]]] = {}
    for (free, _), seeds in cells.items():
        found.setdefault(free, []).append(seeds)
    return found


def _value(dataset: DatasetResults, run: RunRecord, claim: Mapping[str, Any]) -> float | None:
    return run.value(str(claim.get("metric") or dataset.metric), str(claim.get("visible") or run.headline[1]))


def _list(labels: Any) -> list[str]:
    return [str(label) for label in (labels if isinstance(labels, list) else [labels])]


def _words(labels: Any) -> str:
    return ", ".join(_list(labels))
