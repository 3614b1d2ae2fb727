"""`fedmllm explain` and `fedmllm schema`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmllm.cli.settings import explained, json_schema
from fedmllm.config.experiment import FAMILIES, Experiment
from fedmllm.core.errors import ConfigError
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


def test_explain_gives_defaults_ranges_and_descriptions():
    assert "  lr = 2e-05\n      one of usual or number, > 0. Learning rate of AdamW." in explained("train")
    assert "Delta^2" in explained("aggregator.fedadam")
    for family, kind in FAMILIES.items():
        assert all(name in explained(family) for name in kind.members)
        assert all(explained(f"{family}.{name}") for name in kind.members)
    with pytest.raises(ConfigError, match="did you mean 'aggregator'"):
        explained("agregator.fedadam")
    with pytest.raises(ConfigError, match="did you mean 'fedadam'"):
        explained("aggregator.fedadm")


def test_the_schema_has_every_key_of_an_experiment():
    assert {*Experiment.model_fields} <= {*json.loads(json.dumps(json_schema()))["properties"]}


def described(kind: type[Spec]) -> Iterator[tuple[str, str]]:
    """(key, description) of a table and the tables in it."""
    for key, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Spec) and inner not in FAMILIES.values():
            yield from described(inner)
        elif key != "name":
            yield f"{kind.__name__}.{key}", field.description or ""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_of_every_member_is_described(family: str) -> None:
    members = [m for m in FAMILIES[family].members.values() if m.__module__.startswith("fedmllm.")]
    settings = [setting for member in [Experiment, *members] for setting in described(member)]
    assert [key for key, description in settings if len(description.split()) < 3] == []
    for member in members:
        assert member.model_fields["name"].default in explained(f"{family}.{member.model_fields['name'].default}")
