"""Put a partly hidden example to the model. Wordings are ours; another paper's comes in as a template (`FromFile`)."""

from __future__ import annotations

import string
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from fedmllm.core.errors import ConfigError
from fedmllm.core.spec import Named, nearest
from fedmllm.core.types import Content, Conversation, Example, Modality, Picture, Visible

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PLACEHOLDERS = {
    "images": "where the pictures go; without it they come first",
    "text": "the text of the row, if shown",
    "question": "the question",
    "options": 'the lettered options, one a line: "(A) label"; nothing for an open question',
    "modalities": 'what is shown: "text and image", "front and back cameras"; nothing if nothing is',
}


class Prompt(Named):
    """How a row is put: `render` for the question, `options` for scoring, `target` for training."""

    @abstractmethod
    def render(self, example: Example, visible: Visible) -> Conversation: ...

    def options(self, example: Example) -> tuple[str, ...]:
        """What is scored, one a choice: the letter alone, a prefix of `target`, so that label lengths do not matter."""
        return tuple(f"({LETTERS[i]})" for i in range(len(example.choices)))

    def target(self, example: Example) -> str:
        """The answer trained on: "(A) label" for a lettered question, the answer itself for an open one."""
        if not example.choices:
            return example.answer
        return f"({LETTERS[example.choices.index(example.answer)]}) {example.answer}"


class Plain(Prompt):
    """Names the modalities that are there: "based on the text and image", "the text", "the image" or nothing."""

    name: Literal["plain"] = "plain"

    def render(self, example: Example, visible: Visible) -> Conversation:
        shown = example.visible_fields(visible)
        basis = f" based on the {in_words(tuple(shown))}" if shown else ""
        return _conversation(example, shown, f"Select the best answer{basis}.", example.question)


class Agnostic(Prompt):
    """The modality-agnostic strategy of FedMLLM (arXiv:2411.14717): one wording for all cases, in training and test."""

    name: Literal["agnostic"] = "agnostic"

    def render(self, example: Example, visible: Visible) -> Conversation:
        aside = ", without considering the modality"
        asked = example.question.rstrip("?.! ")
        question = asked + aside + example.question[len(asked) :].strip()
        return _conversation(example, example.visible_fields(visible), f"Select the best answer{aside}.", question)


def _conversation(example: Example, shown: dict[str, Content], instruction: str, question: str) -> Conversation:
    """Pictures, then text. An open question is put as it is, whatever the strategy."""
    texts = [content for content in shown.values() if isinstance(content, str)]
    if not example.choices:
        return Conversation((*pictures(example, shown), "\n".join([*texts, *filter(None, [example.question])])))
    lines = [instruction, *(f"Text: {text}" for text in texts), f"Question: {question}", "Options:"]
    lines += [*option_lines(example), "The best answer is:"]
    return Conversation((*pictures(example, shown), "\n".join(lines)))


def option_lines(example: Example) -> list[str]:
    """ "(A) label", one a choice."""
    return [f"({LETTERS[i]}) {choice}" for i, choice in enumerate(example.choices)]


def pictures(example: Example, shown: dict[str, Content]) -> list[str | Picture]:
    """The pictures in the row's order; where the row has several cameras, each after its name: "CAM_FRONT: "."""
    several = sum(isinstance(content, tuple) for content in example.fields.values()) > 1
    parts: list[str | Picture] = []
    for modality, content in shown.items():
        if isinstance(content, tuple):
            parts += [f"{modality}: "] if several else []
            parts += [Picture(path) for path in content]
            parts += ["\n"] if several else []
    return parts


def in_words(modalities: Sequence[Modality]) -> str:
    """ "text and image", "front, back left and back cameras": as a person would list them, text first."""
    cameras = [m.removeprefix("CAM_").replace("_", " ").lower() for m in modalities if m.startswith("CAM_")]
    words = [m for m in ("text", "image") if m in modalities]
    words += [m.replace("_", " ") for m in modalities if m not in ("text", "image") and not m.startswith("CAM_")]
    if cameras:
        words.append(f"{_listed(cameras)} camera{'s' if len(cameras) > 1 else ''}")
    return _listed(words)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1] if words else ""]))


