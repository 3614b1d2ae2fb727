"""Modules that settings, help texts and records need are imported without torch."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

import fedmllm.algorithms
import fedmllm.core
import fedmllm.data
import fedmllm.scenarios

LIGHT = [
    "fedmllm",
    "fedmllm.cli.main",
    "fedmllm.cli.display",
    "fedmllm.config.experiment",
    "fedmllm.runs.record",
    "fedmllm.runs.suites.suite",
    "fedmllm.reports.reading",
    *(
        module.name
        for package in (fedmllm.core, fedmllm.data, fedmllm.scenarios, fedmllm.algorithms)
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    ),
]
CODE = """
import importlib, json, sys
loaded = []
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    if "torch" in sys.modules or "transformers" in sys.modules:
        loaded.append(name)
        for module in [m for m in sys.modules if m.split(".")[0] in ("torch", "transformers")]:
            del sys.modules[module]
print(json.dumps(loaded))
"""


def modules_that_load_torch(names: list[str]) -> list[str]:
    done = subprocess.run([sys.executable, "-c", CODE, json.dumps(names)], capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def test_light_modules_load_no_model_library() -> None:
    assert modules_that_load_torch(LIGHT) == []


@pytest.mark.parametrize("name", ["fedmllm.federation.client"])
def test_the_check_finds_a_module_that_does(name: str) -> None:
    assert modules_that_load_torch([name]) == [name]
