"""An experiment as a value: TOML in, closed and frozen Specs out. Loads no torch."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)

import fedmllm.algorithms
import fedmllm.data
import fedmllm.scenarios
from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.objectives import Objective, TaskLoss
from fedmllm.algorithms.server_optimizers import FedAvg
from fedmllm.backbones.base import BackboneSpec, Tiny
from fedmllm.config.engine import Engine, Stacked
from fedmllm.config.train import Checkpointing, Evaluate, Train, UpdateFilter
from fedmllm.core.errors import ConfigError
from fedmllm.core.metrics import METRICS
from fedmllm.core.spec import EXECUTION_ONLY, Named, Spec, current_keys, nearest, validate
from fedmllm.core.types import visible_of
from fedmllm.data.base import Dataset
from fedmllm.data.prompts import Plain, Prompt
from fedmllm.scenarios.availability import Always, Availability
from fedmllm.scenarios.masks import Aligned, Scenario
from fedmllm.scenarios.partitions import ByColumn, Dirichlet, Partition

# A new file in one of these packages adds its members; nothing else has to change.
for _package in (fedmllm.algorithms, fedmllm.data, fedmllm.scenarios):
    for _module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        importlib.import_module(_module.name)

FAMILIES: dict[str, type[Named]] = {
    "data": Dataset,
    "partition": Partition,
    "scenario": Scenario,
    "prompt": Prompt,
    "backbone": BackboneSpec,
    "objective": Objective,
    "aggregator": Aggregator,
    "availability": Availability,
    "engine": Engine,
}


class Experiment(Spec):
    """data x scenario x prompt x backbone x objective x aggregator x rounds."""

    old_keys: ClassVar[Mapping[str, str]] = {"update_filter": "screen"}

    data: SerializeAsAny[Dataset]
    partition: SerializeAsAny[Partition] = Dirichlet()
    scenario: SerializeAsAny[Scenario] = Aligned()
    prompt: SerializeAsAny[Prompt] = Plain()
    backbone: SerializeAsAny[BackboneSpec] = Tiny()
    objective: SerializeAsAny[Objective] = TaskLoss()
    aggregator: SerializeAsAny[Aggregator] = FedAvg()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    update_filter: UpdateFilter = UpdateFilter()
    availability: SerializeAsAny[Availability] = Always()
    checkpoint: Annotated[Checkpointing, EXECUTION_ONLY] = Checkpointing()
    method: Literal["federated", "zero-shot", "majority", "local", "centralised"] = "federated"
    engine: Annotated[SerializeAsAny[Engine], EXECUTION_ONLY] = Stacked()
    num_rounds: PositiveInt = 25
    cohort_size: PositiveInt = 2
    cohort: Literal["seeded", "reference"] = "seeded"
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _metrics_exist(self) -> Experiment:
        for name in self.data.metrics():
            if name not in METRICS:
                raise ValueError(f"no metric {name!r}; allowed: {', '.join(sorted(METRICS))}{nearest(name, METRICS)}")
        return self

    @model_validator(mode="after")
    def _published_cohort_is_of_ten(self) -> Experiment:
        num_clients = self.partition.num_clients
        if self.cohort == "reference" and (self.cohort_size > 10 or num_clients not in (0, 10)):
            raise ValueError(
                'cohort: got "reference", the published draw over 10 clients, for cohort_size '
                f"{self.cohort_size} of {num_clients} clients; allowed: seeded"
            )
        return self

    @model_validator(mode="after")
    def _cohort_is_large_enough(self) -> Experiment:
        least = self.server().least_updates()
        if self.method == "federated" and self.cohort_size < least:
            raise ValueError(
                f"cohort_size: got {self.cohort_size}; {self.aggregator.name} needs {least} updates a round"
            )
        return self

    @model_validator(mode="after")
    def _clients_are_enough(self) -> Experiment:
        num_clients = self.partition.num_clients
        if self.method == "federated" and 0 < num_clients < self.cohort_size:
            raise ValueError(f"cohort_size: got {self.cohort_size}; at most partition.num_clients = {num_clients}")
        self.scenario.check(self.data.modalities(), num_clients)
        return self

    @model_validator(mode="after")
    def _visible_modalities_exist(self) -> Experiment:
        for text in self.evaluate.visible:
            visible_of(text, self.data.modalities())
        return self

    def server(self) -> Aggregator:
        """What folds updates: the aggregator; plain FedAvg where nothing is federated, so that a yardstick stays one."""
        return self.aggregator if self.method == "federated" else FedAvg()

    @classmethod
    def parse(cls, table: Mapping[str, Any], place: str = "") -> Experiment:
        """The experiment that a TOML table describes. Raises ConfigError listing every bad key."""
        values, errors = dict(table), []
        for key, family in FAMILIES.items():
            if key in values:
                try:
                    values[key] = family.pick(values[key], key)
                except ConfigError as error:
                    errors.append(str(error))
                    del values[key]
        data = values.get("data")
        if "partition" not in values and isinstance(data, Dataset) and data.client_column():
            values["partition"] = ByColumn()  # the rows name their clients: the real federation, no simulation
        try:
            experiment = validate(cls, values, "")
        except ConfigError as error:
            lines = str(error).splitlines()
            broken = {line.split(".")[0].split(":")[0] for line in errors}
            errors += [line for line in lines if line.split(":")[0] not in broken]
        if errors:
            prefix = f"{place}: " if place else ""
            raise ConfigError("\n".join(prefix + line for error in errors for line in error.splitlines()))
        return cast("Experiment", experiment)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
        """Read a TOML file; `overrides` are "a.b=value" in TOML, where a bare word counts as a string."""
        table = read_toml(Path(path))
        if "matrix" in table:
            raise ConfigError(f"{path}: a suite of experiments, not one; `fedmllm suite {path}` runs it")
        warn_of_old_keys(table, str(path))
        table = current_keys(cls, table, str(path))
        for override in overrides:
            set_key(table, override)
        return cls.parse(table, str(path))

    def run_id(self) -> str:
        """Twelve hex digits: equal for experiments that must give equal results."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:12]

    def method_name(self) -> str:
        """What a table calls it: the aggregator, with the objective where there is one; or the unfederated method."""
        if self.method in ("zero-shot", "majority"):
            return self.method
        head = self.aggregator.name if self.method == "federated" else self.method
        return head if self.objective.name == "task" else f"{head}+{self.objective.name}"

    def setting(self) -> str:
        """What distinguishes this scenario from others of its name: "rate=0.5"; for aligned, how rows are split."""
        spec = self.partition if self.scenario.name == "aligned" else self.scenario
        shown = {k: v for k, v in spec.model_dump(mode="json").items() if k not in ("name", "num_clients") and v}
        words = [f"{k}={v}" for k, v in shown.items()]
        if self.availability.name != "always":
            rates = self.availability.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
            words += [self.availability.name, *(f"{k}={v}" for k, v in rates.items())]
        return " ".join(words) or spec.name


