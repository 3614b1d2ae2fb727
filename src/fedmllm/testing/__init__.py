"""Conformance checks for members of any family, and a small federation."""

from __future__ import annotations

from fedmllm.testing.completions import Leak, check_completion, leak_probe
from fedmllm.testing.conformance import (
    check_aggregator,
    check_engine,
    check_metric,
    check_objective,
    check_prompt,
    check_relation,
    check_scenario,
    check_settings,
)
from fedmllm.testing.federation import COHORT, MODALITIES, SIZES, assert_same, examples, federation, flat, perturbed

__all__ = [
    "COHORT",
    "MODALITIES",
    "SIZES",
    "Leak",
    "assert_same",
    "check_aggregator",
    "check_completion",
    "check_engine",
    "check_metric",
    "check_objective",
    "check_prompt",
    "check_relation",
    "check_scenario",
    "check_settings",
    "examples",
    "federation",
    "flat",
    "leak_probe",
    "perturbed",
]
