"""Control: training rows get their own hidden content back."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from fedmllm.core.types import Example
from fedmllm.scenarios.modalities.completion import Completion, CompletionSite, Filling


class Oracle(Completion):
    """The hidden truth, which no method has: the upper bound of every completion of training rows."""

    sees_hidden: ClassVar[bool] = True
    reads_model = False

    name: Literal["oracle"] = "oracle"

    def prepare(self, site: CompletionSite) -> Filling:
        return _Truth()


class _Truth(Filling):
    def fill(self, example: Example, training: bool) -> Example:
        return replace(example)  # another object: all of its fields are present
