"""Relation graph-attention: FedAvg at its start, its slopes by finite differences, what it learns, engines and resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmllm.algorithms.graph_attention import GraphAttention
from fedmllm.algorithms.relations import Mixing, Profile, PublicLoss, Related, combined
from fedmllm.algorithms.server_optimizers import FedAvg
from fedmllm.core.errors import ConfigError
from fedmllm.core.types import ClientUpdate, Params, Round, State
from fedmllm.federation.public_loss import MeanLoss, masks_like
from fedmllm.runs.inputs import Inputs
from fedmllm.runs.result import load_run
from fedmllm.runs.run import run
from support.runs import Stop, events, experiment

IMAGE, TEXT = Profile(10, (1.0, 0.0), frozenset({"image"})), Profile(30, (0.0, 1.0), frozenset({"text"}))
BOTH = Profile(20, (0.5, 0.75), frozenset({"image", "text"}))
PROFILES = [IMAGE, TEXT, BOTH, IMAGE]
B = "layer.lora_B.weight"
PUBLIC = {"rows": 6}
TABLE: dict[str, Any] = {
    "scenario": {"name": "cross", "num_image_clients": 1},
    "relation": "graph-attention",
    "public": PUBLIC,
    "num_rounds": 2,
    "cohort_size": 2,
}


def adapters(seed: int, count: int = 4) -> list[Params]:
    noise = torch.Generator().manual_seed(seed)
    return [{B: torch.randn(5, 2, generator=noise)} for _ in range(count)]


def near(*wanted: Params) -> PublicLoss:
    """Half the squared distance from what a node wants."""

    def loss(node: int, adapter: Params) -> tuple[float, Params]:
        gap = adapter[B].double() - wanted[node][B].double()
        return 0.5 * float(gap.square().sum()), {B: gap}

    return loss


def mixing(loss: PublicLoss, moved: Sequence[int] = (0, 1, 3), profiles: Sequence[Profile] = PROFILES) -> Mixing:
    return Mixing(Round(1, 0, 9, tuple(moved), 4), profiles, list(adapters(1)), adapters(2), moved, loss)


@pytest.mark.parametrize("static", [False, True])
def test_before_it_learns_every_client_gets_the_mean_over_rows_of_those_that_trained(static: bool):
    relation = GraphAttention(steps=0, static=static)
    learned, weights = relation.train(mixing(near()), relation.start(PROFILES))
    assert (weights == np.array([[10, 30, 0, 10]] * 4) / 50).all()
    assert learned["measured"]["public_loss"].numel() == 0
    kept = GraphAttention(steps=0, keep=0.5, static=static).train(mixing(near()), relation.start(PROFILES))[1]
    assert np.allclose(kept[2], np.array([10, 30, 10, 10]) / 60)  # the third client did not train
    assert (kept[0] == weights[0]).all()


@pytest.mark.parametrize("static", [False, True])
def test_gradients_are_those_of_finite_differences(static: bool):
    """m of Adam after one step is 0.1 times the descent; W, V and a are not at their start, where some slopes vanish."""
    relation = GraphAttention(static=static, heads=2, width=3, sketch=4)
    start = relation.start(PROFILES)
    noise = torch.Generator().manual_seed(0)
    weights = {n: t + torch.randn(t.shape, generator=noise, dtype=t.dtype) for n, t in start["weights"].items()}
    seen = mixing(near(*adapters(3)))

    def value(at: Params) -> float:
        rows = relation._attention(at, relation._features(PROFILES, seen.deltas), relation._prior(PROFILES, seen.moved))
        mixed = [sum(w * a[B].double() for w, a in zip(row, seen.adapters, strict=True)) for row in rows]
        losses = [0.5 * (mixed[i] - adapters(3)[i][B]).square().sum() for i in seen.moved]
        return float(sum(losses)) / len(losses)

    learned, _ = relation.train(seen, {**start, "weights": weights})
    assert float(learned["measured"]["public_loss"]) == pytest.approx(value(weights), rel=1e-6)
    for name, t in weights.items():
        for place in ((0, 0), (1, 2)):
            step = torch.zeros_like(t)
            step[place if t.ndim == 2 else (*place, 1)] = 1e-5
            ahead, behind = (value({**weights, name: t + sign * step}) for sign in (1, -1))
            found = -10 * float(learned["m"][name][place if t.ndim == 2 else (*place, 1)])
            assert found == pytest.approx((ahead - behind) / 2e-5, rel=1e-4, abs=1e-7)


def rounds(relation: GraphAttention, count: int) -> tuple[State, list[float], np.ndarray[Any, Any]]:
    """Image clients want what image clients have, and text clients the same of theirs."""
    own = adapters(2)
    wanted = [own[0], own[1], own[2], own[0]]
    seen = Mixing(Round(1, 0, 9, (0, 1), 4), PROFILES, list(adapters(1)), own, (0, 1), near(*wanted))
    learned, losses = relation.start(PROFILES), []
    for _ in range(count):
        learned, weights = relation.train(seen, learned)
        losses += learned["measured"]["public_loss"].tolist()
    return learned, losses, weights


def test_it_learns_who_helps_whom():
    learned, losses, weights = rounds(GraphAttention(), 60)
    assert losses[-1] < 0.1 * losses[0]
    assert min(weights[0, 0], weights[1, 1]) > 0.9
    assert float(learned["measured"]["own_weight"]) == pytest.approx((weights[0, 0] + weights[1, 1]) / 2)
    by_profile = rounds(GraphAttention(sketch=0), 60)[2]
    assert (by_profile[3] == by_profile[0]).all()  # an image client that never trained follows the other one
    assert by_profile[0, 0] > 0.9
    assert rounds(GraphAttention(lr=0.0), 3)[1] == [losses[0]] * 3
    static = rounds(GraphAttention(static=True), 60)[2]
    assert static[0, 0] + static[1, 1] < weights[0, 0] + weights[1, 1]  # one order of clients for all


def test_a_permutation_of_clients_permutes_the_weights():
    relation, order = GraphAttention(), [2, 0, 3, 1]
    learned = rounds(relation, 5)[0]

    def weights(places: Sequence[int]) -> np.ndarray[Any, Any]:
        trained = [i for i, place in enumerate(places) if place != 2]
        deltas, own, wanted = ([made[p] for p in places] for made in (adapters(1), adapters(2), adapters(3)))
        profiles = [PROFILES[p] for p in places]
        seen = Mixing(Round(1, 0, 9, (0, 1), 4), profiles, list(deltas), own, trained, near(*wanted))
        return relation.train(seen, learned)[1]

    straight = weights(range(4))
    assert np.allclose(weights(order), straight[np.ix_(order, order)], atol=1e-12)
    assert np.abs(straight.sum(1) - 1).max() < 1e-12
    assert (straight[:, 2] == 0).all()


def test_one_node_is_left_as_it_is():
    def fails(node: int, adapter: Params) -> tuple[float, Params]:
        raise AssertionError("one node needs no measurement")

    graph = Related(
        name="fedavg", inner=FedAvg(), relation=GraphAttention(), profiles=(BOTH,), public_loss=fails
    )  # as a run makes it
    start = {B: torch.ones(5, 2)}
    update = ClientUpdate(0, {B: torch.full((5, 2), 0.25)}, 20, {})
    params, state = graph.apply(start, graph.init(start), Round(1, 0, 1, (0,), 1), [update])
    assert torch.equal(params[B], torch.full((5, 2), 1.25))
    assert graph.measured(state) == {}


def test_public_rows_show_what_the_clients_see():
    masks = masks_like(BOTH, 8, ("image", "text"), seed=1)
    assert [sum(m in v for v in masks) for m in ("image", "text")] == [4, 6]
    assert masks_like(IMAGE, 8, ("image", "text"), 1) == [frozenset({"image"})] * 8
    assert masks_like(BOTH, 8, ("image", "text"), 2) != masks


def test_the_gradient_of_the_public_loss():
    inputs = Inputs.load(experiment(**TABLE))
    graph = inputs.aggregator()
    assert isinstance(graph, Related)
    assert graph.public_loss is None  # the clients' half travels without the model
    server = inputs.with_public_loss(graph)
    assert isinstance(server, Related)
    assert isinstance(server.public_loss, MeanLoss)
    noise = torch.Generator().manual_seed(0)
    adapter = {n: t + 0.05 * torch.randn(t.shape, generator=noise) for n, t in inputs.start.items()}
    before = [(n, w.requires_grad) for n, w in inputs.backbone.trainable().items()]
    loss, gradient = server.public_loss(1, adapter)
    assert gradient.keys() == adapter.keys()
    length = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
    step = 1e-2 / length
    ahead, behind = (
        server.public_loss(1, {n: t + sign * step * gradient[n] for n, t in adapter.items()})[0] for sign in (1, -1)
    )
    assert (ahead - behind) / (2 * step) == pytest.approx(length**2, rel=1e-2)
    assert server.public_loss(1, adapter)[0] == loss
    assert server.public_loss(0, adapter)[0] != loss  # the image client's rows show other modalities
    assert [(n, w.requires_grad) for n, w in inputs.backbone.trainable().items()] == before


def adapter_of(folder: Path) -> Params:
    return load_run(folder).adapter.tensors


def files(folder: Path) -> list[bytes]:
    return [(folder / f"adapters/client-{k}/adapter_model.safetensors").read_bytes() for k in range(3)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention") / "run"
    run(experiment(**TABLE), folder)
    return folder


def test_the_record_has_the_public_loss(whole: Path):
    for line in events(whole, "round"):
        assert line["relation"].keys() == {"public_loss", "own_weight"}
        assert line["relation"]["public_loss"][0] > 0
    assert load_run(whole).rows[0]["method"] == "fedavg+graph-attention"
    assert len(set(files(whole))) == 3


@pytest.mark.parametrize("off", [{"steps": 0}, {"lr": 0.0}])
def test_without_training_it_is_fedavg(off: dict[str, Any], tmp_path: Path):
    """Two of three clients are asked. A second round's Adam would amplify the order of summation."""
    table = {**TABLE, "num_rounds": 1}
    run(experiment(**{**table, "relation": {"name": "graph-attention", **off}}), tmp_path / "attention")
    run(experiment(**{**table, "relation": "one", "public": {}}), tmp_path / "one")
    one = adapter_of(tmp_path / "one")
    assert max(float((t - one[n]).abs().max()) for n, t in adapter_of(tmp_path / "attention").items()) < 1e-6
    assert len(set(files(tmp_path / "attention"))) == 1


