"""Prompts: a partially masked example as a conversation.

The wordings are our own; another paper's comes in as a template (`FromFile`).
"""

from __future__ import annotations

import string
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import model_validator

from fedmllm.core.errors import ConfigError
from fedmllm.core.spec import Named, nearest
from fedmllm.core.types import Content, Conversation, Example, Modality, Picture, Visible

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PLACEHOLDERS = {
    "images": "where the pictures go; without it they come first",
    "text": "the visible texts of the row; lab values and the like under their names",
    "question": "the question",
    "options": 'the lettered options, one a line: "(A) label"; nothing for an open question',
    "modalities": 'the visible modalities: "text and image", "front and back cameras"; nothing if none is visible',
}


class Prompt(Named):
    """A wording: `render` for the question, `options` for scoring, `target` for training."""

    @abstractmethod
    def render(self, example: Example, visible: Visible) -> Conversation:
        """Word a row for the model.

        Args:
            example: The row.
            visible: Modalities that a mask leaves.

        Returns:
            One user turn, with the visible pictures in their places.
        """

    def options(self, example: Example) -> tuple[str, ...]:
        """Texts that are scored, one per choice.

        Args:
            example: The row.

        Returns:
            The letter alone, "(A)", a prefix of `target`, so that the lengths of labels do not matter; () for an open question.
        """
        return tuple(f"({LETTERS[i]})" for i in range(len(example.choices)))

    def target(self, example: Example) -> str:
        """The answer that is trained on: "(A) label" for a lettered question, the answer itself for an open one.

        Args:
            example: The row.

        Returns:
            Text that follows the prompt in training.
        """
        if not example.choices:
            return example.answer
        return f"({LETTERS[example.choices.index(example.answer)]}) {example.answer}"


class Plain(Prompt):
    """Names the visible modalities: "based on the text and image", "the text", "the image" or nothing."""

    name: Literal["plain"] = "plain"

    def render(self, example: Example, visible: Visible) -> Conversation:
        fields = example.visible_fields(visible)
        basis = f" based on the {in_words(tuple(fields))}" if fields else ""
        return _conversation(example, fields, f"Select the best answer{basis}.", asked_parts(example, fields))


class Agnostic(Prompt):
    """The modality-agnostic strategy of FedMLLM (arXiv:2411.14717): one wording for all cases, in training and test."""

    name: Literal["agnostic"] = "agnostic"

    def render(self, example: Example, visible: Visible) -> Conversation:
        aside = ", without considering the modality"
        fields = example.visible_fields(visible)
        parts = asked_parts(example, fields)
        last = max((i for i, part in enumerate(parts) if isinstance(part, str) and part.strip()), default=0)
        question = str(parts[last])
        asked = question.rstrip("?.! ")
        parts[last] = asked + aside + question[len(asked) :].strip()
        return _conversation(example, fields, f"Select the best answer{aside}.", parts)


Part: TypeAlias = "str | Picture"


def _conversation(
    example: Example, fields: dict[Modality, Content], instruction: str, question: Sequence[Part]
) -> Conversation:
    """Pictures, then text; or the pictures in the question. An open question is put as it is, whatever the strategy."""
    texts = texts_of(example, fields, "Text: " if example.choices else "")
    first = [] if any(isinstance(part, Picture) for part in question) else pictures(example, fields)
    if not example.choices:
        asked = asked_parts(example, fields)
        between = ["\n"] if texts and any(asked) else []
        return Conversation((*first, *joined(["\n".join(texts), *between, *asked])))
    before = "\n".join([instruction, *texts, "Question: "])
    after = "\n".join(["", "Options:", *option_lines(example), "The best answer is:"])
    return Conversation((*first, *joined([before, *question, after])))


def asked_parts(example: Example, fields: dict[Modality, Content]) -> list[Part]:
    """The question, with its visible pictures if they belong into its middle."""
    paths = next((content for content in fields.values() if isinstance(content, tuple)), ())
    if not example.pieces or not paths:
        return [example.question]
    parts: list[Part] = [example.pieces[0]]
    for path, text in zip(paths, example.pieces[1:], strict=True):
        parts += [Picture(path), text]
    return parts


def joined(parts: Iterable[Part]) -> list[Part]:
    """The parts with neighbouring texts as one. The last one is always a text, perhaps an empty one."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part:
            found.append(part)
    return found if found and isinstance(found[-1], str) else [*found, ""]


def option_lines(example: Example) -> list[str]:
    """ "(A) label", one per choice."""
    return [f"({LETTERS[i]}) {choice}" for i, choice in enumerate(example.choices)]


def pictures(example: Example, fields: dict[Modality, Content]) -> list[Part]:
    """The pictures in the row's order; if the row has several cameras, each after its name: "CAM_FRONT: "."""
    several = sum(isinstance(content, tuple) for content in example.fields.values()) > 1
    parts: list[Part] = []
    for modality, content in fields.items():
        if isinstance(content, tuple):
            parts += [f"{modality}: "] if several else []
            parts += [Picture(path) for path in content]
            parts += ["\n"] if several else []
    return parts


