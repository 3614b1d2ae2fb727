"""Conformance checks of completions, and a probe for leaking answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmllm.backbones.base import Backbone
from fedmllm.core.types import Content, Example, Modality, Visible
from fedmllm.scenarios.modalities.completion import Completer, Completion, CompletionSite, FrozenModel
from fedmllm.testing.conformance import check_settings
from fedmllm.testing.federation import perturbed

LARGEST_LEAK = 0.05  # AUC of filled content over that of real content
FOLDS = 5


def check_completion(completion: Completion, backbone: Backbone, examples: Sequence[Example]) -> None:
    """Assert that a completion is a pure function of what it may see, and keeps what a row shows.

    Args:
        completion: The member under test.
        backbone: The model, such as `Tiny().load(seed=0)`; its adapter is changed, then restored.
        examples: Complete rows, at least six, all with the same modalities. The second half is public.

    Raises:
        AssertionError: A rule is broken; the message names it.
    """
    check_settings(completion)
    modalities = tuple(examples[0].fields)
    rows, public = examples[: len(examples) // 2], tuple(examples[len(examples) // 2 :])
    one = _completer(completion, backbone, public, modalities)
    masks = [frozenset(s) for n in range(len(modalities)) for s in combinations(modalities, n)]
    cases = [(row, mask, training) for row in rows for mask in masks for training in (True, False)]
    first = [one(*case) for case in cases]
    for (row, mask, training), (filled, present) in zip(cases, first, strict=True):
        _check_filled(completion, row, mask, training, filled, present)
    adapter, two = backbone.lora(), _completer(completion, backbone, public[::-1], modalities)
    backbone.set_lora(perturbed(backbone))
    two.warm([(row, mask) for row, mask, training in cases[:4] if training], training=True)
    second = [two(*case) for case in reversed(cases)][::-1]
    backbone.set_lora(adapter)
    assert first == second, (
        "the result depends on the adapter, on the order of the calls, or on that of the public rows"
    )
    blind = [case for case in cases if not completion.sees_hidden]
    for (row, mask, training), before in zip(blind, first, strict=False):
        other = replace(row, fields=_swapped(row, mask, rows))
        assert _added(one(other, mask, training), other, mask) == _added(before, row, mask), (
            "hidden content had an effect"
        )
        if not training:
            other = replace(row, answer=next((c for c in row.choices if c != row.answer), "?"), columns={"a": "b"})
            assert _added(one(other, mask, False), other, mask) == _added(before, row, mask), (
                "a test row's answer had one"
            )
    if not completion.converts:
        everything = frozenset(modalities)
        assert all(one(row, everything, True)[0] is row for row in rows), "a complete row was changed"


def _completer(
    completion: Completion, backbone: FrozenModel, public: tuple[Example, ...], modalities: tuple[Modality, ...]
) -> Completer:
    return Completer(completion, CompletionSite(backbone, public if completion.needs_public else (), modalities, 0))


def _check_filled(
    completion: Completion, row: Example, mask: Visible, training: bool, filled: Example, present: Visible
) -> None:
    assert present <= filled.fields.keys(), "a row shows a modality that it does not have"
    assert completion.converts or mask <= present, "a present modality was taken away"
    assert (filled.id, filled.where) == (row.id, row.where), "a row has another id or place"
    if not training:
        same = (filled.answer, filled.choices, filled.question, filled.columns)
        assert same == (row.answer, row.choices, row.question, row.columns), "a test row asks something else"
        assert completion.at_test() or filled is row, "a test row was changed although at_test() is False"


def _swapped(row: Example, mask: Visible, rows: Sequence[Example]) -> dict[Modality, Content]:
    """The row's fields with hidden ones from another row."""
    other = next(r for r in rows if all(r.fields[m] != row.fields[m] for m in row.fields))
    return {m: content if m in mask else other.fields[m] for m, content in row.fields.items()}


def _added(result: tuple[Example, Visible], row: Example, mask: Visible) -> object:
    """Return a completion's result for a row, without what the row had hidden anyway."""
    filled, present = result
    return None if filled is row else (filled.visible_fields(present), present, filled.question, filled.choices)


class Leak(NamedTuple):
    """AUC of a linear probe from one modality alone to the answer.

    Attributes:
        filled: On filled content.
        real: On the rows' own content.
    """

    filled: float
    real: float


def leak_probe(
    completion: Completion, model: FrozenModel, rows: Sequence[Example], public: Sequence[Example] = ()
) -> dict[Modality, Leak]:
    """Measure how well filled training content gives the answer away, modality by modality.

    A logistic regression on the frozen model's mean vector, cross-validated: rows that were filled with equal content
    stay in one fold, so that it is not recognized again, unless there are few different contents.

    Args:
        completion: The member.
        model: The frozen model.
        rows: Complete rows with two answers, some hundreds.
        public: Complete public rows.

    Returns:
        Modality -> AUC on filled and on real content. A member whose `filled` exceeds `real` by more than 0.05 declares
        `leaks = True`.
    """
    modalities = tuple(rows[0].fields)
    completer = Completer(completion, CompletionSite(model, tuple(public), modalities, 0))
    labels = np.array([row.answer == rows[0].choices[-1] for row in rows])
    found = {}
    for modality in modalities:
        rest = frozenset(modalities) - {modality}
        made = [completer(row, rest, True) for row in rows]
        kept = [i for i, (filled, present) in enumerate(made) if modality in present]
        if kept:
            contents = [made[i][0].fields[modality] for i in kept]
            real = [rows[i].fields[modality] for i in kept]
            found[modality] = Leak(_auc(model, contents, labels[kept]), _auc(model, real, labels[kept]))
    return found


def _auc(model: FrozenModel, contents: Sequence[Content], labels: NDArray[np.bool_]) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    vectors = np.stack([_vector(model, content) for content in contents])
    number = {content: i for i, content in enumerate(dict.fromkeys(contents))}
    many = len(number) >= 4 * FOLDS
    groups = [number[content] for content in contents] if many else None
    folds = GroupKFold(FOLDS) if many else StratifiedKFold(FOLDS)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    scores = cross_val_predict(probe, vectors, labels, groups=groups, cv=folds, method="decision_function")
    return float(roc_auc_score(labels, scores))


def _vector(model: FrozenModel, content: Content) -> NDArray[np.float32]:
    parts = [model.token_vectors(content)[1]] if isinstance(content, str) else map(model.picture_vectors, content)
    mean: NDArray[np.float32] = np.concatenate([part.numpy() for part in parts]).mean(0)
    return mean