def test_a_resumed_run_has_the_bytes_of_one_that_was_not_stopped(whole: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(experiment(**TABLE), tmp_path / "run", [Stop("round", 2)])
    run(experiment(**TABLE), tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(whole)
    again, first = ([line["relation"] for line in events(folder, "round")] for folder in (tmp_path / "run", whole))
    assert again[-1] == first[-1]


def test_engines_agree(whole: Path, tmp_path: Path):
    for engine in ("in-process", "stacked"):
        run(experiment(**TABLE, engine=engine), tmp_path / engine)
    other = adapter_of(tmp_path / "stacked")
    assert max(float((t - other[n]).abs().max()) for n, t in adapter_of(tmp_path / "in-process").items()) < 1e-4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"public": {}}, "public.rows: got 0; relation 'graph-attention' is trained on public rows"),
        ({"public": {"rows": 6, "client": True}}, "clients would train on the public rows that it is measured on"),
        ({"completion": "retrieve"}, "with completion 'retrieve': clients would train on the public rows"),
        ({"engine": "flower-sites"}, "whose server does not know the clients' modalities"),
        (
            {"engine": {"name": "flower-sites", "secure": {}}, "cohort_size": 3},
            "whose server does not know the clients' modalities",
        ),
        ({"relation": {"name": "graph-attention", "heads": 0}}, "relation.heads"),
    ],
)
def test_what_cannot_go_together_is_refused_when_it_is_read(changed: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        experiment(**{**TABLE, **changed})
    assert message in str(error.value)


def test_mixtures_are_sums_of_adapters():
    first, second = adapters(0, 2)
    assert torch.allclose(combined([first, second], np.array([0.25, 0.75]))[B], 0.25 * first[B] + 0.75 * second[B])
