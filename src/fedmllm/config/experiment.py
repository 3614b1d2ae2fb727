"""An experiment as a frozen value, from TOML or keywords."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import tomllib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    BeforeValidator,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)

import fedmllm.algorithms
import fedmllm.algorithms.privacy
import fedmllm.data
import fedmllm.scenarios
import fedmllm.scenarios.modalities
from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.objectives import FedProx, Objective, TaskLoss
from fedmllm.algorithms.privacy.base import NoPrivacy, Privacy
from fedmllm.algorithms.privacy.client_dp import ClientDp
from fedmllm.algorithms.privacy.row_dp import RowDp
from fedmllm.algorithms.relations import One, Relation
from fedmllm.algorithms.server_optimizers import FedAvg
from fedmllm.backbones.base import BackboneSpec, Tiny
from fedmllm.config.engine import (
    LEAST_SITES,
    MOST_SITES,
    Engine,
    FlowerSimulation,
    FlowerSites,
    SecureAggregation,
    Stacked,
)
from fedmllm.config.public import Public
from fedmllm.config.sites import check_sites
from fedmllm.config.train import USUAL, Checkpointing, Evaluate, Personal, Train, UpdateFilter
from fedmllm.core.errors import ConfigError
from fedmllm.core.metrics import METRICS, PLUGIN_METRICS
from fedmllm.core.plugins import HINT, PluginSource, load_entry_points, load_plugins, source_of_import
from fedmllm.core.spec import ADDED_LATER, EXECUTION_ONLY, Named, Spec, checked, current_keys, nearest, one_or_several
from fedmllm.core.types import Visible, visible_of
from fedmllm.data.base import Dataset
from fedmllm.data.prompts import Plain, Prompt
from fedmllm.scenarios.availability import Always, Availability
from fedmllm.scenarios.masks import Aligned, Scenario
from fedmllm.scenarios.modalities.completion import Completion, Nothing, Role, strictest
from fedmllm.scenarios.modalities.dropout import ModalityDropout, NoDropout
from fedmllm.scenarios.partitions import ByColumn, Dirichlet, Partition

# A new file in one of these packages adds its members; nothing else has to change.
for _package in (
    fedmllm.algorithms,
    fedmllm.algorithms.privacy,
    fedmllm.data,
    fedmllm.scenarios,
    fedmllm.scenarios.modalities,
):
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
    "privacy": Privacy,
    "completion": Completion,
    "relation": Relation,
    "modality_dropout": ModalityDropout,
    "engine": Engine,
}

SUITE_KEYS = frozenset({"matrix", "extends"})  # a file with one of them is a suite
WITHOUT_MODEL = ("majority", "question-prior")  # methods that answer from the training answers alone
UNTRAINED = ("zero-shot", *WITHOUT_MODEL)


class Experiment(Spec):
    """data x scenario x prompt x backbone x objective x aggregator x rounds."""

    old_keys: ClassVar[Mapping[str, str]] = {"update_filter": "screen"}

    data: SerializeAsAny[Dataset]
    """Rows, modalities and metrics."""
    partition: SerializeAsAny[Partition] = Dirichlet()
    """Split of the training rows over the clients; by-column if the rows name their clients."""
    scenario: SerializeAsAny[Scenario] = Aligned()
    """Modalities that are hidden from clients."""
    prompt: SerializeAsAny[Prompt] = Plain()
    """Text that a row becomes."""
    backbone: SerializeAsAny[BackboneSpec] = Tiny()
    """The frozen model and its LoRA."""
    objective: SerializeAsAny[Objective] = TaskLoss()
    """Client half of the algorithm."""
    aggregator: SerializeAsAny[Aggregator] = FedAvg()
    """Server half of the algorithm."""
    train: Train = Train()
    """Settings of local training."""
    evaluate: Evaluate = Evaluate()
    """Settings of the evaluation."""
    update_filter: UpdateFilter = UpdateFilter()
    """Check of the clients' updates."""
    availability: SerializeAsAny[Availability] = Always()
    """Clients that drop out or straggle."""
    privacy: Annotated[SerializeAsAny[Privacy], ADDED_LATER] = NoPrivacy()
    """What is clipped and noised."""
    completion: Annotated[SerializeAsAny[Completion], ADDED_LATER] = Nothing()
    """Filling or conversion of missing modalities."""
    relation: Annotated[SerializeAsAny[Relation], ADDED_LATER] = One()
    """Graph over the clients: adapters that differ by what clients hold, and are mixed."""
    modality_dropout: Annotated[SerializeAsAny[ModalityDropout], ADDED_LATER] = NoDropout()
    """Modalities that complete rows lose in training."""
    public: Annotated[Public, ADDED_LATER] = Public()
    """Rows that all clients may read."""
    checkpoint: Annotated[Checkpointing, EXECUTION_ONLY] = Checkpointing()
    """Settings of checkpoints."""
    method: Literal["federated", "zero-shot", "majority", "question-prior", "local", "centralised", "personal"] = (
        "federated"
    )
    """The federation, or a baseline. "majority" and "question-prior" use no model: the most frequent training answer of all,
    or to each question text."""
    budget: Annotated[Literal["equal-visits", "converged"], ADDED_LATER] = "equal-visits"
    """Training of methods "local" and "centralised": as many visits to a row as in the federation, or num_rounds rounds,
    of which the best on the validation rows counts."""
    personal: Annotated[Personal, ADDED_LATER] = Personal()
    """Fine-tuning of each client, for method "personal"."""
    engine: Annotated[SerializeAsAny[Engine], EXECUTION_ONLY] = Stacked()
    """How a round is computed."""
    num_rounds: PositiveInt = 25
    """Rounds of the federation."""
    cohort_size: NonNegativeInt = 2
    """Clients that are sampled in a round; 0 = all that hold rows, which is the default if the rows name their clients."""
    cohort: Literal["seeded", "reference", "poisson"] = "seeded"
    """Draw of a round's clients: from the seed; as the published code draws among 10 clients; or each client with probability
    cohort_size / number of clients by a secret key, for privacy "client-dp"."""
    seed: NonNegativeInt = 0
    """Seed of every random stream."""
    imports: Annotated[tuple[str, ...], EXECUTION_ONLY, BeforeValidator(one_or_several)] = ()
    """Plug-ins to load first: module names, or paths that end in .py and count from the file that names them."""

    def __init__(self, /, **table: Any) -> None:
        """Check settings as they stand in a TOML file: `Experiment(data="synthetic-irony", scenario="missing")`.

        Args:
            table: Keys of an experiment file. A family's value may be a name, a table with a name, or a member.

        Raises:
            ConfigError: A key or value is not allowed; the message lists all of them.
        """
        values, errors = _members(current_keys(type(self), table, ""))
        try:
            checked(type(self), values, "", lambda known: super(Experiment, self).__init__(**known))
        except ConfigError as error:
            broken = {line.split(".")[0].split(":")[0] for line in errors}
            errors += [line for line in str(error).splitlines() if line.split(":")[0] not in broken]
        if errors:
            raise ConfigError("\n".join(errors))
        # Another process that runs this experiment (of a suite, of Ray) has to load the plug-ins that it uses.
        if used := [source.import_name for source in self.plugins() if source.import_name]:
            self.__dict__["imports"] = tuple(dict.fromkeys([*self.imports, *used]))
            self.__pydantic_fields_set__.add("imports")

    @model_validator(mode="after")
    def _metrics_exist(self) -> Experiment:
        for name in self.metrics():
            if name not in METRICS:
                known = ", ".join(sorted(METRICS))
                raise ValueError(f"no metric {name!r}; allowed: {known}{nearest(name, METRICS)}{HINT}")
        return self

    @model_validator(mode="after")
    def _convergence_is_measured(self) -> Experiment:
        if self.budget == "converged" and self.method not in ("local", "centralised"):
            raise ValueError(f'budget: got "converged" for method {self.method!r}; it is for: local, centralised')
        if self.budget == "converged" and self.evaluate.select != "validation":
            raise ValueError('budget: "converged" needs evaluate.select = "validation", which picks the round')
        return self

    @model_validator(mode="after")
    def _published_cohort_is_of_ten(self) -> Experiment:
        num_clients = self.partition.num_clients
        if self.cohort == "reference" and (not 0 < self.cohort_size <= 10 or num_clients not in (0, 10)):
            raise ValueError(
                'cohort: got "reference", the published draw over 10 clients, for cohort_size '
                f"{self.cohort_size} of {num_clients} clients; allowed: seeded"
            )
        return self

    @model_validator(mode="after")
    def _cohort_is_large_enough(self) -> Experiment:
        least = self.server().least_updates()
        if self.federates and 0 < self.cohort_size < least:
            raise ValueError(
                f"cohort_size: got {self.cohort_size}; {self.aggregator.name} needs {least} updates a round"
            )
        return self

    @model_validator(mode="after")
    def _engine_and_settings_suit_the_aggregator(self) -> Experiment:
        aggregator = self.server()
        unequal, ranks = self.backbone.lora.unequal(), self.backbone.lora.ranks
        if (unequal or ranks) and self.method != "federated":
            what = unequal or f"backbone.lora.ranks: got {list(ranks)}"
            raise ValueError(
                f'{what}; no effect with method = "{self.method}", which trains adapters of rank lora.r; leave it out'
            )
        check_engine_carries(aggregator, self.engine, unequal)
        if isinstance(self.engine, FlowerSites) and self.engine.secure:
            check_secure(self, self.engine.secure, self.cohort_size)
        if isinstance(self.engine, FlowerSites):
            check_sites(self)
        if aggregator.one_round and self.num_rounds > 1:
            raise ValueError(
                f"num_rounds: got {self.num_rounds}; {aggregator.name} communicates once; allowed: 1. More local training "
                "is train.epochs"
            )
        if (init := self.backbone.lora.init) != aggregator.lora_init:
            raise ValueError(
                f'backbone.lora.init: got "{init}"; {aggregator.name} starts from "{aggregator.lora_init}"; '
                f"allowed: {aggregator.lora_init}"
            )
        if self.method == "personal" and (aggregator.grows or aggregator.one_round or not aggregator.global_model):
            raise ValueError(
                f'method: got "personal", which fine-tunes a global adapter of rank lora.r; {aggregator.name} has '
                f"{'one of another rank' if aggregator.global_model else 'none'}"
            )
        if self.method != "personal" and self.personal != Personal():
            raise ValueError(f'personal: no effect with method = "{self.method}"; set method = "personal"')
        if not aggregator.global_model and (self.evaluate.every or self.evaluate.select != "last"):
            raise ValueError(
                f"evaluate: {aggregator.name} has no global model; its clients' models are evaluated after the last round. "
                'Leave out every, and select unless it is "last"'
            )
        return self

    @model_validator(mode="after")
    def _privacy_can_be_kept(self) -> Experiment:
        if self.cohort == "poisson" and not self.privacy.central:
            raise ValueError(
                f'cohort: got "poisson", a secret draw, with privacy "{self.privacy.name}"; it is for: client-dp'
            )
        if isinstance(self.privacy, ClientDp):
            check_client_dp(self, self.privacy)
        if isinstance(self.privacy, RowDp):
            check_row_dp(self, self.privacy)
        return self

    @model_validator(mode="after")
    def _clients_are_enough(self) -> Experiment:
        num_clients = self.partition.num_clients
        if self.federates and 0 < num_clients < self.cohort_size - self.public.client:
            more = " + 1 public client" if self.public.client else ""
            raise ValueError(
                f"cohort_size: got {self.cohort_size}; at most partition.num_clients = {num_clients}{more}"
            )
        self.scenario.check(self.data.modalities(), num_clients)
        return self

    @model_validator(mode="after")
    def _adapter_suits_the_method(self) -> Experiment:
        if self.backbone.adapter and self.method in WITHOUT_MODEL:
            raise ValueError(
                f'backbone.adapter: no effect with method = "{self.method}", which uses no model; leave it out'
            )
        if self.backbone.adapter and not self.server().warm_start:
            raise ValueError(
                f"backbone.adapter: got {self.backbone.adapter!r}; {self.aggregator.name} starts from a new adapter. "
                "Leave it out, or choose another aggregator"
            )
        return self

    @model_validator(mode="after")
    def _engine_carries_the_spread_model(self) -> Experiment:
        spread = self.backbone.device_map if isinstance(self.backbone, BackboneSpec) else ()
        if spread and "several-devices" not in self.engine.supports:
            raise ValueError(
                f"backbone.device_map: got {list(spread)} with engine {self.engine.name!r}, which computes on one device; set "
                f"engine.name to one of: {engines_that(['several-devices'])}"
            )
        return self

    @model_validator(mode="after")
    def _replicas_include_the_model(self) -> Experiment:
        device = getattr(self.backbone, "device", "auto")
        if isinstance(self.engine, Stacked) and not self.engine.includes(device):
            raise ValueError(
                f'backbone.device: got "{device}" with engine.devices = {list(self.engine.devices)}; the model that is loaded '
                "there is the first of the copies, so its device must be one of them"
            )
        return self

    @model_validator(mode="after")
    def _public_rows_are_read(self) -> Experiment:
        completion, relation, public = self.completion, self.relation, self.public
        if relation.needs_public and not public.rows:
            raise ValueError(
                f"public.rows: got 0; relation {relation.name!r} is trained on public rows; allowed: 1 or more"
            )
        if relation.needs_public and (public.client or completion.needs_public):
            reads = "public.client = true" if public.client else f"completion {completion.name!r}"
            raise ValueError(
                f"relation: got {relation.name!r} with {reads}: clients would train on the public rows that it is measured on"
            )
        if completion.needs_public and not public.rows:
            raise ValueError(
                f"public.rows: got 0; completion {completion.name!r} needs public rows. Without a row that shows all "
                "modalities, how they go together cannot be known"
            )
        if public.rows and not (completion.needs_public or relation.needs_public or public.client):
            raise ValueError(
                f"public: no effect with completion = {completion.name!r}; set public.client = true, or a completion "
                "or relation that reads public rows"
            )
        if public.client and self.method in ("local", "personal"):
            raise ValueError(f"public.client: got true for method {self.method!r}, whose mean is over real clients")
        own = public.data is None or public.data == self.data
        if public.rows and own and (self.evaluate.select == "validation" or self.evaluate.rows == "validation"):
            raise ValueError(
                "public: its rows are the validation rows, which evaluate.select or evaluate.rows reads; set public.data"
            )
        if public.rows and own and public.split == "train":
            raise ValueError("public.split: got 'train' of the set whose training rows the clients hold")
        return self

    @model_validator(mode="after")
    def _relation_suits_the_rest(self) -> Experiment:
        relation, aggregator = self.relation, self.aggregator
        if relation == One():
            return self
        if self.method != "federated":
            raise ValueError(f"relation: got {relation.name!r} with method {self.method!r}; it is for: federated")
        if not aggregator.optimizes:
            able = aggregators_that(lambda member: member.optimizes)
            raise ValueError(f"relation: got {relation.name!r} with aggregator {aggregator.name!r}; allowed: {able}")
        if self.backbone.lora.unequal():
            raise ValueError(
                f"relation: got {relation.name!r} with lora.ranks or lora.rank_column; adapters of unequal ranks are not mixed"
            )
        if self.privacy.name != "none":
            raise ValueError(
                f"relation: got {relation.name!r} with privacy {self.privacy.name!r}, which releases one mean of all clients"
            )
        if self.evaluate.select != "last":
            raise ValueError(
                f'relation: got {relation.name!r} with evaluate.select = "validation", which selects one adapter'
            )
        if "profiles" not in self.engine.supports:
            able = engines_that(["profiles"])
            raise ValueError(
                f"engine.name: got {self.engine.name!r}, whose server does not know the clients' modalities; allowed: {able}"
            )
        return self

    @model_validator(mode="after")
    def _modality_dropout_suits_the_rest(self) -> Experiment:
        dropout = self.modality_dropout
        if dropout == NoDropout():
            return self
        dropout.check(self.data.modalities())
        if self.completion.name != "none":
            raise ValueError(
                f"modality_dropout: got {dropout.name!r} with completion {self.completion.name!r}, which would fill what is "
                "dropped"
            )
        if dropout.measured_rows() and self.privacy.name != "none":
            raise ValueError(
                f"modality_dropout: got {dropout.name!r} with privacy {self.privacy.name!r}, which does not cover the "
                "importance that clients report; allowed: uniform, none"
            )
        if "modality-dropout" not in self.engine.supports:
            able = engines_that(["modality-dropout"])
            raise ValueError(f"engine.name: got {self.engine.name!r}, which drops no modalities; allowed: {able}")
        return self

    @model_validator(mode="after")
    def _completion_suits_the_engine_and_the_adapter(self) -> Experiment:
        if self.completion == Nothing() and not self.public.rows:
            return self
        self.completion.check(self.data.modalities())
        if (pictures := self.data.picture_modalities()) is not None:
            self.completion.check_kinds(pictures, frozenset(self.data.modalities()) - pictures)
        if "completion" not in self.engine.supports:
            able = engines_that(["completion"])
            raise ValueError(
                f"engine.name: got {self.engine.name!r}, which supports neither completion nor public rows; "
                f"allowed: {able}"
            )
        if self.completion.learns and "learned-completion" not in self.engine.supports:
            able = engines_that(["completion", "learned-completion"])
            raise ValueError(
                f"engine.name: got {self.engine.name!r}, which does not support completion {self.completion.name!r}, "
                f"learned before training; allowed: {able}"
            )
        if self.completion.learns and self.method not in ("federated", "centralised"):
            raise ValueError(
                f"completion: got {self.completion.name!r}, which all clients learn together, with method {self.method!r}; "
                "allowed: federated, centralised"
            )
        if self.completion.learns and self.privacy.name != "none":
            raise ValueError(
                f"completion: got {self.completion.name!r} with privacy {self.privacy.name!r}, which does not cover what "
                "clients send before training"
            )
        if self.completion.reads_model and self.backbone.lora.train_extra:
            raise ValueError(
                f"backbone.lora.train_extra: got {list(self.backbone.lora.train_extra)}; completion "
                f"{self.completion.name!r} reads the frozen model, which must not be trained"
            )
        return self

    @model_validator(mode="after")
    def _visible_modalities_exist(self) -> Experiment:
        seen: dict[tuple[Visible, bool], str] = {}
        for text in self.evaluate.visible:
            named = (
                visible_of(text, self.data.modalities()),
                text in ("all", "both"),
            )  # may stand next to their own list
            if named in seen:
                raise ValueError(
                    f"evaluate.visible: got {seen[named]!r} and {text!r}, the same modalities twice; allowed: each set once"
                )
            seen[named] = text
        return self

    @property
    def federates(self) -> bool:
        """True if the method has a federation with cohorts, rather than a baseline."""
        return self.method in ("federated", "personal")

    @property
    def has_personal_models(self) -> bool:
        """True if the result is a model for each client."""
        return self.method in ("local", "personal") or (
            self.method == "federated" and (self.relation.personal or not self.aggregator.global_model)
        )

    def server(self) -> Aggregator:
        """The aggregator; FedAvg for a baseline, which has one client at a time.

        Returns:
            The aggregator that folds the updates.
        """
        return self.aggregator if self.federates else FedAvg()

    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that are computed: those of the data set, its headline first, `evaluate.metrics`, and grades.

        Returns:
            Names without repetition.
        """
        return tuple(dict.fromkeys([*self.data.metrics(), *self.evaluate.metrics, *self.evaluate.graded_metrics()]))

    def plugins(self) -> tuple[PluginSource, ...]:
        """Return the origins of all that is not shipped with the package: `imports`, members and metrics.

        Returns:
            One origin per module or file, with its digest.
        """
        named = [spec for spec in self.specs() if isinstance(spec, Named)]
        bases = [base for spec in named for base in type(spec).__mro__ if issubclass(base, Named) and base is not Named]
        found = [source_of_import(name) for name in self.imports]
        found += [base.plugin for base in bases] + [PLUGIN_METRICS.get(name) for name in self.metrics()]
        return tuple(dict.fromkeys(source for source in found if source))

    @classmethod
    def parse(cls, table: Mapping[str, Any], place: str = "") -> Experiment:
        """Return the experiment that a TOML table describes.

        Args:
            table: Keys and values as in an experiment file, or as `dump` gives them.
            place: Beginning of each line of an error message, such as the file's name.

        Returns:
            The experiment.

        Raises:
            ConfigError: A key or value is not allowed; the message lists all of them.
        """
        try:
            return cls(**table)
        except ConfigError as error:
            prefix = f"{place}: " if place else ""
            raise ConfigError("\n".join(prefix + line for line in str(error).splitlines())) from error.__cause__

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
        """Read a TOML file.

        Args:
            path: The file. Plug-ins that it names by relative paths are searched in its folder.
            overrides: Changes of single keys, "a.b=value" in TOML; a bare word counts as a string.

        Returns:
            The experiment.

        Raises:
            ConfigError: The file cannot be read, is not TOML or is a suite, or a key or value is not allowed.
        """
        path = Path(path)
        table = read_toml(path)
        if SUITE_KEYS.intersection(table):
            raise ConfigError(f"{path}: a suite of experiments, not one; `fedmllm suite {path}` runs it")
        warn_of_old_keys(table, str(path))
        table = current_keys(cls, table, str(path))
        table |= imports_of(table, path)
        for override in overrides:
            set_key(table, override)
        return cls.parse(table, str(path))

    def changed(self, overrides: Sequence[str], place: str = "") -> Experiment:
        """Return the experiment with other values of single keys.

        Args:
            overrides: "a.b=value" in TOML; a bare word counts as a string.
            place: Beginning of each line of an error message.

        Returns:
            A new experiment, or this one if there are no overrides.

        Raises:
            ConfigError: A key or value is not allowed; the message lists all of them.
        """
        if not overrides:
            return self
        table = self.dump()
        for override in overrides:
            set_key(table, override)
        return Experiment.parse(table, place)

    def run_id(self) -> str:
        """Twelve hex digits: equal for experiments that must give equal results.

        Returns:
            The first twelve digits of the SHA-256 of `identity()`.
        """
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:12]

    def method_name(self) -> str:
        """Name in tables: the aggregator or the baseline; objective, privacy and a plug-in engine if there are any.

        Returns:
            A name such as "fedadam" or "fedavg+fedprox".
        """
        if self.method in UNTRAINED:
            return self.method
        head = self.aggregator.label() if self.federates else self.method
        head = f"personal-{head}" if self.method == "personal" else head
        objective = [] if self.objective.name == "task" else [self.objective.name]
        completion = [] if self.completion.name == "none" else [self.completion.label()]
        public = ["public-client"] if self.public.client else []
        relation = [] if self.relation.name == "one" else [self.relation.label()]
        dropout = [] if self.modality_dropout.name == "none" else [self.modality_dropout.label()]
        gate = ["modality-gate"] if self.backbone.lora.modality_gate else []
        privacy = [label] if (label := self.privacy.label()) else []
        engine = [self.engine.name] if self.engine.plugin else []  # it may change results
        return "+".join([head, *objective, *gate, *relation, *dropout, *completion, *public, *privacy, *engine])

    def role(self) -> Role:
        """Return the part in a comparison: of the completion; public rows as one more client are a control.

        Returns:
            "method", "control" or "bound". Reports rank and recommend methods alone.
        """
        return strictest([self.completion.role(), "control" if self.public.client else "method"])

    def setting(self) -> str:
        """Return what distinguishes this scenario from others of its name: "rate=0.5"; for aligned, how rows are split.

        Returns:
            Key=value pairs separated by blanks, or a member's name.
        """
        spec = self.partition if self.scenario.name == "aligned" else self.scenario
        left_out = ("name", "num_clients", *self.scenario.without_effect())
        settings = {k: v for k, v in spec.model_dump(mode="json").items() if k not in left_out and v}
        words = [f"{k}={v}" for k, v in settings.items()]
        if self.availability.name != "always":
            rates = self.availability.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
            words += [self.availability.name, *(f"{k}={v}" for k, v in rates.items())]
        return " ".join(words) or spec.name


def _members(table: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the table with each family's member in place of its name or table, lines of errors); loads plug-ins first."""
    values: dict[str, Any] = dict(table)
    values |= imports_of(values, None)
    errors: list[str] = []
    for key, family in FAMILIES.items():
        if key in values:
            try:
                values[key] = family.pick(values[key], key)
            except ConfigError as error:
                errors += str(error).splitlines()
                del values[key]
    data = values.get("data")
    if "partition" not in values and isinstance(data, Dataset) and data.client_column():
        values["partition"] = ByColumn()  # the rows name their clients: the real federation, without a simulated split
        if "privacy" not in values:  # whose noise depends on the number of clients
            values.setdefault("cohort_size", 0)  # few sites, all of them there: each one trains in every round
    train, backbone = values.get("train"), values.get("backbone", Tiny())
    if isinstance(train, Mapping) and train.get("lr") == USUAL and isinstance(backbone, BackboneSpec):
        values["train"] = {**train, "lr": backbone.usual_lr}  # identity and records have the number
    return values, errors


