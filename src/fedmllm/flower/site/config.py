"""A site's own file: data, keys, and limits for the server.

Everything that names a place (data, model folder, keys) comes from this file. A request from the server has settings and no
path; it is accepted as it is, or refused with a reason.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, SerializeAsAny, field_validator

from fedmllm.algorithms.objectives import FedProx, TaskLoss
from fedmllm.algorithms.privacy.row_dp import RowDp
from fedmllm.backbones.base import BackboneSpec, Tiny
from fedmllm.config.engine import LEAST_SITES
from fedmllm.config.experiment import FAMILIES, imports_of
from fedmllm.core.errors import ConfigError, DataError, FedmllmError, Reason
from fedmllm.core.spec import Spec, nearest, validate
from fedmllm.core.types import Example, Modality, Shard, Visible
from fedmllm.data.base import Dataset
from fedmllm.flower.request import CLIENT_METRICS, ClientMetric, Request, check_name
from fedmllm.flower.secure.terms import Terms
from fedmllm.scenarios.partitions import value_of


class Refused(FedmllmError):
    """A site refuses a request. The message goes to the server, unlike that of any other error."""


class Range(Spec):
    """A range of numbers, both ends included."""

    min: float = -float("inf")
    """Least value."""
    max: float = float("inf")
    """Greatest value."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.min <= value <= self.max

    def __str__(self) -> str:
        bounds = {"at least": self.min, "at most": self.max}
        return (
            " and ".join(f"{word} {value:g}" for word, value in bounds.items() if abs(value) != float("inf"))
            or "any number"
        )


# Limits that hold unless a site's own [allow.settings] has the same key.
DEFAULTS: dict[str, Range | tuple[Any, ...]] = {
    "lora.targets": ("",),
    "lora.train_extra": ([],),
    "lora.modality_gate": (False,),
    "lora.r": Range(max=8),
}


class Allow(Spec):
    """Limits of a server's requests. A request outside is refused, and the reason reaches the server's record."""

    base: str = ""
    """Digest of the base model; "" = that of the site's own backbone, whichever it is."""
    min_steps: PositiveInt = 2
    """Fewest optimiser steps of a round that move the adapter. The delta of one step can be solved for the gradient, and that
    for words."""
    max_steps: PositiveInt = 1000
    """Most optimiser steps of a round."""
    min_rows_per_step: PositiveInt = 4
    """Fewest rows of an optimiser step: `train.batch_size` times `train.accumulation`, and rows that the site has."""
    max_rounds: PositiveInt = 1000
    """Most rounds of a run."""
    lora_a: Range = Range(min=0.2, max=5)
    """RMS of each received `lora_A`, relative to the one that this site draws for the same seed."""
    lora_b: Range = Range(min=1e-5)
    """RMS of each received `lora_B` that is not all zero."""
    min_movement: float = Field(0.05, ge=0)
    """Least RMS of each tensor's change, relative to the mean learning rate. AdamW moves less only if a gradient is so small
    that the change is proportional to it. The reply is then withheld."""
    extra_tensors: bool = False
    """Whether tensors in addition to the delta may leave. SCAFFOLD returns the mean gradient, from which words can be read."""
    frozen_adapter: bool = False
    """Whether the server may add an adapter that does not train; `lora_a` and `lora_b` do not limit it."""
    secure_sites: NonNegativeInt = 0
    """Fewest sites of a secure sum, this one included. Above 0, nothing leaves this site unmasked. 0 = 3 sites suffice, and
    replies in the clear are allowed."""
    secure_weights: Literal["rows", "clients"] = "rows"
    """How a site counts in secure sums: by its rows, or once. One of them: two sums over the same sites with either give away
    single updates."""
    max_epsilon: PositiveFloat | None = None
    """Largest epsilon of all requests in the site's ledger together; a request without privacy "row-dp" is then refused, and
    any request if one without it was answered before."""
    epsilon_delta: float = Field(1e-5, gt=0, lt=1)
    """Delta at which epsilon is counted; below 1 / number of rows."""
    epsilon_since: date | None = None
    """Day of which the first request counts for epsilon, for rows that are new since then; None = all requests count."""
    settings: dict[str, Range | tuple[Any, ...]] = {}  # noqa: RUF012
    """Further limits by dotted path, a range or a list of values: "train.lr" = {max = 1e-3}, "prompt.name" = ["plain"]."""
    metrics: tuple[ClientMetric, ...] = CLIENT_METRICS
    """Metrics that may leave the site."""


def state_folder(path: Path) -> Path:
    """The folder of a site's logs, keys of a start, and state of algorithms, next to its SITE.toml."""
    return path.absolute().parent / f"{path.stem}-state"


