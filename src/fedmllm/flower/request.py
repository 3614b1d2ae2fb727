"""Request of a server to a site: settings without paths."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, SerializeAsAny

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.objectives import Objective, TaskLoss
from fedmllm.algorithms.privacy.base import NoPrivacy, Privacy
from fedmllm.algorithms.privacy.row_dp import RowDp
from fedmllm.algorithms.schedules import round_factor
from fedmllm.algorithms.server_optimizers import FedAvg
from fedmllm.backbones.base import Lora, Precision
from fedmllm.config.experiment import FAMILIES, Experiment
from fedmllm.config.train import Train
from fedmllm.core.errors import ConfigError
from fedmllm.core.spec import Spec, validate
from fedmllm.core.types import Round, Sent
from fedmllm.data.prompts import Plain, Prompt
from fedmllm.federation.exchange import Header
from fedmllm.flower.secure.terms import RUN_ID, Terms

ClientMetric = Literal["loss", "num_steps", "num_tokens", "time_s"]  # what a client's training can report
CLIENT_METRICS: tuple[ClientMetric, ...] = get_args(ClientMetric)
LARGEST_REQUEST = 2**20  # characters of settings
KEPT = "kept"  # key of a reply: the state that a client keeps; at a site only its digest
DIGEST = "[0-9a-f]{64}"  # sha256
NOT_SETTINGS = frozenset(
    {"version", "run_id", "site", "client", "round", "cohort", "num_clients", "base", "header", "kept", "secure"}
)


def check_name(name: str) -> str:
    """Check a site's name, which goes into commands, logs and terminals.

    Args:
        name: From a site's file or the command line.

    Returns:
        The name.

    Raises:
        ValueError: It is empty, too long, or has characters that are not printable.
    """
    if not 1 <= len(name) <= 100 or not name.isprintable() or name != name.strip() or name.startswith("-"):
        raise ValueError("a name has 1 to 100 printable characters, no space at its ends and no dash at its beginning")
    return name


def header_of(sent: Sent, aggregator: Aggregator) -> Header | None:
    """The header of what travels with a request; None for a whole adapter that trains as it is."""
    whole = sent.trains is None and not (sent.keeps or sent.known or sent.frozen or sent.extra)
    whole = whole and not aggregator.mixed_ranks
    return None if whole else Header.of(sent)


class Request(Spec):
    """Settings of one round at one site; the adapter to start from travels with it."""

    version: Literal[2] = 2
    run_id: str = Field(pattern=RUN_ID)
    """Of the experiment as the server runs it."""
    site: str
    """Name of the site."""
    client: int = Field(ge=0, lt=100_000)
    """Number of the site, which names its random streams."""
    round: PositiveInt
    """Counts from 1."""
    num_rounds: PositiveInt
    """Of the run, for schedules."""
    seed: NonNegativeInt
    """Of the run."""
    base: str
    """Digest of the server's base model."""
    cohort: tuple[NonNegativeInt, ...] = Field((), max_length=100_000)
    """The clients of the round."""
    num_clients: PositiveInt = 1
    """Clients that can be sampled."""
    ranks: tuple[PositiveInt, ...] = Field((), max_length=1000)
    """The site's LoRA rank, if ranks are unequal; empty = all have `lora.r`."""
    header: Header | None = None
    """Description of the tensors that travel with the request; None = the adapter, and all of it trains."""
    kept: dict[int, Annotated[str, Field(pattern=f"^{DIGEST}$")]] = Field({}, max_length=100_000)
    """Rounds of which the site's own state counts, with its digest."""
    aggregator: SerializeAsAny[Aggregator] = FedAvg()
    """The algorithm, for its client half."""
    prompt: SerializeAsAny[Prompt] = Plain()
    """How rows are rendered; a template's wording, never its path."""
    objective: SerializeAsAny[Objective] = TaskLoss()
    """Local objective."""
    train: Train = Train()
    """Local training."""
    privacy: SerializeAsAny[Privacy] = NoPrivacy()
    """What this site clips and noises: row-dp or none."""
    lora: Lora = Lora()
    """Adapter of the base model."""
    precision: Precision = Precision()
    """Number formats of the base model."""
    max_tokens: PositiveInt = 1200
    """Longest row in tokens."""
    secure: Terms | None = None
    """Terms of a masked reply; None = the reply is in the clear."""

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        base: str,
        site: str,
        client: int,
        at: int | Round,
        header: Header | None = None,
        kept: Mapping[int, str] | None = None,
        largest_rank: int = 0,
    ) -> Request:
        """One site's part of an experiment.

        Args:
            experiment: As the server runs it.
            base: Digest of the server's base model.
            site: Name of the site.
            client: Its number.
            at: The round, or its number for a round of this client alone.
            header: Of what travels with the request; None = the adapter.
            kept: Rounds of which the site's own state counts, with its digest.
            largest_rank: Of an adapter that the site allows; 0 = any.

        Returns:
            A request without any of the server's paths.
        """
        e, prompt = experiment, experiment.prompt.model_dump(mode="json")
        if isinstance(at, int):
            at = Round(at, e.seed, e.num_rounds, (client,), client + 1)
        if "template" in prompt:
            prompt["template"] = ""  # the wording itself travels
        return cls(
            run_id=e.run_id(),
            site=site,
            client=client,
            round=at.number,
            cohort=at.cohort,
            num_clients=at.num_clients,
            ranks=(at.rank(client),) if at.ranks else (),
            header=header,
            kept=dict(kept or {}),
            aggregator=e.server(),
            num_rounds=e.num_rounds,
            seed=e.seed,
            base=base,
            prompt=Prompt.pick(prompt, "prompt"),
            objective=e.objective,
            train=e.train,
            privacy=e.privacy if isinstance(e.privacy, RowDp) else NoPrivacy(),
            lora=e.backbone.lora.at_most(largest_rank),
            precision=e.backbone.precision,
            max_tokens=e.backbone.max_tokens,
        )

    @classmethod
    def read(cls, text: str) -> Request:
        """Read a request from the network. Reads no file.

        Args:
            text: JSON.

        Raises:
            ConfigError: With every bad key, or because the text is too long or not a table.
        """
        if len(text) > LARGEST_REQUEST:
            raise ConfigError(f"request: {len(text)} characters; at most {LARGEST_REQUEST} are allowed")
        try:
            table = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"request: not JSON: {error}") from None
        if not isinstance(table, dict):
            raise ConfigError(f"request: got {type(table).__name__}; a table is required")
        prompt = table.get("prompt")
        if isinstance(prompt, dict) and prompt.get("template"):
            raise ConfigError("request.prompt.template: names a file; a server may send a wording, never a path")
        for key in ("prompt", "objective", "aggregator", "privacy"):
            if key in table:
                table[key] = FAMILIES[key].pick(table[key], f"request.{key}")
        return cast("Request", validate(cls, table, "request"))

    def round_lr(self) -> float:
        """The learning rate of the round, before the schedule over its steps."""
        return self.train.lr * round_factor(self.train.round_schedule, self.round, self.num_rounds)

    def at(self) -> Round:
        """The round as the algorithm sees it."""
        return Round(self.round, self.seed, self.num_rounds, self.cohort, self.num_clients, self.ranks)

    def settings(self) -> dict[str, Any]:
        """All settings that a site may allow or refuse, by dotted path."""
        return dict(_leaves(self.model_dump(mode="json", exclude=set(NOT_SETTINGS))))


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
