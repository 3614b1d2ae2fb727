"""Best expected metrics of a data set whose label law is known.

A law is a list of cells. Within a cell nothing that a model can see depends on the label, so the best score of a row is the
label's probability given the visible part of its cell, and the metrics of that score are finite sums over the cells.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product

from fedmllm.core.types import Modality, Visible


@dataclass(frozen=True)
class LawCell:
    """Rows that look alike in all modalities."""

    looks: Mapping[Modality, Hashable]  # the part of the cell that each modality reveals
    mass: float  # share of the rows
    labels: tuple[float, ...]  # P(label | cell), in the order of the choices


def masses(cells: Iterable[LawCell], visible: Visible) -> list[list[float]]:
    """P(visible look, label) for each look: one list over the labels a look."""
    joint: dict[Hashable, list[float]] = {}
    for cell in cells:
        look = tuple(cell.looks[m] for m in sorted(visible))
        row = joint.setdefault(look, [0.0] * len(cell.labels))
        for k, share in enumerate(cell.labels):
            row[k] += cell.mass * share
    return list(joint.values())


def two_way(cells: Iterable[LawCell], visible: Visible) -> dict[str, float]:
    """Highest expected `auc`, `auc_hard` and `accuracy` of any model that sees these modalities of a row.

    AUC is largest when rows are ranked by their likelihood ratio (Neyman-Pearson); rows of one look are tied and count
    half. `auc_hard`, (sensitivity + specificity) / 2, is largest when each look takes the label under which it is more
    likely; accuracy when it takes its more frequent label.

    Args:
        cells: The law of the set; two labels.
        visible: Modalities that a model sees of every row.
    """
    looks = masses(cells, visible)
    zero, one = (sum(look[k] for look in looks) for k in (0, 1))
    ranked = sorted(looks, key=lambda look: look[1] / (look[0] + look[1]))
    below = area = 0.0
    for first, second in ranked:
        area += second * (below + first / 2)
        below += first
    hard = sum(max(first / zero, second / one) for first, second in looks) / 2
    return {"auc": area / (zero * one), "auc_hard": hard, "accuracy": sum(map(max, looks))}


def many_way(cells: Iterable[LawCell], visible: Visible) -> dict[str, float]:
    """Highest expected `accuracy`, and `macro_f1` of the best rule that gives every look one label.

    The rules are enumerated: labels ** looks of them, so this is meant for a handful of looks. F1 of a label is
    2 P(rule = label = truth) / (P(rule = label) + P(truth = label)), its value on a large sample.

    Args:
        cells: The law of the set; two or more labels.
        visible: Modalities that a model sees of every row.
    """
    looks = masses(cells, visible)
    num_labels = len(looks[0])
    accuracy = sum(map(max, looks))
    if all(max(look) == sum(look) for look in looks):  # the looks decide the label
        return {"macro_f1": 1.0, "accuracy": accuracy}
    truth = [sum(look[k] for look in looks) for k in range(num_labels)]
    best = 0.0
    for rule in product(range(num_labels), repeat=len(looks)):
        right: dict[int, float] = defaultdict(float)
        given: dict[int, float] = defaultdict(float)
        for look, k in zip(looks, rule, strict=True):
            right[k] += look[k]
            given[k] += sum(look)
        best = max(best, sum(2 * right[k] / (given[k] + truth[k]) for k in right) / num_labels)
    return {"macro_f1": best, "accuracy": accuracy}