class Site(Spec):
    """One site's own file, SITE.toml."""

    name: str
    """What the federation calls this site."""
    server: str = Field(pattern=r"^[^\s/]+:[0-9]{1,5}$")
    """Address of the server: "host:port"."""
    ca: Path
    """Certificate of the authority that signed the server's."""
    key: Path
    """This site's private key."""
    data: SerializeAsAny[Dataset]
    """The site's rows, as in an experiment."""
    column: str = ""
    """For data with rows of several sites, as in a trial: only rows with `value` in `column` are used."""
    value: str = ""
    """See `column`."""
    modalities: tuple[Modality, ...] = ()
    """Modalities that this site has; empty = all that its rows have."""
    backbone: SerializeAsAny[BackboneSpec] = Tiny()
    """The base model on this machine."""
    allow: Allow = Allow()
    """What the server may ask for."""
    peers: dict[str, str] = {}  # noqa: RUF012
    """Registered keys of the sites by name, for secure aggregation: the text of each one's `site.key.pub`, which has to come
    from that site and not from the server."""
    ledger: Path | None = None
    """File of the account of all requests; by default `privacy.jsonl` in the folder of the site's state. All site files over
    the same rows name the same one."""
    threads: NonNegativeInt = 0
    """Threads of torch; 0 = torch's default."""
    task_timeout_s: PositiveFloat = 6 * 3600.0
    """Limit of one round's training, in seconds; then the trainer is restarted."""
    imports: tuple[str, ...] = ()
    """Plug-ins of this site, by module name or path. A server cannot name any."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return check_name(name)

    @classmethod
    def load(cls, path: Path) -> Site:
        """Read SITE.toml.

        Args:
            path: Of the file; `ca`, `key` and `ledger` are relative to its folder.

        Raises:
            ConfigError: With every bad key.
        """
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
            for key in ("ca", "key", "ledger"):
                if isinstance(table.get(key), str):
                    table[key] = here / table[key]
            site = cast("Site", validate(cls, table, ""))
            site.check()
        except ConfigError as error:
            raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
        return site

    def check(self) -> None:
        """Check keys against each other.

        Raises:
            ConfigError: Two keys do not fit, or a limit names no setting.
        """
        if bool(self.column) != bool(self.value):
            raise ConfigError("column, value: give both, or neither")
        if odd := sorted(set(self.modalities) - set(self.data.modalities())):
            raise ConfigError(f"modalities: got {odd}; {self.data.name} has {list(self.data.modalities())}")
        if 0 < self.allow.secure_sites < LEAST_SITES:
            raise ConfigError(
                f"allow.secure_sites: got {self.allow.secure_sites}; a sum needs {LEAST_SITES} sites: of two, each learns the "
                f"other's update; allowed: 0, or {LEAST_SITES} and more"
            )
        if self.allow.secure_sites > len({*self.peers, self.name}):
            raise ConfigError(
                f"allow.secure_sites: got {self.allow.secure_sites}; peers names {len({*self.peers} - {self.name})} other sites"
            )
        known = Request(run_id="0" * 12, site="", client=0, round=1, num_rounds=1, seed=0, base="").settings()
        for key in self.allow.settings:
            if key not in known and not key.startswith(("prompt.", "objective.", "aggregator.")):
                allowed = ", ".join(known)
                raise ConfigError(f"allow.settings: unknown setting {key!r}{nearest(key, known)}; allowed: {allowed}")

    def shard(self, client: int) -> tuple[Sequence[Example], Shard]:
        """This site's training rows.

        Args:
            client: The site's number in the federation.

        Returns:
            All rows of the data, and the shard of this site's rows with their visible modalities.

        Raises:
            DataError: The site has no row.
        """
        examples = self.data.load("train").examples
        rows = [i for i, e in enumerate(examples) if not self.column or value_of(e, self.column) == self.value]
        if not rows:
            where = f" with {self.column} = {self.value!r}" if self.column else ""
            raise DataError(f"site {self.name}: no training row{where}")
        profile: Visible = frozenset(self.modalities or self.data.modalities())
        return examples, Shard(client, tuple(rows), tuple(profile & frozenset(examples[i].fields) for i in rows))

    def largest_rank(self) -> int:
        """The largest rank of an adapter that this site allows, by the limit of "lora.r".

        Returns:
            A rank, which the server may learn; 0 = any.
        """
        allowed = {**DEFAULTS, **self.allow.settings}["lora.r"]
        if isinstance(allowed, Range):
            return int(allowed.max) if allowed.max != float("inf") else 0
        return max((value for value in allowed if isinstance(value, int)), default=0)

    def refuse(self, request: Request, num_steps: int, num_rows: int, num_moving: int | None = None) -> Reason:
        """Check a request against `allow`, as far as that needs no model.

        Args:
            request: As it came.
            num_steps: Optimiser steps of the request on this site's rows.
            num_rows: Rows of this site; with privacy.unit "group" its groups.
            num_moving: Those of the steps that move the adapter; None = all.

        Returns:
            The reason to refuse; "" = accepted.
        """
        allow, reasons, moving = self.allow, list[str](), num_steps if num_moving is None else num_moving
        if request.site != self.name:
            reasons.append(f"this is {self.name}, not {request.site}")
        if num_steps > allow.max_steps:
            said = f"more optimiser steps than allow.max_steps = {allow.max_steps}"
            reasons.append(Reason(said, f"{num_steps} steps"))
        if moving < allow.min_steps:
            said = f"fewer optimiser steps that move the adapter than allow.min_steps = {allow.min_steps}"
            reasons.append(Reason(said, f"{moving} of {num_steps} steps"))
        rows = min(request.train.batch_size * request.train.accumulation, num_rows)
        if rows < allow.min_rows_per_step:
            said = f"fewer rows per optimiser step than allow.min_rows_per_step = {allow.min_rows_per_step}"
            reasons.append(Reason(said, f"{rows} rows per step"))
        if request.num_rounds > allow.max_rounds or request.round > request.num_rounds:
            reasons.append(f"round {request.round} of {request.num_rounds}; this site allows {allow.max_rounds}")
        if allow.secure_sites and request.secure is None:
            reasons.append(f"an update in the clear; this site allows sums over {allow.secure_sites} sites only")
        if request.secure is not None:
            reasons += self.refuse_weights(request.secure)
        reasons += self._without_privacy(request, num_rows)
        asked = request.settings()
        for key, allowed in {**DEFAULTS, **allow.settings}.items():
            if key in asked and asked[key] not in allowed:
                limit = str(allowed) if isinstance(allowed, Range) else " or ".join(map(repr, allowed))
                reasons.append(f"{key} = {asked[key]!r}; this site allows {limit}")
        return self.refusal(reasons)

    def _without_privacy(self, request: Request, num_rows: int) -> list[str]:
        """Reasons why a request does not have the privacy that this site wants, whatever its budget."""
        allow, privacy, reasons = self.allow, request.privacy, []
        if not isinstance(privacy, RowDp):
            if privacy.name != "none":
                reasons.append(f"privacy {privacy.name} is not for a site")
            if allow.max_epsilon is not None:
                reasons.append('privacy is "none"; this site has a limit of epsilon and answers to row-dp alone')
            return reasons
        if privacy.simulate_noise:
            reasons.append("privacy.simulate_noise = True; a site adds noise from its own key alone")
        if privacy.unit == "group" and not self.data.group_column():
            reasons.append('privacy.unit = "group"; this site names no column of groups (data.group)')
        if not privacy.noise_multiplier and allow.max_epsilon is not None:
            reasons.append("privacy.noise_multiplier = 0; this site has a limit of epsilon")
        if allow.epsilon_delta * num_rows >= 1:
            reasons.append(
                f"this site has allow.epsilon_delta = {allow.epsilon_delta:g}, not below 1 / number of its rows"
            )
        if not isinstance(request.objective, TaskLoss | FedProx):
            reasons.append(
                f"objective {request.objective.name} depends on the rows; with row-dp this site allows task or fedprox"
            )
        return reasons

    def refuse_weights(self, terms: Terms) -> list[str]:
        """Check how a secure sum counts the sites.

        Args:
            terms: Of the sum.

        Returns:
            At most one reason to refuse.
        """
        allowed = self.allow.secure_weights
        if terms.weights == allowed:
            return []
        return [f'a sum weighted by "{terms.weights}"; this site has allow.secure_weights = "{allowed}"']

    def refuse_base(self, request: Request, base: str) -> Reason:
        """Check the base model of a request.

        Args:
            request: As it came.
            base: Digest of this site's base model.

        Returns:
            The reason to refuse; "" = accepted.
        """
        reasons = []
        if self.allow.base and self.allow.base != base:
            reasons.append(f"the base model here is {base[:12]}, but the site has pinned {self.allow.base[:12]}")
        if request.base != base:
            edition = f" (backbone.edition = {self.backbone.edition})" if isinstance(self.backbone, Tiny) else ""
            reasons.append(f"base model {request.base[:12]} is not the one here, {base[:12]}{edition}")
        return self.refusal(reasons)

    def refusal(self, reasons: list[str]) -> Reason:
        """The reasons as one line for the server; "" without any."""
        said = f"refused by site {self.name}: {'; '.join(reasons)}" if reasons else ""
        return Reason(said, "; ".join(here for reason in reasons if (here := getattr(reason, "here", ""))))
