"""Settings of local training, evaluation, update validation and checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from fedmllm.algorithms.schedules import Schedule
from fedmllm.core.metrics import METRICS, PLUGIN_METRICS
from fedmllm.core.spec import ADDED_LATER, EXECUTION_ONLY, Spec, nearest

USUAL = "usual"  # of `train.lr`: the backbone's `usual_lr`, put in its place when an experiment is read
_LR = {"anyOf": [{"const": USUAL}, {"type": "number", "exclusiveMinimum": 0}]}


class Train(Spec):
    """Local training of a client. Defaults: the published protocol, with AdamW; `lr` is the one to set."""

    lr: Annotated[PositiveFloat, WithJsonSchema(_LR)] = 2e-5
    """Learning rate of AdamW. "usual" is the one at which LoRA learns on this kind of model: 3e-3 for "tiny", 1e-4 for "hf".
    The default is that of the published benchmark, at which the embedded model learns nothing."""
    epochs: PositiveInt = 1
    """Passes over a client's rows in a round."""
    max_steps: NonNegativeInt = 0
    """Optimizer steps in a round at most; 0 = no limit."""
    batch_size: PositiveInt = 1
    """Rows of a micro-batch."""
    accumulation: PositiveInt = 4
    """Micro-batches of an optimizer step."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of AdamW's first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay rate of AdamW's second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of AdamW."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest norm of a client's gradient; a longer one is scaled down to it; 0 = no limit."""
    round_schedule: Schedule = "cosine"
    """Learning rate over the rounds."""
    step_schedule: Schedule = "cosine"
    """Learning rate over the steps of a round."""


def one_or_several(value: object) -> object:
    """`"image"` means `["image"]`."""
    return (value,) if isinstance(value, str) else value


class Evaluate(Spec):
    """When, on which rows and how the global adapter is evaluated."""

    every: NonNegativeInt = 0
    """Rounds between two evaluations; 0 = after the last round only."""
    visible: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(one_or_several)] = ("all",)
    """Modalities of the test rows that the model sees: "all" (or "both"), "none", or names joined by "+", as in "image+text".
    Several values give a result each."""
    metrics: Annotated[tuple[str, ...], ADDED_LATER, BeforeValidator(one_or_several)] = ()
    """Metrics in addition to those of the data set, by name."""
    batch_size: Annotated[PositiveInt, EXECUTION_ONLY] = 16
    """Test rows that are evaluated at once."""
    max_new_tokens: PositiveInt = 16
    """Tokens of a generated answer at most."""
    limit: NonNegativeInt = 0
    """Number of test rows, the first ones; 0 = all."""
    rows: Annotated[Literal["test", "validation"], ADDED_LATER] = "test"
    """Rows that the results are about. "validation" is for tuning: the test rows are not read."""
    select: Literal["last", "validation"] = "last"
    """Adapter that is the result: that of the last round, or the best on the validation rows."""

    @model_validator(mode="after")
    def _does_not_select_on_its_own_rows(self) -> Evaluate:
        if self.select == self.rows == "validation":
            raise ValueError('rows = "validation": got select = "validation", the same rows; allowed: last')
        return self

    @model_validator(mode="after")
    def _has_something_to_select_from(self) -> Evaluate:
        if self.select == "validation" and not self.every:
            raise ValueError(
                'select = "validation" needs every >= 1: the rounds in which validation rows are evaluated'
            )
        return self

    @field_validator("metrics")
    @classmethod
    def _metrics_exist(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in METRICS:
                raise ValueError(f"no metric {name!r}; allowed: {', '.join(sorted(METRICS))}{nearest(name, METRICS)}")
        return names

    def identity(self) -> dict[str, Any]:
        """Return the settings that change results; a metric that is not shipped is identified by its file's digest."""
        sources = {PLUGIN_METRICS[m].module: PLUGIN_METRICS[m].digest for m in self.metrics if m in PLUGIN_METRICS}
        return super().identity() | ({"plugin": sources} if sources else {})


class Personal(Spec):
    """Method "personal": after the federation each client trains on from the global adapter."""

    rounds: PositiveInt = 1
    """Rounds of `train` that each client trains alone, with learning rates of their own."""
    mu: NonNegativeFloat = 0.0
    """Proximal weight towards the global adapter: 0 = fine-tuning, above 0 the last phase of Ditto (arXiv:2012.04221)."""


class UpdateFilter(Spec):
    """Check of the clients' updates before they are aggregated."""

    on_bad_update: Literal["by_engine", "fail", "drop_client"] = "by_engine"
    """Reaction to an update with NaN, Inf, wrong names or shapes, or over the norm limit. "by_engine" = "drop_client" over
    real sites, else "fail"."""
    max_norm: NonNegativeFloat = 0.0
    """Largest norm of a delta; 0 = no limit."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that change results. "by_engine" is "fail" here: over real sites it is replaced before."""
        table = super().identity()
        return table | ({"on_bad_update": "fail"} if self.on_bad_update == "by_engine" else {})


class Checkpointing(Spec):
    """Intervals at which a run's state is saved, and number of checkpoints that are kept."""

    every: PositiveInt = 1
    """Rounds between two checkpoints."""
    keep: PositiveInt = 2
    """Number of latest checkpoints to keep; the best on validation is always kept."""
