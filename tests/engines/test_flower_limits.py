"""Limits of a site on a server's requests, its refusals, and the server's view of the sites. Nothing is started here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError
from fedmllm.core.types import Shard
from fedmllm.flower.request import Request
from fedmllm.flower.server.experiment import AtSites, over_sites
from fedmllm.flower.site.config import Range, Refused, Site
from fedmllm.flower.site.trainer import Trainer

EXPERIMENT = Experiment.parse({"data": "synthetic-irony", "cohort_size": 1, "train": {"lr": 1e-3, "max_steps": 3}})


# ---- requests


def test_a_request_holds_no_path_and_reads_back_as_it_was(tmp_path):
    wording = tmp_path / "wording.txt"
    wording.write_text("{question}\n{options}")
    prompt = {"name": "file", "template": str(wording)}
    experiment = Experiment.parse({"data": "synthetic-irony", "prompt": prompt, "cohort_size": 1})
    text = Request.of(experiment, "base", "north", 2, 1).model_dump_json()
    assert str(tmp_path) not in text
    assert Request.read(text).prompt.wording == "{question}\n{options}"


def test_a_server_cannot_make_a_site_read_a_file(tmp_path):
    table = json.loads(Request.of(EXPERIMENT, "base", "north", 0, 1).model_dump_json())
    table["prompt"] = {"name": "file", "template": "/etc/passwd"}
    with pytest.raises(ConfigError, match=r"template: names a file; a server may send a wording, never a path"):
        Request.read(json.dumps(table))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"train": {"lr": -1}}', "[" * 10**5, "x" * (2**20 + 1), '{"data": {}}', '{"client": 100000}'],
)
def test_a_request_that_is_none_is_a_settings_error(text):
    with pytest.raises(ConfigError, match="request"):
        Request.read(text)


# ---- what a site allows


def site(tmp_path: Path, extra: str = "", data: str = "") -> Site:
    head = 'name = "north"\nserver = "localhost:1"\nca = "ca.crt"\nkey = "site.key"\n'
    (tmp_path / "site.toml").write_text(f"{head}[data]\nname = 'synthetic-irony'\n{data}\n{extra}")
    return Site.load(tmp_path / "site.toml")


def refused(here: Site, num_steps: int = 3, num_rows: int = 20, **changes: object) -> str:
    request = Request.of(EXPERIMENT, "base", "north", 0, 1).model_copy(update=changes)
    return here.refuse(request, num_steps, num_rows) or here.refuse_base(request, "base")


def test_a_request_within_the_limits_is_not_refused(tmp_path):
    assert refused(site(tmp_path)) == ""


@pytest.mark.parametrize(
    ("allow", "changes", "says"),
    [
        ("", {"site": "south"}, "this is north, not south"),
        ("", {"base": "other"}, "base model other is not the one here, base"),
        ('base = "pinned"', {}, "the site has pinned pinned"),
        ("max_steps = 2", {}, "more optimiser steps than allow.max_steps = 2"),
        ("max_rounds = 10", {}, "round 1 of 25; this site allows 10"),
        ("", {"round": 26}, "round 26 of 25"),
        ('settings = { "train.lr" = { max = 1e-4 } }', {}, "train.lr = 0.001; this site allows at most 0.0001"),
        ('settings = { "prompt.name" = ["agnostic"] }', {}, "prompt.name = 'plain'; this site allows 'agnostic'"),
        ("", {"lora": EXPERIMENT.backbone.lora.model_copy(update={"targets": ".*"})}, "lora.targets = '.*'"),
    ],
)
def test_a_request_outside_is_refused_with_the_reason(tmp_path, allow, changes, says):
    reason = refused(site(tmp_path, f"[allow]\n{allow}"), **changes)
    assert reason.startswith("refused by site north: ")
    assert says in reason


def test_a_site_may_open_what_is_closed(tmp_path):
    opened = site(tmp_path, '[allow.settings]\n"lora.targets" = [".*"]')
    assert refused(opened, lora=EXPERIMENT.backbone.lora.model_copy(update={"targets": ".*"})) == ""


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("[allow.settings]\n'train.rate' = [1]", "unknown setting 'train.rate'"),
        ("[allow]\nmetrics = ['names']", "allow.metrics"),
        ("[alow]", "did you mean 'allow'"),
        ("[backbone]\nname = 'tinny'", "did you mean 'tiny'"),
    ],
)
def test_a_site_file_with_a_bad_key_names_it(tmp_path, extra, says):
    with pytest.raises(ConfigError, match=r"site\.toml") as error:
        site(tmp_path, extra)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", ""),
        ("name", "-x"),
        ("name", "a\nb"),
        ("name", "x" * 101),
        ("server", "https://here:1"),
        ("server", "h"),
    ],
)
def test_a_name_or_address_that_is_none_is_named(tmp_path, key, value):
    keys = {"name": "north", "server": "localhost:1", "ca": "ca.crt", "key": "site.key", key: value}
    head = "".join(f"{k} = {json.dumps(v)}\n" for k, v in keys.items())
    (tmp_path / "site.toml").write_text(f"{head}[data]\nname = 'synthetic-irony'\n")
    with pytest.raises(ConfigError, match=rf"site\.toml: {key}: got "):
        Site.load(tmp_path / "site.toml")


def test_what_is_refused_builds_nothing_and_the_base_that_is_loaded_stays(tmp_path):
    asked = Request.of(EXPERIMENT, "base", "north", 0, 1)
    here = Trainer(site(tmp_path, '[allow.settings]\n"lora.r" = { max = 16 }'))
    here._examples, here._shard = (None,), Shard(0, (0,), (frozenset(),))
    huge = asked.model_copy(update={"lora": asked.lora.model_copy(update={"r": 10**12})})
    with pytest.raises(Refused, match=r"lora\.r = 1000000000000; this site allows at most 16"):
        here.train(huge, np.zeros(1, np.float32), "")
    assert here.num_loads == 0


def test_a_range_holds_numbers_only():
    limits = Range(min=1, max=2)
    assert 1.5 in limits
    assert all(odd not in limits for odd in (0, 3, "1.5", None))


# ---- the server's view


def test_over_sites_every_site_is_a_client_in_the_order_of_names():
    experiment = over_sites(EXPERIMENT, ("a", "b"), test=False)
    rows = experiment.data.load("train").examples
    assert [row.columns["site"] for row in rows] == ["a", "b"]
    assert experiment.partition.split(rows, 0) == [[0], [1]]
    assert experiment.data.load("test").examples == ()
    assert experiment.engine.name == "flower-sites"
    assert experiment.update_filter.on_bad_update == "drop_client"


def test_the_servers_default_survives_a_round_trip_and_a_choice_does_too():
    for update_filter, want in (({}, "drop_client"), ({"on_bad_update": "fail"}, "fail")):
        one = Experiment.parse({**EXPERIMENT.dump(), "update_filter": update_filter})
        full = Experiment.parse(json.loads(one.model_dump_json()))  # names every default
        for experiment in (one, Experiment.parse(one.dump()), full):
            assert over_sites(experiment, ("a", "b"), test=True).update_filter.on_bad_update == want


def test_the_servers_experiment_reads_back_from_its_record():
    experiment = over_sites(EXPERIMENT, ("a", "b"), test=True)
    assert isinstance(experiment.data, AtSites)
    assert Experiment.parse(json.loads(experiment.model_dump_json())) == experiment


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "local"}, "method"),
        ({"scenario": "missing"}, "scenario"),
        ({"cohort_size": 3}, "2 sites are known: a, b"),
    ],
)
def test_what_only_a_simulation_can_do_is_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        over_sites(Experiment.parse({"data": "synthetic-irony", **change}), ("a", "b"), test=True)


RANKED = {"name": "tiny", "lora": {"rank_column": "limit"}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"method": "personal"},
            'method: got "personal", whose second phase, .*allowed over real sites: "federated"',
        ),
        ({"aggregator": "fedsa-lora"}, "aggregator.name: got 'fedsa-lora', whose result is a model for each client"),
        ({"aggregator": "fedalt"}, "aggregator.name: got 'fedalt', whose result is a model for each client"),
        (
            {"aggregator": "fedilora", "backbone": RANKED},
            'rank_column: got "limit"; the server does not read .*allowed: backbone.lora.ranks',
        ),
        ({"aggregator": "flexlora"}, 'split: got "balanced" with flexlora, .*allowed over real sites: "orthonormal"'),
        ({"aggregator": {"name": "raflora", "split": "balanced"}}, 'split: got "balanced" with raflora'),
    ],
)
def test_what_real_sites_cannot_do_is_refused_when_the_experiment_is_read(change, says):
    table = {"data": "synthetic-irony", **change}
    with pytest.raises(ConfigError, match=says):
        Experiment.parse({**table, "engine": "flower-sites"})
    with pytest.raises(ConfigError, match="method" if "method" in change else says):
        over_sites(Experiment.parse(table), ("a", "b"), test=True)


@pytest.mark.parametrize("aggregator", [{"name": "raflora", "split": "orthonormal"}, "florist", "fedsvd"])
def test_an_orthonormal_split_is_accepted_over_real_sites(aggregator):
    experiment = Experiment.parse({"data": "synthetic-irony", "aggregator": aggregator, "engine": "flower-sites"})
    assert over_sites(experiment, ("a", "b"), test=True).aggregator == experiment.aggregator