def imports_of(table: Mapping[str, Any], file: Path | None) -> dict[str, tuple[str, ...]]:
    """Load what the key `imports` names, and return it with absolute paths.

    Args:
        table: Settings that may have the key.
        file: The file that they are from; relative paths count from its folder. None = from the current folder.

    Raises:
        ConfigError: The value is not a list of names, or a plug-in cannot be loaded.
    """
    if "imports" not in table:
        return {}
    names = one_or_several(table["imports"])
    place = f"{file}: imports" if file else "imports"
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{place}: got {table['imports']!r}; give a list of module names and paths of .py files")
    return {"imports": load_plugins(names, place, file.parent if file else None)}


def aggregators_that(suit: Callable[[type[Aggregator]], bool]) -> str:
    """Names of the aggregators that suit, for an error message."""
    members = cast("Mapping[str, type[Aggregator]]", Aggregator.members)
    return ", ".join(sorted(name for name, member in members.items() if suit(member)))


def engines_that(support: Iterable[str]) -> str:
    """Names of the engines with these capabilities, for an error message."""
    members = cast("Mapping[str, type[Engine]]", Engine.members)
    return ", ".join(sorted(name for name, member in members.items() if member.supports.issuperset(support)))


def check_engine_carries(aggregator: Aggregator, engine: Engine, unequal: str = "") -> None:
    """Raise ConfigError if the engine lacks something that the aggregator or unequal ranks need, naming what works."""
    if unequal and not aggregator.mixed_ranks:
        able = aggregators_that(lambda member: member.mixed_ranks)
        raise ConfigError(
            f"{unequal}; {aggregator.name} combines factors of one rank; allowed: leave it out, or choose "
            f"one of these aggregators: {able}"
        )
    needs = aggregator.needs | ({"mixed-ranks"} if unequal else set())
    if missing := sorted(needs - engine.supports):
        able = engines_that(needs)
        raise ConfigError(
            f"engine.name: got {engine.name!r}; {aggregator.name} needs {' and '.join(missing)}, "
            f"which it does not support; allowed: {able}"
        )