def read_toml(path: Path) -> dict[str, Any]:
    """The file's table; a BOM does no harm. Raises ConfigError where it cannot be read or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, or lists in lists in lists
        raise ConfigError(f"{path}: not a TOML file: {error}") from None


def warn_of_old_keys(table: Mapping[str, Any], place: str) -> None:
    """Issue a FutureWarning for each key of an experiment that has a new name."""
    for new, old in Experiment.old_keys.items():
        if old in table:
            warnings.warn(
                f"{place}: {old}: renamed to {new!r}; the old name goes in the next release", FutureWarning, 2
            )


def set_key(table: dict[str, Any], override: str) -> None:
    """`a.b=value` into a nested table. A family given by its bare name becomes a table first."""
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override!r}: write key=value or table.key=value")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    here = table
    keys[0] = next((new for new, old in Experiment.old_keys.items() if old == keys[0]), keys[0])
    default = Experiment.model_fields[keys[0]].default if keys[0] in FAMILIES else None
    if keys[0] not in table and isinstance(default, Named):  # a key of the family's default member
        table[keys[0]] = {"name": default.name}
    for key in keys[:-1]:
        inner = here.setdefault(key, {})
        if isinstance(inner, str):
            inner = here[key] = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {key!r} is {inner!r}, not a table")
        here = inner
    if keys[-1] == "name" and here.get("name") != value:
        here.clear()  # another member of the family: the old one's keys are not its keys
    here[keys[-1]] = value
