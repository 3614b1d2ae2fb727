"""FedDyn and FedNova against their papers, and server optimizers after another aggregator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.feddyn import FedDyn
from fedmllm.algorithms.fednova import FedNova
from fedmllm.algorithms.objectives import ClientView
from fedmllm.algorithms.robust import Krum
from fedmllm.algorithms.server_optimizers import FedAdam
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError
from fedmllm.core.tensors import tree_map
from fedmllm.core.types import ClientUpdate, Outcome, Params, Round

AT = Round(number=1, seed=0, num_rounds=9, cohort=(0, 1, 2), num_clients=3)
VIEW = ClientView(0.0, 1, lambda name: 0)


def tree(value: float) -> Params:
    return {"a": torch.tensor([value], dtype=torch.float64)}


def test_feddyn_reaches_the_minimum_of_the_sum_of_unlike_quadratics() -> None:
    """L_k = c_k / 2 (w - t_k)^2, each round solved exactly: FedAvg would stay at the mean of the t_k."""
    aggregator, curvature, target = FedDyn(alpha=0.5), (1.0, 4.0, 0.3), (2.0, -1.0, 7.0)
    params, state, kept = tree(0.0), aggregator.init(tree(0.0)), [{}, {}, {}]
    for _ in range(300):
        updates = []
        for k, (c, t) in enumerate(zip(curvature, target, strict=True)):
            sent = aggregator.sends(params, state, AT, k)
            rule = aggregator.begin(AT, VIEW, sent, kept[k])
            shift = rule.shift["a"] if rule.shift else 0.0
            best = (c * t + rule.mu["a"] * params["a"] - shift) / (
                c + rule.mu["a"]
            )  # c (w - t) + shift + mu (w - w_t) = 0
            delta = {"a": best - params["a"]}
            extra, kept[k] = aggregator.finish(AT, VIEW, Outcome(sent, delta, {}, 1, 5), kept[k])
            updates.append(ClientUpdate(k, delta, 5, {}, extra))
        params, state = aggregator.apply(params, state, AT, updates)
    optimum = sum(c * t for c, t in zip(curvature, target, strict=True)) / sum(curvature)
    assert float(params["a"]) == pytest.approx(optimum, abs=1e-9)


def test_fednova_by_hand_and_as_fedavg_at_equal_steps() -> None:
    def update(client: int, delta: float, rows: int, steps: float) -> ClientUpdate:
        return ClientUpdate(client, tree(delta), rows, {}, extra={"num_steps": torch.tensor([steps])})

    params, _ = FedNova().apply(tree(1.0), {}, AT, [update(0, 4.0, 1, 2.0), update(1, 6.0, 3, 6.0)])
    assert float(params["a"]) == pytest.approx(1 + (0.25 * 2 + 0.75 * 6) * (0.25 * 2 + 0.75 * 1))
    params, _ = FedNova().apply(tree(1.0), {}, AT, [update(0, 4.0, 1, 5.0), update(1, 6.0, 3, 5.0)])
    assert float(params["a"]) == pytest.approx(1 + 0.25 * 4 + 0.75 * 6)


def updates(*values: float) -> list[ClientUpdate]:
    return [ClientUpdate(k, tree(v), 10, {}) for k, v in enumerate(values)]


def test_a_server_optimizer_applies_the_combined_delta() -> None:
    """Krum picks 1.0 both times; FedAdam then sees nothing but that."""
    krum = Aggregator.pick({"name": "krum", "server": {"name": "fedadam", "lr": 0.01}}, "aggregator")
    params, state = tree(0.0), krum.init(tree(0.0))
    expected, inner = tree(0.0), FedAdam(lr=0.01).init(tree(0.0))
    for _ in range(2):
        params, state = krum.apply(params, state, AT, updates(1.0, 1.0, 1.0, 1.1, 99.0))
        expected, inner = FedAdam(lr=0.01).apply(expected, inner, AT, updates(1.0))
    assert torch.equal(params["a"], expected["a"])
    assert state.keys() == {"server.m", "server.v"}
    assert krum.label() == "krum+fedadam"


def test_tensors_at_rest_keep_value_and_moments() -> None:
    aggregator = Krum(server=FedAdam())
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    state = aggregator.init(params)
    after, moments = aggregator.step(params, state, AT, {"b": torch.ones(2)})
    assert torch.equal(after["a"], params["a"])
    assert not torch.equal(after["b"], params["b"])
    assert all(torch.equal(moments[k]["a"], state[k]["a"]) for k in state)
    assert not torch.equal(moments["server.m"]["b"], state["server.m"]["b"])
    assert tree_map(torch.equal, after, params).keys() == params.keys()


DATA: dict[str, Any] = {"data": "synthetic-irony", "cohort_size": 5}


def test_a_nested_server_optimizer_in_toml() -> None:
    table = {"name": "krum", "server": {"name": "fedadam", "lr": 0.02}}
    composed = Experiment.parse({**DATA, "aggregator": table})
    assert composed.method_name() == "krum+fedadam"
    assert composed.aggregator.server == FedAdam(lr=0.02)
    assert Experiment.parse(composed.model_dump(mode="json")).run_id() == composed.run_id()
    plain = Experiment.parse({**DATA, "aggregator": "krum"})
    assert "server" not in plain.identity()["aggregator"]
    assert plain.run_id() != composed.run_id()


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (
            "krum",
            r"aggregator\.server\.name: got 'krum', which needs more than one combined delta; allowed: fedadagrad",
        ),
        ("scaffold", r"aggregator\.server\.name: got 'scaffold', which needs more than one"),
        ("fedadm", r"aggregator\.server\.name: got 'fedadm'; allowed: .*did you mean 'fedadam'"),
        ({"name": "fedadam", "rate": 1}, r"aggregator\.server\.rate: unknown key"),
    ],
)
def test_what_cannot_follow_is_refused(server: object, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Experiment.parse({**DATA, "aggregator": {"name": "krum", "server": server}})


def test_a_rate_without_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"aggregator: lr = 0\.5 has no effect with server; set server\.lr"):
        Experiment.parse({**DATA, "aggregator": {"name": "krum", "lr": 0.5, "server": "fedadam"}})