def check_client_dp(experiment: Experiment, privacy: ClientDp) -> None:
    """Raise ConfigError for every setting that would make the guarantee of client-dp false, and say what is allowed."""
    e, aggregator = experiment, experiment.aggregator
    if e.method != "federated":
        raise ConfigError(f'privacy: got "client-dp" with method "{e.method}"; it is for: federated')
    if not aggregator.of_the_mean:
        able = aggregators_that(lambda member: member.of_the_mean)
        raise ConfigError(
            f'privacy: "client-dp" releases one noisy mean; aggregator {aggregator.name} uses more of the clients than their '
            f"mean update; allowed: {able}{aggregator.unstated('of_the_mean')}"
        )
    if e.update_filter.on_bad_update != "drop_client":
        raise ConfigError(
            f'update_filter.on_bad_update: got "{e.update_filter.on_bad_update}", which stops a run because of one client\'s '
            'data; with privacy "client-dp" a bad update counts as zeros; allowed: drop_client'
        )
    if e.update_filter.max_norm:
        raise ConfigError(
            f"update_filter.max_norm: got {e.update_filter.max_norm:g}; whom it leaves out shows whose update is longer; with "
            'privacy "client-dp" every update is scaled down to privacy.clip instead; allowed: 0'
        )
    if isinstance(e.engine, FlowerSites) and e.engine.min_sites:
        raise ConfigError(
            f"engine.min_sites: got {e.engine.min_sites}, which repeats a round that some sites did not answer; with privacy "
            '"client-dp" a site that fails counts as zeros; allowed: 0'
        )
    if e.partition.num_clients and privacy.delta * e.partition.num_clients >= 1:
        raise ConfigError(
            f"privacy.delta: got {privacy.delta:g}; allowed: below 1 / partition.num_clients, 1 / {e.partition.num_clients}"
        )
    if not e.cohort_size:
        raise ConfigError('cohort_size: got 0; the noise of privacy "client-dp" needs a number; allowed: 1 and above')
    try:
        privacy.noise_of_sum(e.cohort_size)
    except ValueError as error:
        raise ConfigError(f"privacy.{error}") from None


