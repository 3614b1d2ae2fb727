"""`fedmllm explain` and `fedmllm schema`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from fedmllm.algorithms.objectives import Objective
from fedmllm.cli.settings import explained, json_schema
from fedmllm.config.experiment import FAMILIES, Experiment
from fedmllm.core.attribute_docs import attribute_docs
from fedmllm.core.errors import ConfigError
from fedmllm.core.plugins import is_shipped
from fedmllm.core.spec import Spec
from fedmllm.runs.suites.suite import Suite

ROOT = Path(__file__).parents[1]


def test_the_schema_accepts_every_cell_of_every_suite_and_refuses_a_slip():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    suites = sorted((ROOT / "experiments").rglob("*.toml"))
    assert len(suites) >= 8
    for path in suites:
        if "[matrix" in path.read_text() or "extends" in path.read_text():
            cell = Suite.load(path).cells[0]
            assert not list(validator.iter_errors(cell.experiment.dump())), path
    good = {"data": "synthetic-irony", "aggregator": {"name": "fedadam", "lr": 0.1}, "evaluate": {"visible": "image"}}
    assert validator.is_valid(good)
    for slip in (
        {"aggregator": "fedadamm"},
        {"aggregator": {"name": "fedadam", "lr": -1}},
        {"num_rounds": 0},
        {"sed": 1},
    ):
        assert not validator.is_valid({**good, **slip}), slip


def test_explain_lists_members_that_have_no_description(monkeypatch):
    class Mute(Spec):
        pass

    monkeypatch.setitem(FAMILIES["objective"].members, "mute-objective", Mute)
    assert "  mute-objective    (no description)" in explained("objective")


def test_explain_gives_defaults_ranges_and_descriptions():
    assert '  lr = 2e-05\n      "usual" or number, > 0. Learning rate of AdamW.' in explained("train")
    lines = explained("fedadam").splitlines()
    assert lines == explained("aggregator.fedadam").splitlines()
    assert lines[0] == 'aggregator = { name = "fedadam", ... }'
    assert "Delta^2" in lines[2]
    assert "Source: fedmllm/algorithms/server_optimizers.py" in lines
    assert lines[-2:] == ["  beta2 = 0.99", "      number, >= 0, < 1. Share of the second moment that stays."]
    assert "  server (left out)\n      a member of [aggregator], as a name or a table." in explained("krum")
    for family, kind in FAMILIES.items():
        assert all(name in explained(family) for name in kind.members)
        assert all(explained(f"{family}.{name}") for name in kind.members)
    with pytest.raises(ConfigError, match="did you mean 'aggregator'"):
        explained("agregator.fedadam")
    with pytest.raises(ConfigError, match="did you mean 'fedadam'"):
        explained("aggregator.fedadm")
    with pytest.raises(ConfigError, match="did you mean 'fedadam'"):
        explained("fedadm")
    with pytest.raises(ConfigError, match=r"a member of several families; allowed: privacy\.none, completion\.none"):
        explained("none")


def test_explain_describes_single_keys_tables_in_tables_and_the_top_level():
    assert explained("num_rounds") == "num_rounds = 25\n    integer, > 0. Rounds of the federation."
    assert explained("train.lr").startswith("train.lr = 2e-05\n")
    assert explained("aggregator.fedadam.lr").startswith("aggregator.fedadam.lr = 0.001\n    number, > 0. ")
    grader = explained("evaluate.grader").splitlines()
    assert grader[0] == "evaluate.grader (left out)"
    assert "evaluate.grader.url (required)" in grader
    assert "  lora.r = 8" in explained("tiny").splitlines()
    assert "  columns.series = {}" in explained("table").splitlines()
    assert all(f"\n  {key} " in explained() for key in Experiment.model_fields)
    with pytest.raises(ConfigError, match=r"train: no key 'lrr'; allowed: .*did you mean 'lr'"):
        explained("train.lrr")
    for topic in ("", "aggregator", "row-dp", "evaluate.grader.url"):
        assert all(len(line) <= 72 for line in explained(topic, 72).splitlines()), topic


def test_explain_names_the_file_of_a_plug_in():
    class Mine(Objective):
        """An objective of this file."""

        name: Literal["mine-explained"] = "mine-explained"

    assert f"Source: {Path(__file__)} (plug-in, digest " in explained("objective.mine-explained")
    del Objective.members["mine-explained"]


CONTROLS = {"one", "none", "oracle", "uniform", "always", "task"}  # no paper: they change nothing, or are a control


@pytest.mark.parametrize("family", ["aggregator", "objective", "relation", "completion", "privacy", "modality_dropout"])
def test_a_method_names_the_paper_that_it_is_from(family: str):
    for name, member in FAMILIES[family].members.items():
        if is_shipped(member.__module__) and name not in CONTROLS:
            assert re.search("arXiv:[0-9]{4}[.][0-9]{5}|OpenReview|ICML|CVPR", member.__doc__ or ""), name


def test_old_keys_are_deprecated_in_the_schema_and_named_in_the_changelog():
    properties, changes = json_schema()["properties"], (ROOT / "CHANGELOG.md").read_text()
    assert Experiment.old_keys
    for new, old in Experiment.old_keys.items():
        assert properties[old]["deprecated"] is True
        assert new in properties[old]["description"]
        assert "deprecated" not in properties[new]
        assert f"The table `[{old}]` is `[{new}]`." in changes


def test_the_schema_has_every_key_of_an_experiment():
    assert {*Experiment.model_fields} <= {*json.loads(json.dumps(json_schema()))["properties"]}


def described(kind: type[Spec]) -> Iterator[tuple[str, str]]:
    """(key, description) of a table and the tables in it."""
    for key, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Spec) and inner not in FAMILIES.values():
            yield from described(inner)
        elif key != "name":
            yield f"{kind.__name__}.{key}", attribute_docs(kind).get(key, "")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_of_every_member_is_described(family: str) -> None:
    members = [m for m in FAMILIES[family].members.values() if m.__module__.startswith("fedmllm.")]
    settings = [setting for member in [Experiment, *members] for setting in described(member)]
    assert [key for key, description in settings if len(description.split()) < 3] == []
    for member in members:
        assert member.model_fields["name"].default in explained(f"{family}.{member.model_fields['name'].default}")
