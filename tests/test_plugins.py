"""Plug-ins: members and metrics of files outside the package, in settings, run ids and error messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from fedmllm.algorithms.base import Aggregator
from fedmllm.cli.main import app
from fedmllm.config.experiment import Experiment
from fedmllm.core import plugins
from fedmllm.core.code_digest import helper_files
from fedmllm.core.errors import ConfigError
from fedmllm.core.metrics import METRICS, PLUGIN_METRICS
from fedmllm.core.spec import Named
from fedmllm.runs.suites.suite import Suite

HALF = '''
from typing import Literal
from fedmllm.algorithms.server_optimizers import FedAvg

class {cls}(FedAvg):
    """{doc}"""
    name: Literal["{name}"] = "{name}"
'''
METRIC = """
from fedmllm.core.metrics import metric

@metric
def {name}(predictions):
    return 0.25
"""
ENGINE = """
from typing import Literal
from fedmllm.config.engine import Engine

class Mine(Engine):
    name: Literal["{name}"] = "{name}"
    import_path = f"{{__name__}}:Missing"
"""
DATA = {"data": "synthetic-irony"}


@pytest.fixture(autouse=True)
def _members_as_before():
    """Remove the members that a test has added, and its modules."""
    families = [(family, dict(family.members)) for family in Named.__subclasses__()]
    tables = [(table, dict(table)) for table in (METRICS, PLUGIN_METRICS)]
    path, modules = list(sys.path), set(sys.modules)
    yield
    for family, members in families:
        family.members = members
    for table, before in tables:
        table.clear()
        table.update(before)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    plugins.source_of.cache_clear()


def write(path: Path, text: str, **words: str) -> Path:
    path.write_text(text.format(**words))
    return path


def test_a_file_named_in_toml_adds_an_aggregator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "half.py", HALF, cls="Half", name="half", doc="")
    (tmp_path / "x.toml").write_text('imports = "half.py"\naggregator = "half"\ndata = "synthetic-irony"\n')
    monkeypatch.chdir("/")  # the path counts from the file that names it
    loaded = Experiment.load(tmp_path / "x.toml")
    assert loaded.method_name() == "half"
    assert loaded.imports == (str(tmp_path / "half.py"),)
    assert Experiment.parse(loaded.model_dump(mode="json")) == loaded
    assert Experiment.parse(loaded.dump()) == loaded
    digest = plugins.file_digest(tmp_path / "half.py")
    assert [(p.module, p.digest) for p in loaded.plugins()] == [("half", digest)]
    assert loaded.identity()["aggregator"] == {"name": "half", "lr": 1.0, "plugin": {"half": digest}}
    assert "imports" not in loaded.identity()


STATED = (
    HALF
    + """
    of_the_mean: ClassVar[bool] = True
    weighted_by: ClassVar[str] = "rows"