class FromFile(Prompt):
    """A user's own wording, from the file `template`.

    The file is the wording of a multiple-choice question, with the placeholders of `PLACEHOLDERS` in braces; "{{" and
    "}}" stand for braces. A line whose placeholders are all empty for a row is left out. Several wordings in one file
    begin each with a line that says when it holds: "== text and image ==" for rows that show exactly these,
    "== nothing ==" for rows that show none, "== open ==" for open questions, which otherwise are put as they are,
    "== else ==" for all other rows. `wording` holds the text once it is read, so that a record is complete by itself.
    """

    name: Literal["file"] = "file"
    template: str = ""
    wording: str = ""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, table: Any) -> Any:
        if not isinstance(table, dict) or table.get("wording") or not isinstance(table.get("template"), str):
            return table
        try:
            return {**table, "wording": Path(table["template"]).read_text(encoding="utf-8-sig")}
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompt.template: {table['template']}: cannot be read: {error}") from None

    @model_validator(mode="after")
    def _check(self) -> FromFile:
        if not self.wording.strip():
            raise ConfigError(f"prompt.template: {self.template or 'missing'}: a file with the wording is required")
        wordings(self.wording, self.template or "prompt.wording")
        return self

    def render(self, example: Example, visible: Visible) -> Conversation:
        shown = example.visible_fields(visible)
        known = wordings(self.wording, self.template or "prompt.wording")
        case = ("open",) if not example.choices else tuple(sorted(shown)) or ("nothing",)
        lines = known.get(case, known.get(("else",)) if example.choices else None)
        if lines is None and not example.choices:
            return _conversation(example, shown, "", "")
        if lines is None:
            has = ", ".join(" and ".join(key) for key in known)
            raise ConfigError(
                f"{self.template or 'prompt.wording'}: no wording for rows that show {' and '.join(case)}; "
                f'the file has: {has}; "== else ==" would cover the rest'
            )
        return _fill(lines, example, shown)


Line = tuple[tuple[str, str], ...]  # (literal text, placeholder or "") pieces


@lru_cache(maxsize=32)
def wordings(template: str, place: str) -> dict[tuple[str, ...], tuple[Line, ...]]:
    """Case -> lines. Raises ConfigError that names file:line, the placeholder and what is allowed."""
    known: dict[tuple[str, ...], list[Line]] = {}
    here: list[Line] | None = None
    for number, line in enumerate(template.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith("==") and stripped.endswith("==") and len(stripped) > 4:
            case = tuple(sorted(stripped.strip("= ").replace(",", " and ").split(" and ")))
            case = tuple(word.strip() for word in case if word.strip())
            if case in known:
                raise ConfigError(f"{place}:{number}: a second wording for {' and '.join(case)}")
            here = known.setdefault(case, [])
            continue
        if here is None:
            if not stripped:
                continue
            here = known.setdefault(("else",), [])
        here.append(_parse(line, f"{place}:{number}"))
    return {case: tuple(_trimmed(lines)) for case, lines in known.items()}


def _trimmed(lines: list[Line]) -> list[Line]:
    while lines and not lines[-1]:
        lines = lines[:-1]
    return lines


def _parse(line: str, place: str) -> Line:
    try:
        pieces = [
            (text, name, bool(spec or conversion)) for text, name, spec, conversion in string.Formatter().parse(line)
        ]
    except ValueError as error:
        raise ConfigError(f'{place}: {error}; write "{{{{" or "}}}}" for a brace that is no placeholder') from None
    for _, name, formatted in pieces:
        if name is not None and (name not in PLACEHOLDERS or formatted):
            allowed = ", ".join(f"{{{key}}}" for key in PLACEHOLDERS)
            raise ConfigError(
                f"{place}: unknown placeholder {{{name}}}; allowed: {allowed}{nearest(name, PLACEHOLDERS)}"
            )
    return tuple((text, name or "") for text, name, _ in pieces)


def _fill(lines: Sequence[Line], example: Example, shown: dict[str, Content]) -> Conversation:
    values = {
        "images": "",
        "text": "\n".join(content for content in shown.values() if isinstance(content, str)),
        "question": example.question,
        "options": "\n".join(option_lines(example)),
        "modalities": in_words(tuple(shown)),
    }
    images = pictures(example, shown)
    parts: list[str | Picture] = [] if any(name == "images" for line in lines for _, name in line) else [*images]
    text = ""
    for line in lines:
        named = [name for _, name in line if name]
        if named and not any(images if name == "images" else values[name] for name in named):
            continue
        for literal, name in line:
            text += literal + values.get(name, "")
            if name == "images":
                parts += [text, *images] if text else [*images]
                text = ""
        text += "\n"
    return Conversation((*parts, text.removesuffix("\n")))
