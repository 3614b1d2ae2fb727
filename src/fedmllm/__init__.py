"""Federated fine-tuning of multimodal LLMs when clients hold different modalities.

>>> from fedmllm import Experiment, run
>>> result = run(Experiment(data="synthetic-irony", scenario="missing"))  # doctest: +SKIP
>>> result.value("auc")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmllm.algorithms.base import Aggregator
    from fedmllm.algorithms.objectives import Objective
    from fedmllm.backbones.base import Backbone, BackboneSpec
    from fedmllm.config.engine import Engine
    from fedmllm.config.experiment import Experiment
    from fedmllm.core.errors import ConfigError, DataError, FedmllmError
    from fedmllm.core.metrics import metric
    from fedmllm.core.plugins import load_plugins
    from fedmllm.data.base import Dataset
    from fedmllm.data.prompts import Prompt
    from fedmllm.reports.compare import compare
    from fedmllm.reports.write import write_report as report
    from fedmllm.runs.predict import predict
    from fedmllm.runs.result import RunResult, load_run
    from fedmllm.runs.run import run
    from fedmllm.runs.suites.scheduler import run_suite
    from fedmllm.runs.suites.suite import Suite
    from fedmllm.scenarios.availability import Availability
    from fedmllm.scenarios.masks import Scenario
    from fedmllm.scenarios.modalities.completion import Completion
    from fedmllm.scenarios.partitions import Partition

    __version__: str

# Public name -> module, and its name there if that differs. Resolved when first used: settings and `--help` need no torch.
_PLACES = {
    "Aggregator": "fedmllm.algorithms.base",
    "Availability": "fedmllm.scenarios.availability",
    "Backbone": "fedmllm.backbones.base",
    "BackboneSpec": "fedmllm.backbones.base",
    "Completion": "fedmllm.scenarios.modalities.completion",
    "ConfigError": "fedmllm.core.errors",
    "DataError": "fedmllm.core.errors",
    "Dataset": "fedmllm.data.base",
    "Engine": "fedmllm.config.engine",
    "Experiment": "fedmllm.config.experiment",
    "FedmllmError": "fedmllm.core.errors",
    "Objective": "fedmllm.algorithms.objectives",
    "Partition": "fedmllm.scenarios.partitions",
    "Prompt": "fedmllm.data.prompts",
    "RunResult": "fedmllm.runs.result",
    "Scenario": "fedmllm.scenarios.masks",
    "Suite": "fedmllm.runs.suites.suite",
    "compare": "fedmllm.reports.compare",
    "load_plugins": "fedmllm.core.plugins",
    "load_run": "fedmllm.runs.result",
    "metric": "fedmllm.core.metrics",
    "predict": "fedmllm.runs.predict",
    "report": "fedmllm.reports.write:write_report",
    "run": "fedmllm.runs.run",
    "run_suite": "fedmllm.runs.suites.scheduler",
}

__all__ = [
    "Aggregator",
    "Availability",
    "Backbone",
    "BackboneSpec",
    "Completion",
    "ConfigError",
    "DataError",
    "Dataset",
    "Engine",
    "Experiment",
    "FedmllmError",
    "Objective",
    "Partition",
    "Prompt",
    "RunResult",
    "Scenario",
    "Suite",
    "__version__",
    "compare",
    "load_plugins",
    "load_run",
    "metric",
    "predict",
    "report",
    "run",
    "run_suite",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fedmllm")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = _PLACES[name].partition(":")
    value = globals()[name] = getattr(import_module(module), attribute or name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
