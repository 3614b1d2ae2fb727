"""Federated fine-tuning of multimodal LLMs when clients hold different modalities.

>>> from fedmllm import Experiment, run
>>> run(Experiment.load("x.toml"))  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmllm.config.experiment import Experiment
    from fedmllm.runs.run import run

__all__ = ["Experiment", "run"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `fedmllm --help` and the settings load no torch.
    if name == "Experiment":
        from fedmllm.config.experiment import Experiment

        return Experiment
    if name == "run":
        from fedmllm.runs.run import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
