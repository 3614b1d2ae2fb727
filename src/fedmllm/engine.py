"""Which engine maps the clients of a round, and its settings. The engines themselves live in `engines/`. Loads no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedmllm.types import Named


class Engine(Named):
    """Settings of an engine. An engine changes where and how fast a round is computed, never its result."""

    entry: ClassVar[str]  # "module:Class"; Class(settings, clients) is called as (params, round, cohort) -> updates


class InProcess(Engine):
    """One client after another: the readable truth."""

    name: Literal["in-process"] = "in-process"
    entry = "fedmllm.engines.in_process:InProcess"
