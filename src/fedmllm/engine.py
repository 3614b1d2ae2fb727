"""Which engine maps the clients of a round, and its settings. The engines themselves live in `engines/`. Loads no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from fedmllm.types import Named


class Engine(Named):
    """Settings of an engine. An engine changes where and how fast a round is computed, never its result."""

    entry: ClassVar[str]  # "module:Class"; Class(settings, clients) is called as (params, round, cohort) -> updates


class InProcess(Engine):
    """One client after another: the readable truth."""

    name: Literal["in-process"] = "in-process"
    entry = "fedmllm.engines.in_process:InProcess"


class Stacked(Engine):
    """Many clients in one pass over the frozen base; equal to in-process up to the order of summation."""

    name: Literal["stacked"] = "stacked"
    entry = "fedmllm.engines.stacked:Stacked"
    token_budget: NonNegativeInt = 0  # tokens of one pass, padding included; 0 = what suits the device
    clients: PositiveInt = 16  # adapters in memory at once; a larger cohort comes in turns
    deterministic: bool = False  # CUDA: the same bytes at every repetition, somewhat slower
