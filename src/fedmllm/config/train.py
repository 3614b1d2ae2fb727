"""Settings of local training, evaluation, update validation and checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

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
from fedmllm.core.plugins import HINT
from fedmllm.core.spec import ADDED_LATER, EXECUTION_ONLY, Spec, nearest, one_or_several

GRADED = ("graded", "ungraded")
_PROMPT = (
    "Question: {question}\nRight answer: {answer}\nGiven answer: {given}\n\nHow well does the given answer agree with the "
    "right one? Reply with one number from 0 (wrong) to 10 (the same meaning), and nothing else."
)
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


class Grader(Spec):
    """An LLM judge of open answers, at any endpoint with OpenAI's chat completions. It receives question, right answer and
    given answer of the test rows, and nothing else of them."""

    url: str
    """Base address of the endpoint, such as "http://localhost:8000/v1" or "https://api.openai.com/v1"."""
    model: str
    """Name of the model, as the endpoint knows it."""
    key_variable: str = ""
    """Environment variable that holds the key; "" = the endpoint needs none. A key is never read from a file."""
    prompt: str = _PROMPT
    """Question about an answer; `{question}`, `{answer}` (the right one) and `{given}` are replaced; replies are 0 to 10."""
    max_tokens: PositiveInt = 16
    """Longest reply in tokens."""
    timeout_s: Annotated[PositiveFloat, EXECUTION_ONLY] = 60.0
    """Seconds to wait for a reply."""
    cache: Annotated[str, EXECUTION_ONLY] = ""
    """Folder of `grades.jsonl`, with every prompt and raw reply; several runs may share it; "" = the run's own folder."""

    @property
    def is_local(self) -> bool:
        """True if the endpoint is on this machine."""
        return urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ValueError("give an address without key or query, as in https://api.openai.com/v1")
        return url

    @field_validator("prompt")
    @classmethod
    def _asks_about_the_answer(cls, prompt: str) -> str:
        names, allowed = set(re.findall(r"\{(\w+)\}", prompt)), {"question", "answer", "given"}
        if not names <= allowed or "given" not in names:
            raise ValueError("it must have {given}, and may have {question} and {answer}, and no other {name}")
        return prompt

    @model_validator(mode="after")
    def _key_travels_encrypted(self) -> Grader:
        if self.key_variable and urlsplit(self.url).scheme == "http" and not self.is_local:
            raise ValueError(f"url: got {self.url!r} with key_variable; the key would travel in the clear; use https")
        return self


class Evaluate(Spec):
    """When, on which rows and how the global adapter is evaluated."""

    every: NonNegativeInt = 0
    """Rounds between two evaluations; 0 = after the last round only."""
    visible: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(one_or_several)] = ("all",)
    """Modalities of the test rows that the model sees: "all" (or "both"), "none", or names joined by "+", as in "image+text".
    Several values give a result each."""
    metrics: Annotated[tuple[str, ...], ADDED_LATER, BeforeValidator(one_or_several)] = ()
    """Metrics in addition to those of the data set, by name."""
    grader: Annotated[Grader | None, ADDED_LATER] = None
    """LLM judge of open answers, which adds the metrics "graded" and "ungraded" to those of the test rows; a table, or none."""
    batch_size: Annotated[PositiveInt, EXECUTION_ONLY] = 16
    """Test rows that are evaluated at once."""
    max_new_tokens: PositiveInt = 16
    """Tokens of a generated answer at most."""
    limit: NonNegativeInt = 0
    """Number of test rows, the first ones; 0 = all."""
    rows: Annotated[Literal["test", "validation"], ADDED_LATER] = "test"
    """Rows that the results are about. "validation" is for tuning: the test rows are not read."""
    own_rows: Annotated[Literal["auto", "on", "off"], ADDED_LATER] = "auto"
    """Metrics on each client's own share of the test rows, split by the partition's law and the seed, next to those on all of
    them. "auto" = if clients have models of their own; "on" = for the global adapter, too."""
    select: Literal["last", "validation"] = "last"
    """Adapter that is the result: that of the last round, or the best on the validation rows."""

    def graded_metrics(self) -> tuple[str, ...]:
        """Names of the metrics that the LLM judge adds; () without one."""
        return GRADED if self.grader else ()

    @model_validator(mode="after")
    def _grades_need_a_judge(self) -> Evaluate:
        if not self.grader and (named := [name for name in self.metrics if name in GRADED]):
            raise ValueError(f'metrics: got "{named[0]}", which needs the table evaluate.grader')
        return self

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
                known = ", ".join(sorted(METRICS))
                raise ValueError(f"no metric {name!r}; allowed: {known}{nearest(name, METRICS)}{HINT}")
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