"""
)
PRIVATE = {
    "privacy": {"name": "client-dp", "noise_multiplier": 1.0, "clip": 0.5},
    "update_filter": {"on_bad_update": "drop_client"},
}
SECURE = {"engine": {"name": "flower-sites", "secure": {}}, "cohort_size": 3}


@pytest.mark.parametrize(("table", "flag"), [(PRIVATE, "of_the_mean"), (SECURE, "weighted_by")])
def test_privacy_trusts_a_plug_in_only_if_it_states_what_its_base_promises(tmp_path: Path, table, flag):
    write(tmp_path / "half.py", HALF, cls="Half", name="half", doc="")
    settings = {**DATA, **table, "imports": str(tmp_path / "half.py"), "aggregator": "half"}
    with pytest.raises(ConfigError, match=f"A plug-in does not inherit {flag}: Half has to state it if it holds"):
        Experiment.parse(settings)
    stated = STATED.replace("import Literal", "import ClassVar, Literal")
    write(tmp_path / "half.py", stated, cls="Half", name="half", doc="")
    assert getattr(Experiment.parse(settings).aggregator, flag)


def test_another_version_of_a_file_gives_another_run_id(tmp_path: Path):
    settings = {**DATA, "imports": str(tmp_path / "half.py"), "aggregator": "half"}
    ids = []
    for doc in ("one", "two", "one"):
        write(tmp_path / "half.py", HALF, cls="Half", name="half", doc=doc)
        ids.append(Experiment.parse(settings).run_id())  # loaded again, since it has changed
    assert ids[0] == ids[2] != ids[1]


def test_the_place_of_a_file_does_not_change_the_run_id(tmp_path: Path):
    ids = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        place = write(tmp_path / folder / "half.py", HALF, cls="Half", name="half", doc="")
        Aggregator.members.pop("half", None)
        ids.append(Experiment.parse({**DATA, "imports": [str(place)], "aggregator": "half"}).run_id())
    assert ids[0] == ids[1]


def test_an_engine_that_is_not_shipped_is_part_of_run_id_and_method_name(tmp_path: Path):
    imports = {"imports": [str(write(tmp_path / "engines.py", ENGINE, name="mine"))]}
    fedavg, mine = (Experiment.parse({**DATA, **imports, "engine": engine}) for engine in ("in-process", "mine"))
    assert fedavg.run_id() == Experiment.parse(DATA).run_id()
    assert mine.run_id() != fedavg.run_id()
    assert (fedavg.method_name(), mine.method_name()) == ("fedavg", "fedavg+mine")
    prox = Experiment.parse({**DATA, **imports, "engine": "mine", "objective": "fedprox"})
    assert prox.method_name() == "fedavg+fedprox+mine"


def test_a_metric_of_a_file_is_computed_and_part_of_the_run_id(tmp_path: Path):
    settings = {**DATA, "imports": [str(write(tmp_path / "mine.py", METRIC, name="quarter"))]}
    plain = Experiment.parse(settings)
    with_metric = Experiment.parse({**settings, "evaluate": {"metrics": "quarter"}})
    assert with_metric.metrics() == ("auc", "auc_hard", "accuracy", "quarter")
    assert plain.run_id() == Experiment.parse(DATA).run_id() != with_metric.run_id()
    assert with_metric.identity()["evaluate"]["plugin"] == {"mine": plugins.file_digest(tmp_path / "mine.py")}
    with pytest.raises(ConfigError, match=r"evaluate.metrics: got .*; no metric 'quartet'; .*did you mean 'quarter'"):
        Experiment.parse({**settings, "evaluate": {"metrics": ["quartet"]}})


def test_a_suite_loads_plugins_of_its_own_file_and_of_those_it_extends(tmp_path: Path):
    for name in ("one", "two"):
        write(tmp_path / f"{name}.py", HALF, cls=name.title(), name=name, doc="")
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.toml").write_text(
        'imports = ["one.py"]\n[base]\ndata = "synthetic-irony"\n[matrix]\nseeds = [0]\n'
    )
    (tmp_path / "sub/suite.toml").write_text(
        'extends = "../base.toml"\nimports = ["../two.py"]\n'
        '[matrix.methods]\n1 = { aggregator = "one" }\n2 = { aggregator = "two" }\n'
    )
    cells = Suite.load(tmp_path / "sub/suite.toml").cells
    assert [cell.experiment.aggregator.name for cell in cells] == ["one", "two"]
    assert all(cell.experiment.imports == (str(tmp_path / "one.py"), str(tmp_path / "two.py")) for cell in cells)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_here\n", r"bad.py: cannot be imported: .*bad.py:1: ModuleNotFoundError: .*nothing_here"),
        ("x = 1\ny = (\n", r"bad.py:2: SyntaxError: '\(' was never closed"),
        ("1 / 0\n", r"bad.py:1: ZeroDivisionError: division by zero"),
        (HALF.format(cls="FedAvg2", name="fedavg", doc=""), r"aggregator 'fedavg' is defined twice: FedAvg in fedmllm"),
        (METRIC.format(name="auc"), r"metric 'auc' is defined twice: in fedmllm.core.metrics and in "),
    ],
)
def test_an_error_names_the_file_and_the_problem(tmp_path: Path, text: str, message: str):
    (tmp_path / "bad.py").write_text(text)
    (tmp_path / "x.toml").write_text('imports = ["bad.py"]\ndata = "synthetic-irony"\n')
    with pytest.raises(ConfigError, match=message) as caught:
        Experiment.load(tmp_path / "x.toml")
    assert str(caught.value).startswith(f"{tmp_path / 'x.toml'}: imports: {tmp_path / 'bad.py'}")
    assert not any(name.startswith(plugins.PREFIX + "bad") for name in sys.modules)


def test_what_is_not_a_plugin_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"imports: 'none.py': no file /.*none.py"):
        Experiment.parse({**DATA, "imports": ["none.py"]})
    with pytest.raises(ConfigError, match="imports: 'no_such_module': no module 'no_such_module'"):
        Experiment.parse({**DATA, "imports": ["no_such_module"]})
    with pytest.raises(ConfigError, match=r"imports: got 3; give a list of module names"):
        Experiment.parse({**DATA, "imports": 3})


def test_an_installed_distribution_names_its_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "from_distribution.py", HALF, cls="Installed", name="installed", doc="")
    folder = tmp_path / "more_aggregators-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: more-aggregators\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[fedmllm.plugins]\nmore = from_distribution\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.load_entry_points()
    assert Experiment.parse({**DATA, "aggregator": "installed"}).imports == ("from_distribution",)
    (tmp_path / "broken_one.py").write_text("raise RuntimeError('too old')\n")
    (folder / "entry_points.txt").write_text("[fedmllm.plugins]\nmore = broken_one\n")
    with pytest.raises(ConfigError, match=r"plug-in 'more' of the installed distribution 'more-aggregators'.*too old"):
        plugins.load_entry_points()


def test_a_class_without_a_file_is_identified_by_its_code():
    ids = []
    for factor in ("2", "3", "2"):
        Aggregator.members.pop("cell", None)
        code = (
            HALF.format(cls="Cell", name="cell", doc="") + f"    def apply(self, p, s, u):\n        return {factor}\n"
        )
        sys.modules["notebook_cells"] = module = ModuleType("notebook_cells")
        exec(compile(code, "<cell>", "exec"), vars(module))
        ids.append(Experiment(data="synthetic-irony", aggregator="cell").run_id())
    assert ids[0] == ids[2] != ids[1]


CELL = """
from fedmllm.algorithms.server_optimizers import FedAvg
from typing import ClassVar, Literal
{cells}
def factor():
    return {factor}

