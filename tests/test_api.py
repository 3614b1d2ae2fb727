"""The names that `fedmllm` exports."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedmllm
import fedmllm.testing
from fedmllm import Experiment

ROOT = Path(__file__).parents[1]
CLASSES = [name for name in fedmllm.__all__ if inspect.isclass(getattr(fedmllm, name))]


def test_every_exported_name_is_listed_importable_and_known_to_type_checkers():
    assert {*fedmllm.__all__} <= {*dir(fedmllm)}
    assert fedmllm.__all__ == sorted(fedmllm.__all__)
    assert {*fedmllm.__all__} == {*fedmllm._PLACES, "__version__"}
    tree = ast.parse((ROOT / "src/fedmllm/__init__.py").read_text())
    typing_only = next(node for node in tree.body if isinstance(node, ast.If))
    places = {}
    for node in typing_only.body:
        if isinstance(node, ast.ImportFrom):
            places |= {a.asname or a.name: f"{node.module}:{a.name}" if a.asname else node.module for a in node.names}
    assert places == fedmllm._PLACES
    with pytest.raises(AttributeError, match="no attribute 'Experiments'"):
        _ = fedmllm.Experiments


def test_importing_the_settings_changes_nothing_in_the_process_and_loads_no_torch():
    code = """
import sys, warnings, logging, signal, os
import numpy  # its import adds filters of warnings
before = dict(os.environ), list(sys.path), signal.getsignal(signal.SIGTERM), list(warnings.filters), sys.excepthook
import fedmllm
from fedmllm import Experiment, Suite, Aggregator, BackboneSpec, load_run
Experiment(data="synthetic-irony")
after = dict(os.environ), list(sys.path), signal.getsignal(signal.SIGTERM), list(warnings.filters), sys.excepthook
assert before == after
assert "kernels" not in sys.modules
assert not {"torch", "transformers", "peft", "flwr", "ray"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_keywords_mean_what_the_keys_of_a_file_mean(tmp_path: Path):
    text = 'data = "synthetic-irony"\nscenario = "missing"\naggregator = { name = "fedadam", lr = 1e-2 }\n'
    (tmp_path / "x.toml").write_text(text)
    made = Experiment(data="synthetic-irony", scenario="missing", aggregator={"name": "fedadam", "lr": 1e-2})
    assert made == Experiment.load(tmp_path / "x.toml")
    assert made.dump() == {
        "data": {"name": "synthetic-irony"},
        "scenario": {"name": "missing"},
        "aggregator": {"name": "fedadam", "lr": 0.01},
    }
    with pytest.raises(fedmllm.ConfigError) as caught:
        Experiment(data="synthetic-irony", scenario="mising", num_rounds=0, train={"lr": "x"})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("scenario.name: got 'mising'; allowed: ")
    assert {line.split(":")[0] for line in lines} == {"scenario.name", "num_rounds", "train.lr"}


def test_the_api_page_has_every_exported_name():
    page = (ROOT / "docs/api.md").read_text()
    described = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    assert len(described) == len({*described})
    modules = [place for place in described if (ROOT / "src" / f"{place.replace('.', '/')}.py").is_file()]
    for package in (fedmllm, fedmllm.testing):
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                place = f"{thing.__module__}.{thing.__qualname__}"
                assert place in described or thing.__module__ in modules, place
            else:
                assert re.search(rf"\b{name}\b", page), name
    for place in described:
        module, _, name = place.rpartition(".")
        assert place in modules or hasattr(importlib.import_module(module), name), place


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_class_has_a_docstring(name: str):
    assert vars(getattr(fedmllm, name)).get("__doc__")


def test_functions_take_one_path_as_text(tmp_path: Path):
    experiment = Experiment(
        data={"name": "synthetic-irony", "num_train": 12, "num_test": 8},
        method="majority",
        partition={"name": "iid", "num_clients": 2},
    )
    for name in ("a", "b"):
        fedmllm.run(experiment, out=tmp_path / name)
    assert fedmllm.compare(str(tmp_path / "a"), str(tmp_path / "b")).num_pairs == 1
    assert fedmllm.report(str(tmp_path / "a"), str(tmp_path / "x.csv"))
    (tmp_path / "my_plugin_of_one_file.py").write_text("")
    assert fedmllm.load_plugins(str(tmp_path / "my_plugin_of_one_file.py")) == (
        str(tmp_path / "my_plugin_of_one_file.py"),
    )
    with pytest.raises(
        fedmllm.ConfigError, match=r"experiment: got 'mine.toml'; allowed: an Experiment, as Experiment.load"
    ):
        fedmllm.run("mine.toml")
