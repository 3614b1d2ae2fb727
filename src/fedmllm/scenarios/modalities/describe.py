"""Conversion: pictures become text, by the frozen model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PositiveInt, field_validator

from fedmllm.core.errors import ConfigError
from fedmllm.core.types import Conversation, Example, Modality, Picture
from fedmllm.scenarios.modalities.completion import Completion, CompletionSite, Filling, require_kind

BATCH = 32  # pictures that are described at once

Question: TypeAlias = "tuple[str, str, int, Path, int, int]"  # base, ask, tokens, picture, its bytes and time of change
_ANSWERS: dict[Question, str] = {}  # of the process: the experiments of a suite share them


class Describe(Completion):
    """Let the frozen model describe each picture before training, and read the description as text (FedMVP, arXiv:2406.11048).

    One `ask` gives a caption; several are answered one by one, which also suits a model that writes no captions. The model
    answers without its adapter, so a description is made once. It is a change of representation and holds for test rows,
    too. It adds nothing to what a picture says: clients share a modality, and one without pictures gains nothing. Nothing
    additional leaves a client, but a picture's content is now in the text that its update depends on.
    """

    converts: ClassVar[bool] = True

    name: Literal["describe"] = "describe"
    mode: Literal["missing", "add", "replace"] = "missing"
    """Rows that are changed: those without a text; all, whose text is continued; all, whose pictures are left out."""
    ask: Annotated[
        tuple[str, ...], Field(min_length=1), BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)
    ] = ("Describe the picture.",)
    """What is asked about each picture."""
    to: str = "text"
    """Modality that receives the description."""
    max_new_tokens: PositiveInt = 48
    """Tokens of an answer at most."""

    @field_validator("ask")
    @classmethod
    def _questions_have_words(cls, ask: tuple[str, ...]) -> tuple[str, ...]:
        if not all(question.strip() for question in ask):
            raise ValueError("a blank question asks nothing; allowed: questions with words")
        return ask

    def at_test(self) -> bool:
        return True

    def check(self, modalities: tuple[Modality, ...]) -> None:
        if self.to not in modalities:
            raise ConfigError(f"completion.to: got {self.to!r}; the rows have {', '.join(modalities)}")

    def check_kinds(self, pictures: frozenset[Modality], texts: frozenset[Modality]) -> None:
        require_kind("completion.to", self.to, "text", texts)

    def prepare(self, site: CompletionSite) -> Filling:
        return _Describing(self, site)


class _Describing(Filling):
    def __init__(self, settings: Describe, site: CompletionSite) -> None:
        self._settings, self._model = settings, site.model

    def warm(self, examples: Sequence[Example], training: bool) -> None:
        paths = dict.fromkeys(path for example in examples if self._applies(example) for path in _pictures(example))
        for ask in self._settings.ask:
            open_ = [path for path in paths if self._question(ask, path) not in _ANSWERS]
            for start in range(0, len(open_), BATCH):
                self._answer(ask, open_[start : start + BATCH])

    def fill(self, example: Example, training: bool) -> Example:
        if not self._applies(example):
            return example
        s, several = self._settings, len(_picture_modalities(example)) > 1
        parts = [str(example.fields[s.to])] if s.to in example.fields else []
        for modality in _picture_modalities(example):
            words = [text for path in example.fields[modality] if (text := self._description(Path(path)))]
            parts += [f"{modality}: {' '.join(words)}" if several else " ".join(words)] if words else []
        fields = {m: c for m, c in example.fields.items() if s.mode != "replace" or isinstance(c, str)}
        described = " ".join(part for part in parts if part)
        return replace(example, fields={**fields, s.to: described}) if described else example

    def _applies(self, example: Example) -> bool:
        if self._settings.to in _picture_modalities(example):
            raise ConfigError(f"{example.where}, id {example.id}: completion.to: {self._settings.to!r} is a picture")
        missing = self._settings.to not in example.fields
        return bool(_picture_modalities(example)) and (missing or self._settings.mode != "missing")

    def _description(self, path: Path) -> str:
        """The answers for one picture, each after its question if there are several; "" if there is none."""
        answers = []
        for ask in self._settings.ask:
            if self._question(ask, path) not in _ANSWERS:
                self._answer(ask, [path])
            if text := _ANSWERS[self._question(ask, path)]:
                answers.append(text if len(self._settings.ask) == 1 else f"{ask} {text}")
        return " ".join(answers)

    def _answer(self, ask: str, paths: Sequence[Path]) -> None:
        prompts = [Conversation((Picture(path), ask)) for path in paths]
        texts = self._model.generate_frozen(prompts, self._settings.max_new_tokens)
        for path, text in zip(paths, texts, strict=True):
            _ANSWERS[self._question(ask, path)] = " ".join(text.split())

    def _question(self, ask: str, path: Path) -> Question:
        stat = path.stat()
        return (self._model.digest, ask, self._settings.max_new_tokens, path, stat.st_size, stat.st_mtime_ns)


def _picture_modalities(example: Example) -> list[Modality]:
    return [modality for modality, content in example.fields.items() if not isinstance(content, str)]


def _pictures(example: Example) -> list[Path]:
    return [Path(path) for modality in _picture_modalities(example) for path in example.fields[modality]]