def check_secure(experiment: Experiment, secure: SecureAggregation, num_sites: int) -> None:
    """Check that a sum of the updates is all that an experiment needs.

    Args:
        experiment: Whose aggregator gets one update a round, the mean over all sites.
        secure: Its `engine.secure`.
        num_sites: Sites of a round; 0 = not known yet.

    Raises:
        ConfigError: More than a sum is needed, or the numbers of sites or bits do not allow one.
    """
    aggregator, unequal = experiment.server(), experiment.backbone.lora.unequal()
    if experiment.privacy.name != "none":
        raise ConfigError(
            f"privacy.name: got {experiment.privacy.name!r}; engine.secure gives the server the sum of the updates only, which "
            "is not combined with noise; allowed: none"
        )
    if not aggregator.weighted_by:
        able = aggregators_that(lambda member: bool(member.weighted_by))
        more = "which returns more than the delta" if "extra" in aggregator.needs else "which needs each site's update"
        raise ConfigError(
            f"aggregator.name: got {aggregator.name!r}, {more}; with engine.secure the server has only the sum of the deltas; "
            f"allowed: {able}{aggregator.unstated('weighted_by')}"
        )
    if unequal:
        raise ConfigError(f"{unequal}; engine.secure sums deltas of one rank; leave it out")
    if num_sites and not LEAST_SITES <= num_sites <= MOST_SITES:
        raise ConfigError(
            f"cohort_size: got {num_sites}; engine.secure needs {LEAST_SITES} to {MOST_SITES} sites a round: of a sum of "
            "two, each learns the other's update"
        )
    secure.words(num_sites or LEAST_SITES, aggregator.weighted_by)


