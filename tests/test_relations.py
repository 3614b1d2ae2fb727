"""Relations: weights of the graph by hand, one node as before, resume, evaluation by node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmllm.algorithms.relations import ByProfile, Profile, Related, Relation, Similarity, projected
from fedmllm.algorithms.server_optimizers import FedAvg
from fedmllm.core.errors import ConfigError, NothingToAverage
from fedmllm.core.types import ClientUpdate, Params, Round
from fedmllm.runs.result import load_run
from fedmllm.runs.run import run
from fedmllm.testing import check_relation
from support.runs import Stop, events, experiment

IMAGE, TEXT, BOTH = frozenset({"image"}), frozenset({"text"}), frozenset({"image", "text"})
CROSS = {"name": "cross", "num_image_clients": 1}


@pytest.mark.parametrize("name", sorted(Relation.members))
def test_every_relation_keeps_the_rules(name: str):
    check_relation(Relation.pick(name, "relation"))


def test_a_relation_whose_rows_are_no_mean_is_caught(monkeypatch):
    monkeypatch.setattr(ByProfile, "mix", lambda self, profiles, deltas: np.eye(len(profiles)) * 0.9)
    with pytest.raises(AssertionError, match="must add up to 1"):
        check_relation(ByProfile())


def test_weights_of_profiles_by_hand():
    """Image and text clients have nothing in common but the floor; each shares half with those that see both."""
    profiles = [Profile(10, (1.0, 0.0), IMAGE), Profile(10, (1.0, 1.0), BOTH), Profile(20, (0.0, 1.0), TEXT)]
    affinity = np.array([[1, 0.5, 0.3], [0.5, 1, 0.5], [0.3, 0.5, 1]])  # Jaccard; 0 became the floor
    degree = affinity.sum(1)
    graph = affinity / np.sqrt(np.outer(degree, degree)) * [10, 10, 20]
    graph /= graph.sum(1, keepdims=True)
    assert np.allclose(ByProfile(rho=0.5).mix(profiles, []), 0.5 * np.eye(3) + 0.5 * graph, atol=1e-15)
    assert (ByProfile(rho=0.0).mix(profiles, []) == np.eye(3)).all()
    assert np.allclose(ByProfile(rho=1.0, floor=1.0).mix(profiles, []), [[0.25, 0.25, 0.5]] * 3)
    turned = ByProfile().mix(profiles[::-1], [])
    assert np.allclose(turned, ByProfile().mix(profiles, [])[::-1, ::-1])  # a permutation of clients permutes R
    assert ByProfile().nodes([*profiles, profiles[1], Profile(0, (0.0, 0.0), frozenset())]) == [0, 1, 2, 1, 0]


def deltas(*rows: list[float]) -> list[Params | None]:
    return [{"x.lora_B.weight": torch.tensor(row), "x.lora_A.weight": torch.randn(3)} if row else None for row in rows]


def test_weights_of_similar_clients_by_hand():
    profiles = [Profile(n, (1.0, 1.0), BOTH) for n in (10, 20, 30)]
    prior = np.array([10, 20, 30]) / 60
    same = deltas([1.0, 2.0], [1.0, 2.0], [10.0, 20.0])  # the length of a delta does not count, and A not at all
    assert np.allclose(Similarity(alpha=5.0).mix(profiles, same), [prior] * 3)
    apart = deltas([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0])
    assert np.allclose(Similarity(alpha=0.0).mix(profiles, apart), [prior] * 3)
    assert np.allclose(Similarity(alpha=9.0).mix(profiles, apart), np.eye(3))
    # the second client has not been asked: it follows the others, and they leave it out
    assert np.allclose(Similarity().mix(profiles, deltas([1.0], [], [1.0])), [[0.25, 0, 0.75]] * 3)


def test_projection_onto_the_simplex():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.normal(size=7)
        found = projected(values)
        assert found.min() >= 0
        assert abs(found.sum() - 1) < 1e-12
        others = rng.dirichlet(np.ones(7), size=200)
        assert ((others - values) ** 2).sum(1).min() >= ((found - values) ** 2).sum() - 1e-12
    assert np.allclose(projected(np.array([0.2, 0.3, 0.5])), [0.2, 0.3, 0.5])


def graph(relation: Relation) -> Related:
    profiles = (Profile(1, (1.0, 0.0), IMAGE), Profile(3, (0.0, 1.0), TEXT), Profile(2, (0.0, 1.0), TEXT))
    return Related(name="fedavg", inner=FedAvg(), relation=relation, profiles=profiles)


def test_a_node_without_updates_keeps_its_adapter():
    aggregator, start = graph(ByProfile(rho=0.0)), {"b": torch.tensor([1.0])}
    at = Round(1, 0, 5, (1, 2), 3)
    updates = [ClientUpdate(k, {"b": torch.tensor([float(k)])}, n, {}) for k, n in ((1, 3), (2, 2))]
    params, state = aggregator.apply(start, aggregator.init(start), at, updates)
    assert [float(aggregator.sends(params, state, at, k).start["b"]) for k in (0, 1, 2)] == pytest.approx([1, 2.4, 2.4])
    assert float(params["b"]) == pytest.approx((1 * 1 + 5 * 2.4) / 6)  # the mean over rows of all clients
    assert float(aggregator.for_visible(params, state, TEXT)["b"]) == pytest.approx(2.4)
    assert aggregator.for_visible(params, state, BOTH) is params  # no client sees both
    with pytest.raises(NothingToAverage):
        aggregator.apply(start, state, at, [ClientUpdate(1, {"b": torch.tensor([1.0])}, 0, {})])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_run(folder).adapter.tensors


def distance(one: Path, two: Path) -> float:
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.mark.parametrize("aggregator", ["fedavg", "fedadam"])
def test_one_node_is_as_before_to_the_byte(tmp_path: Path, aggregator: str):
    """On aligned rows all clients have one profile."""
    run(experiment(num_rounds=2, aggregator=aggregator), tmp_path / "one")
    run(experiment(num_rounds=2, aggregator=aggregator, relation="profile"), tmp_path / "profile")
    assert distance(tmp_path / "one", tmp_path / "profile") == 0.0
    values = [[(row["metric"], row["value"]) for row in load_run(tmp_path / name).rows] for name in ("one", "profile")]
    assert values[0] == values[1]


def test_a_full_graph_is_one_model(tmp_path: Path):
    """rho = 1, floor = 1, all clients asked: FedAvg, up to the order of summation. A second round would amplify that."""
    common = {"num_rounds": 1, "scenario": CROSS, "cohort_size": 3}
    run(experiment(**common), tmp_path / "one")
    run(experiment(**common, relation={"name": "profile", "rho": 1.0, "floor": 1.0}), tmp_path / "profile")
    assert distance(tmp_path / "one", tmp_path / "profile") < 1e-6


TABLE: dict[str, Any] = {
    "scenario": CROSS,
    "aggregator": "fedadam",
    "relation": "profile",
    "num_rounds": 2,
    "evaluate": {"visible": ["all", "image", "text"]},
}


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cross") / "run"
    run(experiment(**TABLE), folder)
    return folder


def test_a_resumed_run_has_the_bytes_of_one_that_was_not_stopped(cross: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(experiment(**TABLE), tmp_path / "run", [Stop("round", 2)])
    run(experiment(**TABLE), tmp_path / "run", resume=True)
    assert distance(cross, tmp_path / "run") == 0.0
    for client in range(3):
        file = f"adapters/client-{client}/adapter_model.safetensors"
        assert (cross / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


def test_engines_agree(cross: Path, tmp_path: Path):
    run(experiment(**TABLE, engine="in-process"), tmp_path / "run")
    assert distance(cross, tmp_path / "run") < 1e-4


def test_rows_are_answered_by_the_node_that_sees_what_they_show(cross: Path):
    evals = events(cross, "eval")
    means = [e for e in evals if e.get("node") == "mean"]
    results = [e for e in evals if "node" not in e]
    assert [e["visible"] for e in means] == [e["visible"] for e in results] == ["all", "image", "text"]
    assert means[0]["metrics"] == results[0]["metrics"]  # no client sees both: their mean answers
    rows = {row["visible"]: row["value"] for row in load_run(cross).rows if row["metric"] == "auc"}
    assert rows == {e["visible"]: e["metrics"]["auc"] for e in results}
    assert load_run(cross).rows[0]["method"] == "fedadam+profile"
    files = [(cross / f"adapters/client-{k}/adapter_model.safetensors").read_bytes() for k in range(3)]
    assert len(set(files)) == 2  # two nodes


def test_similar_clients_have_adapters_of_their_own(tmp_path: Path):
    run(experiment(num_rounds=2, cohort_size=2, relation={"name": "similarity", "alpha": 3.0}), tmp_path / "run")
    row = load_run(tmp_path / "run").rows[0]
    assert row["n"] == 3
    assert len([e for e in events(tmp_path / "run", "eval") if e.get("client") is not None]) == 3
    files = [(tmp_path / f"run/adapters/client-{k}/adapter_model.safetensors").read_bytes() for k in range(3)]
    assert len(set(files)) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "local"}, "it is for: federated"),
        (
            {"aggregator": "krum", "cohort_size": 5, "partition": {"name": "iid", "num_clients": 9}},
            "allowed: fedadagrad",
        ),
        ({"evaluate": {"select": "validation", "every": 1}}, "which selects one adapter"),
        ({"engine": "flower-sites"}, "does not know the clients' modalities; allowed: flower-simulation"),
        ({"relation": {"name": "profile", "rho": 1.5}}, "relation.rho"),
        ({"aggregator": "hetlora", "backbone": {"name": "tiny", "lora": {"ranks": [4, 8]}}}, "relation: got 'profile'"),
    ],
)
def test_what_cannot_go_together_is_refused_when_it_is_read(changed: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        experiment(**{"relation": "profile", **changed})
    assert message in str(error.value)
