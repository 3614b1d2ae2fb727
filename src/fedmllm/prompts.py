"""Put a partly hidden example to the model. Wordings are ours; another paper's comes in as a template file."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from fedmllm.types import Content, Conversation, Example, Named, Picture, Visible

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


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
        shown = example.shown(visible)
        named = [m for m in ("text", "image") if m in shown] or sorted(shown)
        basis = f" based on the {' and '.join(named)}" if named else ""
        return _conversation(example, shown, basis, "")


class Agnostic(Prompt):
    """The modality-agnostic strategy of FedMLLM (arXiv:2411.14717): one wording for all cases, in training and test."""

    name: Literal["agnostic"] = "agnostic"

    def render(self, example: Example, visible: Visible) -> Conversation:
        aside = ", without considering the modality"
        return _conversation(example, example.shown(visible), aside, aside)


def _conversation(example: Example, shown: dict[str, Content], basis: str, aside: str) -> Conversation:
    pictures = [Picture(path) for content in shown.values() if isinstance(content, tuple) for path in content]
    texts = [content for content in shown.values() if isinstance(content, str)]
    question = example.question + aside
    if not example.choices:
        return Conversation((*pictures, "\n".join([*texts, question])))
    lines = [f"Select the best answer{basis}."]
    lines += [f"Text: {text}" for text in texts]
    lines += [f"Question: {question}", "Options:"]
    lines += [f"({LETTERS[i]}) {choice}" for i, choice in enumerate(example.choices)]
    lines += ["The best answer is:"]
    return Conversation((*pictures, "\n".join(lines)))