def check_row_dp(experiment: Experiment, privacy: RowDp) -> None:
    """Raise ConfigError for every setting that would make the guarantee of row-dp false, and say what is allowed."""
    e = experiment
    if e.method != "federated":
        raise ConfigError(f'privacy: got "row-dp" with method "{e.method}"; it is for: federated')
    if "extra" in e.aggregator.needs:
        raise ConfigError(
            f'privacy: got "row-dp" with aggregator {e.aggregator.name}, whose clients return more than their delta; allowed: '
            "an aggregator whose clients do not"
        )
    if not isinstance(e.objective, TaskLoss | FedProx):
        raise ConfigError(
            f'privacy: got "row-dp" with objective {e.objective.name}, which depends on the rows; allowed: task, fedprox'
        )
    if privacy.unit == "group" and not (e.data.group_column() or isinstance(e.engine, FlowerSites)):
        raise ConfigError(
            f'privacy.unit: got "group"; data {e.data.name!r} names no column of groups (data.group); allowed: row'
        )
    if e.train.clip_norm:
        raise ConfigError(
            f'train.clip_norm: got {e.train.clip_norm:g}; with privacy "row-dp" each row is clipped to privacy.clip instead; '
            "allowed: 0"
        )
    if unequal := e.backbone.lora.unequal():
        raise ConfigError(f'{unequal} with privacy "row-dp"; leave it out')
    if "row-privacy" not in e.engine.supports:
        able = engines_that(["row-privacy"])
        raise ConfigError(f"engine.name: got {e.engine.name!r}, which does not clip rows (row-dp); allowed: {able}")
    if isinstance(e.engine, FlowerSites) and privacy.simulate_noise:
        raise ConfigError('privacy.simulate_noise: got true with engine "flower-sites"; allowed: false')
    if isinstance(e.engine, FlowerSimulation) and not privacy.simulate_noise:
        raise ConfigError(
            'privacy.simulate_noise: got false with engine "flower-simulation", whose actors have no key; allowed: true'
        )


def read_toml(path: Path) -> dict[str, Any]:
    """The file's table; a BOM does no harm. Raises ConfigError where it cannot be read or is not TOML."""
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


load_entry_points()  # last: a plug-in may import all that is defined above