class Cell(FedAvg):
    name: Literal["cell"] = "cell"
    words: ClassVar[frozenset] = frozenset({words})
    def apply(self, params, state, updates, scale={scale}, *, more={more}):
        return factor() if scale in {{"alpha", "beta", "gamma"}} else super().apply(params, state, updates)
"""
PRINT_DIGEST = """
import sys
from types import ModuleType
sys.modules["cells"] = module = ModuleType("cells")
exec(compile(sys.argv[1], "<cell>", "exec"), vars(module))
print(module.Cell.plugin.digest)
"""
CELLS = {"cells": "", "factor": "2", "words": "{'one', 'two', 'three', 'four'}", "scale": "1", "more": "None"}


def test_the_digest_of_a_class_without_a_file_is_equal_in_every_process():
    digests = []
    for seed in ("1", "2", "3"):
        command = [sys.executable, "-c", PRINT_DIGEST, CELL.format(**CELLS)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": seed}
        )
        digests.append(done.stdout)
    assert len(digests[0].strip()) == 16
    assert len(set(digests)) == 1


def cell_digest(**changes: str) -> str:
    Aggregator.members.pop("cell", None)
    sys.modules["cells"] = module = ModuleType("cells")
    exec(compile(CELL.format(**CELLS | changes), "<cell>", "exec"), vars(module))
    return module.Cell.plugin.digest


@pytest.mark.parametrize(
    "change",
    [
        {"words": "{'one', 'two', 'three', 'five'}"},  # a ClassVar
        {"scale": "2"},  # the default of an argument
        {"more": "0"},  # that of a keyword-only argument
        {"factor": "3"},  # the code of a function that a method calls
        {"factor": "LIMIT", "cells": "LIMIT = 4"},  # and the value of a variable that it reads
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_of_a_class_without_a_file_changes_with_what_it_computes(change: dict[str, str]):
    assert cell_digest(**change) != cell_digest() == cell_digest()
    assert cell_digest(factor="LIMIT", cells="LIMIT = 4") != cell_digest(factor="LIMIT", cells="LIMIT = 5")


HELPED = "from helper_of_half import rate\n" + HALF


def test_a_helper_module_next_to_a_plugin_is_part_of_its_digest(tmp_path: Path):
    write(tmp_path / "half.py", HELPED, cls="Half", name="half", doc="")
    (tmp_path / "not_imported.py").write_text("x = 1\n")
    settings = {**DATA, "imports": str(tmp_path / "half.py"), "aggregator": "half"}
    found = []
    for rate in ("1", "2", "1"):
        (tmp_path / "helper_of_half.py").write_text(f"import helper_of_helper\nrate = {rate}\n")
        (tmp_path / "helper_of_helper.py").write_text("import json\n")
        experiment = Experiment.parse(settings)
        module = sys.modules[type(experiment.aggregator).__module__]
        found.append((experiment.run_id(), module.rate))  # the changed helper is executed again
    assert found[0] == found[2] != found[1]
    assert [found[0][1], found[1][1]] == [1, 2]
    (stated,) = [plugin.record() for plugin in experiment.plugins()]
    assert [Path(name).name for name in stated["helpers"]] == ["helper_of_half.py", "helper_of_helper.py"]
    (tmp_path / "helper_of_helper.py").write_text("import base64\n")
    assert Experiment.parse(settings).run_id() != found[0][0]


def test_helper_modules_of_a_package_are_those_of_the_package(tmp_path: Path):
    package = tmp_path / "site-packages/mine"
    (package / "sub").mkdir(parents=True)
    texts = {
        "__init__.py": "",
        "plugin.py": "import torch, other, mine.late\nfrom . import near\nfrom .sub.deep import x\nimport mine\n",
        "near.py": "def f():\n    from .sub import inside\n",
        "late.py": "import json\n",
        "unused.py": "",
        "json.py": "",
        "sub/__init__.py": "",
        "sub/deep.py": "from ..plugin import y\n",
        "sub/inside.py": "",
    }
    for name, text in texts.items():
        (package / name).write_text(text)
    (tmp_path / "site-packages/other.py").write_text("")  # installed next to the package
    found = {str(path.relative_to(package)) for path in helper_files(package / "plugin.py")}
    assert found == texts.keys() - {"plugin.py", "unused.py", "json.py"}
    (tmp_path / "site-packages/single.py").write_text("import other\n")
    assert helper_files(tmp_path / "site-packages/single.py") == ()


def test_two_files_that_import_each_other_are_loaded_once(tmp_path: Path):
    write(tmp_path / "first_one.py", "import second_one\n" + HALF, cls="First", name="first", doc="")
    write(tmp_path / "second_one.py", "import first_one\n" + HALF, cls="Second", name="second", doc="")
    for imports in (["first_one.py", "second_one.py"], ["second_one.py", "first_one.py"], ["second_one.py"]):
        paths = [str(tmp_path / name) for name in imports]
        first = Experiment.parse({**DATA, "imports": paths, "aggregator": "first"})
        assert sys.modules["first_one"].First is type(first.aggregator) is Aggregator.members["first"]
        assert Experiment.parse({**DATA, "imports": paths, "aggregator": "first"}).run_id() == first.run_id()
        for name in [name for name in sys.modules if "first_one" in name or "second_one" in name]:
            del sys.modules[name]


def test_a_member_of_a_helper_module_is_loaded_by_its_path_in_another_process(tmp_path: Path):
    write(tmp_path / "inner_one.py", HALF, cls="Inner", name="inner", doc="")
    (tmp_path / "outer_one.py").write_text("import inner_one\n")
    plugins.load_plugins(str(tmp_path / "outer_one.py"))
    assert Experiment.parse({**DATA, "aggregator": "inner"}).imports == (str(tmp_path / "inner_one.py"),)


def test_every_verb_loads_plugins(tmp_path: Path):
    import click
    from typer.main import get_command

    from fedmllm.cli.main import app

    def leaves(group: click.Group) -> list[click.Command]:
        subs = [leaves(c) if isinstance(c, click.Group) else [c] for c in group.commands.values()]
        return [command for commands in subs for command in commands]

    verbs = leaves(get_command(app))  # type: ignore[arg-type]
    assert len(verbs) >= 10
    assert all(any("--import" in option.opts for option in verb.params) for verb in verbs)
    write(tmp_path / "half.py", HALF, cls="Half", name="half", doc="")
    (tmp_path / "x.toml").write_text('aggregator = "half"\ndata = "synthetic-irony"\n')
    command = [sys.executable, "-m", "fedmllm.cli", "data", "show", str(tmp_path / "x.toml")]
    assert b"allowed: fed-plora" in subprocess.run(command, capture_output=True, check=False).stderr
    done = subprocess.run([*command, "--import", "half.py"], capture_output=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", ["run", "suite", "predict", "estimate"])
def test_an_unknown_member_names_the_ways_to_load_one(tmp_path: Path, verb: str):
    table = 'data = "synthetic-irony"\naggregator = "my-own"\n'
    path = write(tmp_path / "mine.toml", f"[base]\n{table}[matrix]\nseeds = [0]\n" if verb == "suite" else table)
    if verb == "predict":  # the run of a plug-in that was not loaded
        settings = {**Experiment(data="synthetic-irony").dump(), "aggregator": {"name": "my-own"}}
        path = tmp_path / "run"
        path.mkdir()
        head = {"event": "experiment", "run_id": "0" * 12, "settings": settings}
        (path / "record.jsonl").write_text(json.dumps(head) + "\n")
        (path / "summary.json").write_text(json.dumps({"rows": []}))
    words = [verb, str(path), *(["x.csv", "--out", str(tmp_path / "o.csv")] if verb == "predict" else [])]
    done = CliRunner().invoke(app, words)
    said = f"{done.output} {done.exception}"
    assert "'my-own'" in said
    assert "allowed: " in said
    assert "--import FILE.py" in said
    assert "an entry point of the group fedmllm.plugins" in said
