"""Settings of local training, evaluation, update validation and checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from fedmllm.algorithms.schedules import Schedule
from fedmllm.core.spec import EXECUTION_ONLY, Spec


class Train(Spec):
    """How a client trains. Defaults: the published protocol, with AdamW; `lr` is the one to set."""

    lr: PositiveFloat = 2e-5
    epochs: PositiveInt = 1
    max_steps: NonNegativeInt = 0  # optimiser steps a round at most; 0 = no limit
    batch_size: PositiveInt = 1
    accumulation: PositiveInt = 4  # micro-batches an optimiser step
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: NonNegativeFloat = 1.0  # of a client's gradient; 0 = off
    round_schedule: Schedule = "cosine"
    step_schedule: Schedule = "cosine"


def one_or_several(value: object) -> object:
    """`"image"` means `["image"]`."""
    return (value,) if isinstance(value, str) else value


class Evaluate(Spec):
    """When, on what and how the global adapter is judged."""

    every: NonNegativeInt = 0  # rounds; 0 = after the last one only
    # "all" (or "both"), "none", or modalities joined by "+": "image", "image+text"; several give a row each
    visible: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(one_or_several)] = ("all",)
    batch_size: Annotated[PositiveInt, EXECUTION_ONLY] = 16
    max_new_tokens: PositiveInt = 16
    limit: NonNegativeInt = 0  # test rows, the first ones; 0 = all
    select: Literal["last", "validation"] = "last"  # which adapter is the result; "validation": the best one

    @model_validator(mode="after")
    def _has_something_to_select_from(self) -> Evaluate:
        if self.select == "validation" and not self.every:
            raise ValueError('select = "validation" needs every >= 1: in which rounds the validation rows are judged')
        return self


class UpdateFilter(Spec):
    """Which updates are let into the sum."""

    on_bad_update: Literal["fail", "drop_client"] = "fail"  # NaN, Inf, wrong names or shapes, over the norm limit
    max_norm: NonNegativeFloat = 0.0  # of a delta; 0 = no limit


class Checkpointing(Spec):
    """How often a run's state is written, and how much of it is kept."""

    every: PositiveInt = 1  # rounds
    keep: PositiveInt = 2  # the last ones; the best on validation stays besides
