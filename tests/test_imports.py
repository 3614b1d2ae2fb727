"""Contracts about imports: torch, and test modules that import each other."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedmllm.algorithms
import fedmllm.cli
import fedmllm.config
import fedmllm.core
import fedmllm.data
import fedmllm.scenarios

ROOT = Path(__file__).parents[1]
# Modules that settings, help texts and records need.
LIGHT = [
    "fedmllm",
    "fedmllm.runs.record",
    "fedmllm.runs.suites.suite",
    "fedmllm.reports.reading",
    *(
        module.name
        for package in (
            fedmllm.algorithms,
            fedmllm.cli,
            fedmllm.config,
            fedmllm.core,
            fedmllm.data,
            fedmllm.scenarios,
        )
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not module.name.endswith("__main__")
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


def imports_torch(code: str) -> bool:
    """True if a module imports torch anywhere, within functions too."""
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(name.split(".")[0] == "torch" for name in names):
            return True
    return False


def test_the_contract_names_the_packages_that_import_torch() -> None:
    """`lint-imports` holds the package to the contract; here the contract is held to what the package needs."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    allowed = next(c["allowed_importers"] for c in contracts if c.get("protected_modules") == ["torch"])
    paths = sorted((ROOT / "src").rglob("*.py"))
    names = {".".join(p.relative_to(ROOT / "src").with_suffix("").parts) for p in paths if imports_torch(p.read_text())}
    outside = [name for name in names if not any(f"{name}.".startswith(f"{place}.") for place in allowed)]
    assert outside == []
    assert [place for place in allowed if not any(f"{name}.".startswith(f"{place}.") for name in names)] == []
    assert imports_torch("def f():\n    from torch.nn import Module")
    assert not imports_torch("import torchvision\nfrom .torch import x")


def imported_test_modules(code: str) -> Iterator[str]:
    """Yield the test modules and conftests among the imports of a module."""
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names if node.level)]
        parts = [part for name in names for part in name.split(".")]
        yield from (part for part in parts if part.startswith("test_") or part in ("tests", "conftest"))


def test_no_test_module_imports_another() -> None:
    """Shared helpers are in tests/support, in a conftest or in fedmllm.testing."""
    modules = sorted(Path(__file__).parent.rglob("*.py"))
    assert len(modules) > 80
    assert [f"{path.name}: {name}" for path in modules for name in imported_test_modules(path.read_text())] == []
    for code in ("from test_runs import x", "import tests.conftest", "def f():\n    from . import a, test_b"):
        assert list(imported_test_modules(code))
