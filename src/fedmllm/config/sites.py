"""Limits of an experiment over real sites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedmllm.core.errors import ConfigError

if TYPE_CHECKING:
    from fedmllm.config.experiment import Experiment


def check_sites(experiment: Experiment) -> None:
    """Check an experiment as far as no site has to be known.

    Args:
        experiment: That real sites are to compute.

    Raises:
        ConfigError: The sites or the server cannot do what it asks; the message names what works.
    """
    aggregator, lora = experiment.server(), experiment.backbone.lora
    if experiment.method == "personal":
        raise ConfigError(
            'method: got "personal", whose second phase, in each client alone, is not part of a request to a site; allowed '
            'over real sites: "federated"'
        )
    if not aggregator.global_model:
        raise ConfigError(
            f"aggregator.name: got {aggregator.name!r}, whose result is a model for each client; over real sites it is one "
            "global model; allowed: an aggregator with a global model"
        )
    if lora.rank_column:
        raise ConfigError(f"{lora.unequal()}; the server does not read the sites' rows; allowed: backbone.lora.ranks")
    if fault := aggregator.not_over_sites():
        raise ConfigError(f"aggregator.{fault}")
