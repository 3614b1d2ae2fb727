"""An experiment as the server of real sites runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator

from fedmllm.config.engine import FlowerSites
from fedmllm.config.experiment import Experiment, check_engine_carries, check_secure
from fedmllm.config.sites import check_sites
from fedmllm.core.errors import ConfigError
from fedmllm.core.types import Example, Modality
from fedmllm.data.base import Dataset, Rows, Split
from fedmllm.scenarios.partitions import ByColumn


class AtSites(Dataset):
    """The server's view of a federation: one training row per site, with the site's name only, and the server's test rows."""

    name: Literal["at-sites"] = "at-sites"
    sites: tuple[str, ...] = Field(min_length=1)
    """Names of the sites; their order numbers the clients."""
    own: SerializeAsAny[Dataset]
    """Data set of the server: test rows, modalities and metrics."""
    test: bool = True
    """Whether the server has test rows."""

    @field_validator("own", mode="before")
    @classmethod
    def _pick(cls, table: Any) -> Any:
        return Dataset.pick(table, "data.own")

    def load(self, split: Split) -> Rows:
        if split != "train":
            return self.own.load(split) if self.test else Rows(())
        return Rows(tuple(Example(name, {}, "", (), "", f"site {name}", {"site": name}) for name in self.sites))

    def modalities(self) -> tuple[Modality, ...]:
        return self.own.modalities()

    def picture_modalities(self) -> frozenset[Modality] | None:
        return self.own.picture_modalities()

    def metrics(self) -> Sequence[str]:
        return self.own.metrics() if self.test else ()

    def client_column(self) -> str:
        return "site"

    def folders(self) -> tuple[Path, ...]:
        return self.own.folders()


def over_sites(experiment: Experiment, sites: Sequence[str], test: bool) -> Experiment:
    """The experiment as the server runs it over real sites.

    Args:
        experiment: As loaded from TOML.
        sites: Names of the sites: clients 0, 1, ...
        test: Whether the server has test rows.

    Raises:
        ConfigError: The experiment needs a simulation, or more sites than there are.
    """
    if experiment.method != "federated":
        raise ConfigError(f"method: got {experiment.method!r}; over real sites only 'federated' is possible")
    if experiment.scenario.name != "aligned" or experiment.availability.name != "always":
        raise ConfigError("scenario, availability: real sites have their own modalities and failures; leave both out")
    if experiment.cohort_size > len(sites):
        raise ConfigError(
            f"cohort_size: got {experiment.cohort_size}; {len(sites)} sites are known: {', '.join(sites)}"
        )
    data = AtSites(sites=tuple(sites), own=experiment.data, test=test)
    engine = experiment.engine if isinstance(experiment.engine, FlowerSites) else FlowerSites()
    check_engine_carries(experiment.aggregator, engine, experiment.backbone.lora.unequal())
    if engine.secure:
        check_secure(experiment, engine.secure, experiment.cohort_size or len(sites))
    check_sites(experiment)
    changes: dict[str, Any] = {"data": data, "partition": ByColumn(column="site"), "engine": engine}
    if experiment.update_filter.on_bad_update == "by_engine":
        changes["update_filter"] = experiment.update_filter.model_copy(update={"on_bad_update": "drop_client"})
    return experiment.model_copy(update=changes)
