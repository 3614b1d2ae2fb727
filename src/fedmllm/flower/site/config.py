"""A site of a real federation: what it owns, what it allows, and what it is asked for. Loads no torch, no Flower.

Everything that names a place (data, model folder, keys) comes from the site's own file. A request from the server holds
settings and no path; what the site has pinned can only be asked for as it is, or is refused with a reason.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, SerializeAsAny, field_validator

from fedmllm.algorithms.objectives import Objective, TaskLoss
from fedmllm.backbones.base import BackboneSpec, Lora, Precision, Tiny
from fedmllm.config.experiment import FAMILIES, Experiment, imports_of
from fedmllm.config.train import Train
from fedmllm.core.errors import ConfigError, DataError, FedmllmError
from fedmllm.core.spec import Spec, nearest, validate
from fedmllm.core.types import Example, Modality, Shard, Visible
from fedmllm.data.base import Dataset
from fedmllm.data.prompts import Plain, Prompt
from fedmllm.scenarios.partitions import value_of

Metric = Literal["loss", "num_steps", "num_tokens", "time_s"]  # what a client's training can report
METRICS: tuple[Metric, ...] = get_args(Metric)
LARGEST_REQUEST = 2**20  # bytes of settings


def check_name(name: str) -> str:
    """A site's name, which goes into commands, logs and terminals. Raises ValueError where it is not fit for them."""
    if not 1 <= len(name) <= 100 or not name.isprintable() or name != name.strip() or name.startswith("-"):
        raise ValueError("a name has 1 to 100 printable characters, no space at its ends and no dash at its beginning")
    return name


class Refused(FedmllmError):
    """A site does not do what is asked. Its message, unlike that of any other error, is for the server's eyes."""


class Request(Spec):
    """What the server asks a site for: train from the adapter that comes with it, for one round, with these settings."""

    version: Literal[1] = 1
    run_id: str
    site: str
    client: int = Field(ge=0, lt=100_000)  # the site's number: it names its random streams
    round: PositiveInt
    num_rounds: PositiveInt
    seed: NonNegativeInt
    base: str  # digest of the server's base model
    prompt: SerializeAsAny[Prompt] = Plain()
    objective: SerializeAsAny[Objective] = TaskLoss()
    train: Train = Train()
    lora: Lora = Lora()
    precision: Precision = Precision()
    max_tokens: PositiveInt = 1200

    @classmethod
    def of(cls, experiment: Experiment, base: str, site: str, client: int, round_: int) -> Request:
        """One site's part of an experiment. No path of the server is in it."""
        e, prompt = experiment, experiment.prompt.model_dump(mode="json")
        if "template" in prompt:
            prompt["template"] = ""  # the wording itself travels
        return cls(
            run_id=e.run_id(),
            site=site,
            client=client,
            round=round_,
            num_rounds=e.num_rounds,
            seed=e.seed,
            base=base,
            prompt=Prompt.pick(prompt, "prompt"),
            objective=e.objective,
            train=e.train,
            lora=e.backbone.lora,
            precision=e.backbone.precision,
            max_tokens=e.backbone.max_tokens,
        )

    @classmethod
    def read(cls, text: str) -> Request:
        """A request as it came. Raises ConfigError naming what is wrong; reads no file."""
        if len(text) > LARGEST_REQUEST:
            raise ConfigError(f"request: {len(text)} characters; at most {LARGEST_REQUEST} are read")
        try:
            table = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"request: not JSON: {error}") from None
        if not isinstance(table, dict):
            raise ConfigError(f"request: got {type(table).__name__}; a table is required")
        prompt = table.get("prompt")
        if isinstance(prompt, dict) and prompt.get("template"):
            raise ConfigError("request.prompt.template: names a file; a server may send a wording, never a path")
        for key in ("prompt", "objective"):
            if key in table:
                table[key] = FAMILIES[key].pick(table[key], f"request.{key}")
        return cast("Request", validate(cls, table, "request"))

    def settings(self) -> dict[str, Any]:
        """Dotted path -> value, of all that a site may allow or refuse."""
        table = self.model_dump(mode="json", exclude={"version", "run_id", "site", "client", "round", "base"})
        return dict(_leaves(table))


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


class Range(Spec):
    """Least and greatest value, both allowed."""

    min: float = -float("inf")
    max: float = float("inf")

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.min <= value <= self.max

    def __str__(self) -> str:
        bounds = {"at least": self.min, "at most": self.max}
        return (
            " and ".join(f"{word} {value:g}" for word, value in bounds.items() if abs(value) != float("inf"))
            or "any number"
        )


CLOSED: Mapping[str, tuple[Any, ...]] = {"lora.targets": ("",), "lora.train_extra": ([],)}  # unless a site opens them


class Allow(Spec):
    """What a server may ask for. A request outside is refused, and the reason reaches the server's record."""

    base: str = ""  # digest of the base model; "" = whichever this site's own backbone has
    max_steps: PositiveInt = 1000  # optimiser steps a round
    max_rounds: PositiveInt = 1000
    settings: dict[str, Range | tuple[Any, ...]] = {}  # noqa: RUF012  "train.lr" = {max = 1e-3}, "prompt.name" = ["plain"]
    metrics: tuple[Metric, ...] = METRICS  # that may leave the site


