"""Settings: every bad key is named with its place, its value and what is allowed, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmllm import Experiment
from fedmllm.core.errors import ConfigError

GOOD = {"data": "synthetic-irony"}


def test_defaults_are_the_published_protocol() -> None:
    e = Experiment.parse(GOOD)
    assert (e.cohort_size, e.train.batch_size, e.train.accumulation, e.train.epochs) == (2, 1, 4, 1)
    assert (e.train.beta2, e.train.weight_decay, e.train.lr) == (0.95, 0.1, 2e-5)
    assert (e.backbone.lora.r, e.backbone.lora.alpha, e.backbone.lora.dropout) == (8, 8.0, 0.05)
    fedadam = Experiment.parse({**GOOD, "aggregator": "fedadam"}).aggregator
    assert fedadam.model_dump() == {"name": "fedadam", "lr": 1e-3, "tau": 1e-3, "beta1": 0.9, "beta2": 0.99}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"data: missing; it is required"),
        ({"data": "synthetic-irony", "num_round": 3}, r"num_round: unknown key; allowed: .*did you mean 'num_rounds'"),
        ({"data": "hatful"}, r"data.name: got 'hatful'; allowed: .*hateful-memes"),
        ({**GOOD, "aggregator": "fedadgrad"}, r"aggregator.name: got 'fedadgrad'; .*did you mean 'fedadagrad'"),
        ({**GOOD, "aggregator": {"lr": 1}}, r"aggregator: got \{'lr': 1\}; give a name"),
        ({**GOOD, "aggregator": {"name": "fedadam", "beta": 0.9}}, r"aggregator.beta: unknown key; .*beta1"),
        ({**GOOD, "aggregator": {"name": "fedadam", "beta1": 1.0}}, r"aggregator.beta1: got 1.0; .*less than 1"),
        ({**GOOD, "scenario": {"name": "missing", "rate": 1.5}}, r"scenario.rate: got 1.5"),
        ({**GOOD, "train": {"lr": 0}}, r"train.lr: got 0; .*greater than 0"),
        ({**GOOD, "train": {"lr": float("nan")}}, r"train.lr: got nan"),
        ({**GOOD, "backbone": {"name": "tiny", "lora": {"r": 0}}}, r"backbone.lora.r: got 0"),
        ({**GOOD, "objective": {"name": "fedprox-adaptive", "mu_min": 1, "mu_max": 0}}, r"objective.*mu_min = 1"),
        ({**GOOD, "method": "centralized"}, r"method: got 'centralized'.*centralised"),
        ({**GOOD, "seed": -1}, r"seed: got -1"),
        ({**GOOD, "num_rounds": "ten"}, r"num_rounds: got 'ten'"),
        ({**GOOD, "num_rounds": "10"}, r"num_rounds: got '10'; it should be a number, without quotes"),
        ({**GOOD, "num_rounds": True}, r"num_rounds: got True; it should be a number"),
        ({**GOOD, "train": {"lr": "1e-3"}}, r"train.lr: got '1e-3'; it should be a number"),
        ({**GOOD, "aggregator": "krum"}, r"cohort_size: got 2; krum needs 5 updates a round"),
        ({**GOOD, "cohort_size": 11}, r"cohort_size: got 11; at most partition.num_clients = 10"),
        ({**GOOD, "scenario": {"name": "cross", "num_image_clients": 11}}, r"num_image_clients: got 11; .* 10 clients"),
        ({**GOOD, "scenario": {"name": "missing", "rates": {"sound": 0.5}}}, r"scenario.rates.sound: unknown modality"),
        ({**GOOD, "evaluate": {"visible": "sound"}}, r"evaluate.visible: got 'sound'; allowed: all, none, image, text"),
    ],
)
def test_bad_settings_are_named(table: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Experiment.parse(table, "x.toml")


def test_all_faults_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Experiment.parse({"data": "synthetic-irony", "aggregator": "x", "scenario": "y", "num_rounds": 0}, "x.toml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("x.toml: ") for line in lines)


def test_overrides_are_toml(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(b'\xef\xbb\xbfdata = "synthetic-irony"\naggregator = "fedadam"\n')  # a BOM does no harm
    e = Experiment.load(file, ["aggregator.lr=1e-2", "scenario.name=missing", "scenario.rate=0.4", "seed=3"])
    assert e.aggregator.model_dump()["lr"] == 0.01
    assert e.scenario.model_dump()["rate"] == 0.4
    assert e.seed == 3
    # another member of a family does not inherit the keys of the old one
    assert Experiment.load(file, ["aggregator.beta1=0.5", "aggregator.name=fedavg"]).aggregator.name == "fedavg"
    for bad in ("seed", "=3", "a..b=3"):
        with pytest.raises(ConfigError, match="--set"):
            Experiment.load(file, [bad])


def test_files_that_are_no_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        Experiment.load(tmp_path / "none.toml")
    for content in (b"a = = 1", b"\xff\xfe\x00", b"a = 1\na = 2"):
        (tmp_path / "x.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"x\.toml: not a TOML file"):
            Experiment.load(tmp_path / "x.toml")


def test_a_suite_is_not_an_experiment(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[matrix]\nseeds = [0]")
    with pytest.raises(ConfigError, match=r"`fedmllm suite .*x\.toml` runs it"):
        Experiment.load(tmp_path / "x.toml")


def test_run_id_depends_on_results_alone() -> None:
    e = Experiment.parse(GOOD)
    assert e.run_id() == Experiment.parse(GOOD).run_id()
    assert e.run_id() == Experiment.parse({**GOOD, "evaluate": {"batch_size": 3}}).run_id()
    assert e.run_id() == Experiment.parse({**GOOD, "backbone": {"name": "tiny", "keep_image_features_mb": 9}}).run_id()
    assert e.run_id() != Experiment.parse({**GOOD, "seed": 1}).run_id()
    assert e.run_id() != Experiment.parse({**GOOD, "aggregator": {"name": "fedavg", "lr": 0.5}}).run_id()


def test_settings_survive_the_record() -> None:
    e = Experiment.parse({**GOOD, "aggregator": {"name": "fedyogi", "tau": 0.1}, "scenario": {"name": "missing"}})
    assert Experiment.parse(e.model_dump(mode="json")) == e


def test_rows_that_name_their_clients_are_the_real_federation(tmp_path: Path) -> None:
    data = {"name": "table", "root": str(tmp_path), "train": "rows.csv", "columns": {"image": "scan"}}
    assert Experiment.parse({"data": data}).partition.name == "dirichlet"
    named = {**data, "columns": {"image": "scan", "client": "site"}}
    assert Experiment.parse({"data": named}).partition.name == "by-column"
    assert Experiment.parse({"data": named, "partition": "iid"}).partition.name == "iid"


def test_metrics_that_a_user_names_must_exist(tmp_path: Path) -> None:
    data = {
        "name": "table",
        "root": str(tmp_path),
        "train": "a.csv",
        "columns": {"text": "t"},
        "judged_by": ["acuracy"],
    }
    with pytest.raises(ConfigError, match=r"no metric 'acuracy'; allowed: .*accuracy"):
        Experiment.parse({"data": data})


def test_nested_tables_name_their_own_keys() -> None:
    for table, message in (
        ({"train": {"lrr": 1}}, r"train.lrr: unknown key; allowed: accumulation, .*did you mean 'lr'"),
        (
            {"backbone": {"name": "tiny", "lora": {"rr": 1}}},
            r"backbone.lora.rr: unknown key; allowed: alpha, dropout, init, modality_gate, r, rank_column, ranks",
        ),
        ({"evaluate": {"visible": []}}, r"evaluate.visible: got \[\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            Experiment.parse({**GOOD, **table})


def test_an_override_may_be_of_a_family_that_the_file_does_not_name(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('data = "synthetic-irony"')
    e = Experiment.load(tmp_path / "x.toml", ["aggregator.lr=0.5", "backbone.lora.r=4"])
    assert e.aggregator.model_dump() == {"name": "fedavg", "lr": 0.5}
    assert e.backbone.lora.r == 4


def test_the_published_cohort_is_of_ten_clients() -> None:
    Experiment.parse({**GOOD, "cohort": "reference"})
    for odd in ({"partition": {"name": "iid", "num_clients": 3}}, {"cohort_size": 11}):
        with pytest.raises(ConfigError, match=r"published draw over 10 clients.*allowed: seeded"):
            Experiment.parse({**GOOD, "cohort": "reference", **odd})


def test_yardsticks_do_not_depend_on_the_aggregator() -> None:
    adam = {**GOOD, "aggregator": {"name": "fedadam", "lr": 1e-3}}
    assert Experiment.parse(adam).server().name == "fedadam"
    for method in ("local", "centralised"):
        assert Experiment.parse({**adam, "method": method}).server() == Experiment.parse(GOOD).server()


def test_the_usual_rate_is_that_of_the_backbone_and_the_default_stays() -> None:
    usual = {"data": "synthetic-irony", "train": {"lr": "usual", "epochs": 2}}
    named = {"data": "synthetic-irony", "train": {"lr": 3e-3, "epochs": 2}}
    assert Experiment.parse(usual) == Experiment.parse(named)
    assert (
        Experiment.parse(usual).run_id()
        == Experiment.parse(named).run_id()
        != Experiment(data="synthetic-irony").run_id()
    )
    assert Experiment.parse({**usual, "backbone": {"name": "hf", "path": "x"}}).train.lr == 1e-4
    assert Experiment.parse(Experiment.parse(usual).dump()).train.lr == 3e-3
    with pytest.raises(ConfigError, match=r"train.lr: got 'common'; it should be a number"):
        Experiment.parse({**usual, "train": {"lr": "common"}})


@pytest.mark.parametrize(("one", "two"), [("all-text", "image"), ("none", "all-image-text"), ("both", "all")])
def test_two_names_of_one_set_of_modalities_are_refused(one: str, two: str) -> None:
    with pytest.raises(ConfigError, match=f"evaluate.visible: got '{one}' and '{two}', the same modalities twice"):
        Experiment.parse({"data": "synthetic-irony", "evaluate": {"visible": [one, two]}})
