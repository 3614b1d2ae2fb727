"""Completion from the nearest public row, by the frozen model's features.

Shapes: P public rows, L tokens, Q vectors of a picture, D channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt, model_validator

from fedmllm.core.answers import word_f1
from fedmllm.core.rng import stream
from fedmllm.core.types import Content, Example
from fedmllm.scenarios.modalities.completion import Completion, CompletionSite, Filling, FrozenModel, Role

if TYPE_CHECKING:
    from torch import Tensor

SAME_ANSWER = 0.5  # word F1 from which two open answers count as one


class Retrieve(Completion):
    """Borrow missing modalities from a public row that is near in the present ones (CAR-MFL, arXiv:2407.08648).

    A text's embedding is the mean of its tokens' frozen input embeddings, without tokens that are in more than half of the
    public rows; a picture's is the mean of the frozen tower's output. Both are centred on the public rows and normalized.
    Of the `neighbours` nearest rows with the training row's own answer one is drawn, once for the whole run; if none of them
    has it, the nearest public row that has it is taken. A training row that shows nothing borrows all of a row with its
    answer. Test rows, if completed, take the nearest row: their answer is not known here.

    CAR-MFL trains its encoders and searches again in each round; here they are frozen, so one search is enough. Nothing
    additional leaves a client.
    """

    needs_public: ClassVar[bool] = True

    name: Literal["retrieve"] = "retrieve"
    neighbours: PositiveInt = 10
    """Nearest public rows among which one is drawn."""
    answer: Literal["own", "any", "random"] = "own"
    """Answer of a borrowed row: that of the training row, any, or (a control) one drawn at random."""
    match: Literal["nearest", "random"] = "nearest"
    """The nearest rows, or (a control) any public row with the answer."""
    whole: bool = False
    """A control: train on the public row alone, in place of the row that it would complete."""
    test: bool = False
    """Whether test rows are completed, too."""

    @model_validator(mode="after")
    def _test_rows_stay(self) -> Retrieve:
        if self.whole and self.test:
            raise ValueError("whole: got true with test = true; a test row cannot be replaced by a public one")
        return self

    def role(self) -> Role:
        return "control" if self.whole or self.answer != "own" or self.match == "random" else super().role()

    def at_test(self) -> bool:
        return self.test

    def notes(self, train: Sequence[Example], public: Sequence[Example]) -> Sequence[str]:
        unseen = sorted({row.answer for row in train if row.choices} - {row.answer for row in public})
        if self.answer != "own" or not unseen:
            return ()
        listed = ", ".join(map(repr, unseen[:5]))
        return [f"completion: no public row has the answer {listed}; rows with it stay incomplete"]

    def prepare(self, site: CompletionSite) -> Filling:
        return _Nearest(self, site)


class _Nearest(Filling):
    def __init__(self, settings: Retrieve, site: CompletionSite) -> None:
        self._settings, self._seed, self._modalities = settings, site.seed, site.modalities
        self._public = sorted(site.public, key=lambda row: str(row.id))
        self._answers = sorted({row.answer for row in self._public})
        self._of = {m: _Embedding(site.model, [row.fields[m] for row in self._public]) for m in site.modalities}

    def fill(self, example: Example, training: bool) -> Example:
        answer = self._answer(example) if training else None
        allowed = [i for i, row in enumerate(self._public) if answer is None or _same(example, row, answer)]
        if not allowed and not example.choices:  # an open answer that is like no public one
            allowed = list(range(len(self._public)))
        if not allowed or not (training or example.fields):
            return example
        rng = stream(self._seed, "retrieve", str(example.id))
        candidates = self._near(example, allowed, training) if example.fields else allowed
        public = self._public[candidates[int(rng.integers(len(candidates)))]]
        if self._settings.whole:
            return replace(public, columns=example.columns)
        return replace(example, fields={**{m: public.fields[m] for m in self._modalities}, **example.fields})

    def _answer(self, example: Example) -> str | None:
        """The answer that a borrowed row must have; None = any."""
        if self._settings.answer == "random":
            rng = stream(self._seed, "retrieve-answer", str(example.id))
            return self._answers[int(rng.integers(len(self._answers)))]
        return example.answer if self._settings.answer == "own" else None

    def _near(self, example: Example, allowed: list[int], training: bool) -> list[int]:
        """The candidates, of which one is drawn."""
        if self._settings.match == "random":
            return allowed
        # the set's order of modalities: a sum does not depend on the row's
        score_P = sum(self._of[m].similarity(example.fields[m]) for m in self._modalities if m in example.fields)
        ranked: list[int] = score_P.sort(descending=True, stable=True).indices.tolist()  # type: ignore[union-attr]
        if not training:
            return ranked[:1]
        able = set(allowed)
        near = [i for i in ranked[: self._settings.neighbours] if i in able]
        return near or [next(i for i in ranked if i in able)]


def _same(example: Example, public: Example, answer: str) -> bool:
    """Return whether a public row has the answer; open answers are compared by their words."""
    return public.answer == answer if example.choices else word_f1(public.answer, answer) >= SAME_ANSWER


class _Embedding:
    """Embeddings of one modality, centred on the public rows."""

    def __init__(self, model: FrozenModel, public: Sequence[Content]) -> None:
        self._model = model
        texts = [content for content in public if isinstance(content, str)]
        counts = Counter(token for text in texts for token in set(model.token_vectors(text)[0]))
        self._common = {token for token, count in counts.items() if 2 * count > len(texts)}
        import torch

        raw_PD = torch.stack([self._raw(content) for content in public])
        self._mean_D = raw_PD.mean(0)
        self._public_PD = torch.nn.functional.normalize(raw_PD - self._mean_D, dim=1)

    def similarity(self, content: Content) -> Tensor:
        """Cosine with each public row [P]; 0 where a text has no token of its own."""
        import torch

        own_D: Tensor = torch.nn.functional.normalize(self._raw(content) - self._mean_D, dim=0)
        return self._public_PD @ own_D

    def _raw(self, content: Content) -> Tensor:
        import torch

        if not isinstance(content, str):
            return torch.cat([self._model.picture_vectors(path) for path in content]).double().mean(0)
        ids, vectors_LD = self._model.token_vectors(content)
        own = [i for i, token in enumerate(ids) if token not in self._common]
        if own:
            return vectors_LD[own].double().mean(0)
        return torch.zeros(vectors_LD.shape[1], dtype=torch.float64)
