"""Server optimisers: by hand, against independent formulas, and what every member must keep to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmllm.algorithms.base import Aggregator
from fedmllm.config.experiment import FAMILIES
from fedmllm.core.errors import FedmllmError, NothingToAverage
from fedmllm.core.types import ClientUpdate, Params, Round

ALL = sorted(FAMILIES["aggregator"].members)
AT = Round(number=1, seed=0, num_rounds=5, cohort=tuple(range(5)), num_clients=10)


def one(client: int, value: float, num_examples: int) -> ClientUpdate:
    return ClientUpdate(client, {n: torch.full((2, 2), value) for n in ("a", "b")}, num_examples, {"loss": 0.0})


def ones() -> Params:
    return {n: torch.ones(2, 2) for n in ("a", "b")}


def apply(name: str, rounds: list[list[ClientUpdate]]) -> tuple[Params, dict]:
    aggregator = Aggregator.pick(name, "aggregator")
    params = ones()
    state = aggregator.init(params)
    for updates in rounds:
        params, state = aggregator.apply(params, state, AT, updates)
    return params, state


def test_fedavg_is_the_weighted_mean_for_every_parameter() -> None:
    params, _ = apply("fedavg", [[one(0, 0.0, 1), one(1, 4.0, 3)]])
    for tensor in params.values():
        assert tensor.unique().tolist() == [4.0]  # 1 + (1*0 + 3*4) / 4


def test_fedavgm_by_hand() -> None:
    params, _ = apply("fedavgm", [[one(0, 1.0, 1)], [one(0, 1.0, 1)]])
    assert torch.allclose(params["b"], torch.tensor(1 + 1 + (0.9 + 1)))


def test_fedavgm_reference_starts_from_the_first_delta_and_has_no_rate() -> None:
    params, _ = apply("fedavgm-reference", [[one(0, 1.0, 1)], [one(0, 3.0, 1)]])
    assert torch.allclose(params["b"], torch.tensor(1 + 1 + (0.9 * 1 + 0.1 * 3)))


def test_fedavg_reference_doubles_every_tensor_but_the_first() -> None:
    params, _ = apply("fedavg-reference", [[one(0, 0.5, 1)]])
    assert params["a"].unique().tolist() == [1.5]
    assert params["b"].unique().tolist() == [2.5]


# Scalars again, written from the table of the protocol and not from the code: lr = tau = 1e-3, b1 = 0.9, b2 = 0.99.
def scalar(name: str, rounds: list[list[tuple[float, int]]]) -> float:
    reference = name.endswith("-reference")
    kind = name.removesuffix("-reference")
    w, m, v, first = 1.0, 0.0, 1e-6, True
    for updates in rounds:
        if reference:
            d = float(np.mean([x for x, _ in updates]))
        else:
            d = float(np.average([x for x, _ in updates], weights=[n for _, n in updates]))
        m = d if reference and first else 0.9 * m + 0.1 * d
        first = False
        g = m if reference else d
        if kind == "fedadagrad":
            m, v = d, v + d * d
        elif kind == "fedadam":
            v = 0.99 * v + 0.01 * g * g
        elif kind == "fedyogi":
            v = v - 0.01 * g * g * np.sign(v - g * g)
        w += 1e-3 * m / (np.sqrt(v) + 1e-3)
    return w


@pytest.mark.parametrize("name", [n for n in ALL if n.split("-")[0] in ("fedadagrad", "fedadam", "fedyogi")])
def test_adaptive_optimisers_follow_their_formulas(name: str) -> None:
    rounds = [[(0.02, 10), (-0.01, 30)], [(0.001, 5), (0.004, 5)], [(-0.03, 7), (0.0, 1)]]
    updates = [[one(k, d, n) for k, (d, n) in enumerate(r)] for r in rounds]
    params, _ = apply(name, updates)
    expected = scalar(name, rounds)
    assert params["a"].flatten().tolist() == pytest.approx([expected] * 4, rel=1e-5)
    assert torch.equal(params["a"], params["b"])


@pytest.mark.parametrize("name", ALL)
class TestEveryAggregator:
    """Conformance: a new member is picked up here with no change to this file."""

    @pytest.fixture
    def updates(self) -> list[ClientUpdate]:
        rng = torch.Generator().manual_seed(0)
        return [
            ClientUpdate(k, {n: torch.randn(2, 2, generator=rng) * 0.01 for n in ("a", "b")}, k + 1, {"loss": 0.0})
            for k in range(5)
        ]

    def test_is_pure_and_deterministic(self, name: str, updates: list[ClientUpdate]) -> None:
        aggregator = Aggregator.pick(name, "aggregator")
        params = ones()
        state = aggregator.init(params)
        kept = {k: {n: t.clone() for n, t in tree.items()} for k, tree in state.items()}
        first, after = aggregator.apply(params, state, AT, updates)
        again, _ = aggregator.apply(params, state, AT, updates)
        assert all(torch.equal(first[n], again[n]) for n in params)
        assert all(torch.equal(params[n], ones()[n]) for n in params)
        assert all(torch.equal(state[k][n], kept[k][n]) for k in kept for n in kept[k])
        assert set(first) == set(params)
        assert all(t.dtype == torch.float32 for tree in (first, *after.values()) for t in tree.values())

    def test_takes_a_stream_and_gives_the_same_bytes(self, name: str, updates: list[ClientUpdate]) -> None:
        aggregator = Aggregator.pick(name, "aggregator")
        listed, _ = aggregator.apply(ones(), aggregator.init(ones()), AT, updates)
        streamed, _ = aggregator.apply(ones(), aggregator.init(ones()), AT, iter(updates))
        assert all(torch.equal(listed[n], streamed[n]) for n in listed)

    def test_refuses_an_order_that_would_change_the_bytes(self, name: str, updates: list[ClientUpdate]) -> None:
        aggregator = Aggregator.pick(name, "aggregator")
        with pytest.raises(FedmllmError, match="ascending client order"):
            aggregator.apply(ones(), aggregator.init(ones()), AT, reversed(updates))

    def test_a_client_without_rows_changes_nothing(self, name: str, updates: list[ClientUpdate]) -> None:
        aggregator = Aggregator.pick(name, "aggregator")
        empty = ClientUpdate(9, {n: torch.full((2, 2), 7.0) for n in ("a", "b")}, 0, {"loss": 0.0})
        without, _ = aggregator.apply(ones(), aggregator.init(ones()), AT, updates)
        with_it, _ = aggregator.apply(ones(), aggregator.init(ones()), AT, [*updates, empty])
        assert all(torch.equal(without[n], with_it[n]) for n in without)

    def test_nothing_to_average_is_said(self, name: str) -> None:
        aggregator = Aggregator.pick(name, "aggregator")
        with pytest.raises(NothingToAverage):
            aggregator.apply(ones(), aggregator.init(ones()), AT, [])

    def test_other_names_or_shapes_are_refused(self, name: str) -> None:
        aggregator = Aggregator.pick(name, "aggregator")
        odd = [ClientUpdate(0, {"a": torch.ones(2, 2), "c": torch.ones(2, 2)}, 1, {"loss": 0.0})]
        with pytest.raises((FedmllmError, KeyError)):
            aggregator.apply(ones(), aggregator.init(ones()), AT, odd)
