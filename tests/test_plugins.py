"""Plug-ins: members and metrics of files outside the package, in settings, run ids and error messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedmllm.algorithms.base import Aggregator
from fedmllm.config.experiment import Experiment
from fedmllm.core import plugins
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