def texts_of(example: Example, fields: Mapping[Modality, Content], heading: str) -> list[str]:
    """The visible texts: announced ones under the modality's name, "Labs: crp 4.1", the others after `heading`."""
    return [
        f"{spoken(m)[:1].upper()}{spoken(m)[1:]}: {content}" if m in example.announced else f"{heading}{content}"
        for m, content in fields.items()
        if isinstance(content, str)
    ]


def spoken(modality: Modality) -> str:
    """The name of a modality in a sentence: "prior_report" -> "prior report"."""
    return modality.replace("_", " ")


def in_words(modalities: Sequence[Modality]) -> str:
    """ "text and image", "front, back left and back cameras": as a person would list them, text first."""
    cameras = [m.removeprefix("CAM_").replace("_", " ").lower() for m in modalities if m.startswith("CAM_")]
    words = [m for m in ("text", "image") if m in modalities]
    words += [spoken(m) for m in modalities if m not in ("text", "image") and not m.startswith("CAM_")]
    if cameras:
        words.append(f"{_enumerated(cameras)} camera{'s' if len(cameras) > 1 else ''}")
    return _enumerated(words)


def _enumerated(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1] if words else ""]))


class FromFile(Prompt):
    """Your own wording, from the file `template`.

    The file is the wording of a multiple-choice question, with the placeholders of `PLACEHOLDERS` in braces; "{{" and
    "}}" stand for braces. A line whose placeholders are all empty for a row is left out. If the file has several wordings,
    each begins with a line for its case: "== text and image ==" for rows in which exactly these are visible,
    "== nothing ==" for rows in which none is, "== open ==" for open questions, which otherwise are put as they are,
    "== else ==" for all other rows. `wording` holds the text once it is read, so that a record is complete by itself.
    """

    name: Literal["file"] = "file"
    template: str = ""
    """Path of the file."""
    wording: str = ""
    """The text of the file, filled in when it is read."""

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
        fields = example.visible_fields(visible)
        known = wordings(self.wording, self.template or "prompt.wording")
        case = ("open",) if not example.choices else tuple(sorted(fields)) or ("nothing",)
        lines = known.get(case, known.get(("else",)) if example.choices else None)
        if lines is None and not example.choices:
            return _conversation(example, fields, "", asked_parts(example, fields))
        if lines is None:
            has = ", ".join(" and ".join(key) for key in known)
            raise ConfigError(
                f"{self.template or 'prompt.wording'}: no wording for rows with {' and '.join(case)}; "
                f'the file has: {has}; "== else ==" would cover the rest'
            )
        return _fill(lines, example, fields)


_Line = tuple[tuple[str, str], ...]  # (literal text, placeholder or "") pieces


@lru_cache(maxsize=32)
def wordings(template: str, place: str) -> dict[tuple[str, ...], tuple[_Line, ...]]:
    """Case -> lines. Raises ConfigError that names file:line, the placeholder and what is allowed."""
    known: dict[tuple[str, ...], list[_Line]] = {}
    here: list[_Line] | None = None
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


def _trimmed(lines: list[_Line]) -> list[_Line]:
    while lines and not lines[-1]:
        lines = lines[:-1]
    return lines


def _parse(line: str, place: str) -> _Line:
    try:
        pieces = [
            (text, name, bool(spec or conversion)) for text, name, spec, conversion in string.Formatter().parse(line)
        ]
    except ValueError as error:
        raise ConfigError(
            f'{place}: {error}; write "{{{{" or "}}}}" for a brace that is not part of a placeholder'
        ) from None
    for _, name, formatted in pieces:
        if name is not None and (name not in PLACEHOLDERS or formatted):
            allowed = ", ".join(f"{{{key}}}" for key in PLACEHOLDERS)
            raise ConfigError(
                f"{place}: unknown placeholder {{{name}}}; allowed: {allowed}{nearest(name, PLACEHOLDERS)}"
            )
    return tuple((text, name or "") for text, name, _ in pieces)


def _fill(lines: Sequence[_Line], example: Example, fields: dict[Modality, Content]) -> Conversation:
    names = {name for line in lines for _, name in line}
    asked: list[Part] = asked_parts(example, fields) if "question" in names else [example.question]
    images = [] if len(asked) > 1 else pictures(example, fields)
    first = [] if "images" in names else images
    values: dict[str, list[Part]] = {
        "images": images,
        "text": ["\n".join(texts_of(example, fields, ""))],
        "question": asked,
        "options": ["\n".join(option_lines(example))],
        "modalities": [in_words(tuple(fields))],
    }
    parts: list[Part] = []
    for line in lines:
        named = [name for _, name in line if name]
        if named and not any(any(values[name]) for name in named):
            continue
        for literal, name in line:
            parts += [literal, *values.get(name, ())]
        parts.append("\n")
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].removesuffix("\n")
    return Conversation((*first, *joined(parts)))
