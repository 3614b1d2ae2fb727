"""`backbone.device_map`: what is refused, whole runs over two fake devices, memory of each, suites.

What the devices compute is tested in backbones/test_spread.py.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError
from fedmllm.reports.model import print_estimate
from fedmllm.runs.run import run
from fedmllm.runs.suites.devices import find_devices
from support.fake_devices import FakeDevices
from support.runs import Stop, events, experiment

SPREAD = {"name": "tiny", "device_map": ["cpu:0", "cpu:1"]}
DATA = {"name": "synthetic-irony"}
NOISE = {"name": "row-dp", "noise_multiplier": 1.0, "clip": 0.1}


def spread(device_map: Any = ("cpu:0", "cpu:1"), engine: Any = "in-process", **backbone: Any) -> Experiment:
    table = {"name": "tiny", "device_map": device_map, **backbone}
    return Experiment.parse({"data": DATA, "backbone": table, "engine": engine})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device_map": ["cuda:0", "gpu:1"]}, r"device_map: got 'gpu:1'; allowed: \"auto\", or a list of at least two"),
        ({"device_map": ["cuda", "cuda:1"]}, r"device_map: got 'cuda'; allowed: "),
        ({"device_map": ["mps", "cuda:1"]}, r"device_map: got 'mps'; allowed: "),
        ({"device_map": ["auto", "cuda:1"]}, r"device_map: got 'auto'; allowed: "),
        ({"device_map": ["cuda:0", "cuda:01"]}, r"device_map: got 'cuda:01'; allowed: "),
        ({"device_map": ["cuda:1", "cuda:1"]}, r"device_map: 'cuda:1' is named twice; allowed: "),
        ({"device_map": ["cpu", "cuda:1", "cpu:0"]}, r"device_map: 'cpu:0' is named twice; allowed: "),
        ({"device_map": ["cuda:1"]}, r'device_map: got \'cuda:1\' alone; use device = "cuda:1"'),
        ({"device_map": "cuda:1"}, r'device_map: got \'cuda:1\' alone; use device = "cuda:1"'),
        ({"device_map": 2}, r"device_map: got 2; "),
        ({"device": "cuda"}, r"device_map: got \['cpu:0', 'cpu:1'\] with device = 'cuda'; give one of them"),
        ({"precision": {"base": "nf4"}}, r'device_map: weights in nf4 are not spread .* allowed: precision.base "float32"'),
        (
            {"engine": "stacked"},
            r"^backbone.device_map: got \['cpu:0', 'cpu:1'\] with engine 'stacked', which computes on one device; set "
            r"engine.name to one of: flower-sites, in-process$",
        ),
        ({"engine": "flower-simulation"}, r"^backbone.device_map: .* with engine 'flower-simulation'"),
    ],
)  # fmt: skip
def test_what_cannot_be_spread_is_refused_while_the_settings_are_read(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        spread(**changed)
    assert str(error.value).startswith("backbone")


def test_the_run_id_says_what_is_computed_and_not_where() -> None:
    whole = Experiment.parse({"data": DATA, "engine": "in-process"})
    assert spread("auto").run_id() == spread(["cuda:0", "cuda:1"]).run_id() == whole.run_id()
    assert spread("auto").backbone.device_map == ("auto",)


def test_a_run_over_two_devices_trains_evaluates_and_resumes_to_the_bytes_of_one(tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "engine": "in-process", "aggregator": "fedadam", "evaluate": {"every": 2, "select": "validation"},
    }  # fmt: skip
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(experiment(**common), whole)
    with FakeDevices() as devices:
        with pytest.raises(KeyboardInterrupt):
            run(experiment(**common, backbone=SPREAD), parted, [Stop("round", 2)])
        run(experiment(**common, backbone=SPREAD), parted, resume=True)
    assert devices.copies[0, 1] > 20
    assert devices.copies[1, 0] > 20
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "predictions.jsonl.gz"):
        assert (parted / name).read_bytes() == (whole / name).read_bytes(), name

    def said(folder: Path) -> list[Any]:
        rounds = [[c["loss"] for c in event["clients"]] for event in events(folder, "round")]
        return [*rounds, *(event["metrics"] for event in events(folder, "eval"))]

    assert said(parted) == said(whole)
    assert [events(folder)[0]["device"]["name"] for folder in (whole, parted)] == ["cpu", "cpu:0, cpu:1"]


@pytest.mark.parametrize(
    "changed",
    [
        {"train": {"max_steps": 2, "clip_norm": 0.01}, "objective": {"name": "fedprox", "mu": 1.0}},
        {"aggregator": "scaffold"},
        {"privacy": {**NOISE, "simulate_noise": True}, "train": {"clip_norm": 0}},
        {"aggregator": "flora"},
    ],
    ids=["clipped, proximal", "with state of clients", "clipped by row, with noise", "stacked ranks"],
)  # fmt: skip
def test_what_training_adds_to_gradients_is_with_their_layers(tmp_path: Path, changed: dict[str, Any]) -> None:
    train = {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 1, **changed.get("train", {})}
    table = {"engine": "in-process", "num_rounds": 2, **changed, "train": train}
    run(experiment(**table), tmp_path / "whole")
    with FakeDevices():
        run(experiment(**table, backbone=SPREAD), tmp_path / "parted")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "parted" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_estimate_has_the_memory_of_each_device() -> None:
    def estimate(**backbone: Any) -> dict[str, Any]:
        out = io.StringIO()
        table = {"data": DATA, "engine": "in-process", "backbone": {"name": "tiny", **backbone}}
        print_estimate(Experiment.parse(table), as_json=True, console=Console(file=out))
        return dict(json.loads(out.getvalue()))

    one, two = estimate(), estimate(device_map=["cuda:0", "cuda:1"])  # no such devices are needed
    assert "device_bytes" not in one
    each = two["device_bytes"]
    assert list(each) == ["cuda:0", "cuda:1"]
    assert sum(each.values()) == pytest.approx(two["total_memory_bytes"], rel=0.01)
    assert max(each.values()) < 0.75 * two["total_memory_bytes"]
    assert two["needed_bytes"] == pytest.approx(max(each.values()) + 2e9)
    out = io.StringIO()
    print_estimate(spread(["cuda:0", "cuda:1"]), console=Console(file=out, width=120))
    assert "memory of each device" in out.getvalue()
    assert "3 of 4 layers" in out.getvalue()


def test_a_suite_leaves_such_cells_on_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cell = spread(["cuda:0", "cuda:1"])
    assert find_devices([], [cell], 0) == []
    with pytest.raises(ConfigError, match=r"^--device: cells have backbone.device_map, which names their devices"):
        find_devices(["cuda"], [cell], 0)


def test_cells_on_the_same_cards_are_not_run_at_a_time() -> None:
    cells = [spread(["cuda:0", "cuda:1"])]
    with pytest.raises(ConfigError, match=r"--jobs: got 2; cells have backbone.device_map = \['cuda:0', 'cuda:1'\]"):
        find_devices([], cells, 2)
    assert find_devices([], cells, 1) == find_devices([], [spread()], 2) == []


def test_a_record_with_every_default_is_read_back() -> None:
    made = spread(["cuda:0", "cuda:1"])
    assert Experiment.parse(made.model_dump(mode="json")) == made