class Site(Spec):
    """One site's own file, SITE.toml."""

    name: str
    server: str = Field(pattern=r"^[^\s/]+:[0-9]{1,5}$")  # "host:port"
    ca: Path  # certificate of the authority that signed the server's
    key: Path  # this site's private key
    data: SerializeAsAny[Dataset]
    column: str = ""  # where the data hold other sites' rows too, as in a trial: the rows with `value` in `column`
    value: str = ""
    modalities: tuple[Modality, ...] = ()  # that this site has; () = all that its rows have
    backbone: SerializeAsAny[BackboneSpec] = Tiny()
    allow: Allow = Allow()
    threads: NonNegativeInt = 0  # of torch; 0 = its default
    task_timeout_s: PositiveFloat = 6 * 3600.0  # of one round's training; then the trainer is started again
    imports: tuple[str, ...] = ()  # plug-ins of this site, by module name or path; a server cannot name any

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return check_name(name)

    @classmethod
    def load(cls, path: Path) -> Site:
        """Read SITE.toml; the paths of its keys are relative to its folder. Raises ConfigError naming every bad key."""
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not a TOML file: {error}") from None
        here = path.absolute().parent
        try:
            table |= imports_of(table, path.absolute())
            for key in ("data", "backbone"):
                if key in table:
                    table[key] = FAMILIES[key].pick(table[key], key)
            for key in ("ca", "key"):
                if isinstance(table.get(key), str):
                    table[key] = here / table[key]
            site = cast("Site", validate(cls, table, ""))
            site.check()
        except ConfigError as error:
            raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
        return site

    def check(self) -> None:
        """Raise ConfigError where keys do not fit each other."""
        if bool(self.column) != bool(self.value):
            raise ConfigError("column, value: give both, or neither")
        if odd := sorted(set(self.modalities) - set(self.data.modalities())):
            raise ConfigError(f"modalities: got {odd}; {self.data.name} has {list(self.data.modalities())}")
        known = Request(run_id="", site="", client=0, round=1, num_rounds=1, seed=0, base="").settings()
        for key in self.allow.settings:
            if key not in known and not key.startswith(("prompt.", "objective.")):
                allowed = ", ".join(known)
                raise ConfigError(f"allow.settings: unknown setting {key!r}{nearest(key, known)}; allowed: {allowed}")

    def shard(self, client: int) -> tuple[tuple[Example, ...], Shard]:
        """This site's training rows, and which of them it shows with what. Raises DataError where there is none."""
        examples = self.data.load("train").examples
        rows = [i for i, e in enumerate(examples) if not self.column or value_of(e, self.column) == self.value]
        if not rows:
            where = f" with {self.column} = {self.value!r}" if self.column else ""
            raise DataError(f"site {self.name}: no training row{where}")
        profile: Visible = frozenset(self.modalities or self.data.modalities())
        return examples, Shard(client, tuple(rows), tuple(profile & frozenset(examples[i].fields) for i in rows))

    def refuse(self, request: Request, num_steps: int) -> str:
        """Why this site does not do what is asked, as far as that needs no model; "" where it does.

        Args:
            request: As it came.
            num_steps: Optimiser steps that the request comes to on this site's rows.
        """
        allow, reasons = self.allow, []
        if request.site != self.name:
            reasons.append(f"this is {self.name}, not {request.site}")
        if num_steps > allow.max_steps:
            reasons.append(f"{num_steps} optimiser steps; this site allows {allow.max_steps}")
        if request.num_rounds > allow.max_rounds or request.round > request.num_rounds:
            reasons.append(f"round {request.round} of {request.num_rounds}; this site allows {allow.max_rounds}")
        asked = request.settings()
        for key, allowed in {**CLOSED, **allow.settings}.items():
            if key in asked and asked[key] not in allowed:
                said = str(allowed) if isinstance(allowed, Range) else " or ".join(map(repr, allowed))
                reasons.append(f"{key} = {asked[key]!r}; this site allows {said}")
        return self._refusal(reasons)

    def refuse_base(self, request: Request, base: str) -> str:
        """Why this site does not train on its base model, whose digest is `base`; "" where it does."""
        reasons = []
        if self.allow.base and self.allow.base != base:
            reasons.append(f"the base model here is {base[:12]}, but the site has pinned {self.allow.base[:12]}")
        if request.base != base:
            reasons.append(f"base model {request.base[:12]} is not the one here, {base[:12]}")
        return self._refusal(reasons)

    def _refusal(self, reasons: list[str]) -> str:
        return f"refused by site {self.name}: {'; '.join(reasons)}" if reasons else ""


def quiet_environment() -> dict[str, str]:
    """This process's environment with everything off that would reach out: telemetry, update checks, installations."""
    return {**os.environ, **QUIET}


QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}
