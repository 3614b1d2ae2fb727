"""The error of an aggregation: exact while the clients' pairs are few, estimated from sketches of fixed size beyond."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fedmllm.core.tensors import tree_map
from fedmllm.core.types import ClientUpdate, Params, Sent
from fedmllm.federation import products
from fedmllm.federation.products import SKETCH, Products

ROWS = [3, 1, 0, 5, 2, 4]
MODULES = [f"layers.{n}.q_proj" for n in range(12)]


def adapter(seed: int, rank: int = 3) -> Params:
    draw = torch.Generator().manual_seed(seed)
    shapes = {f".lora_{f}.weight": shape for f, shape in (("A", (rank, 40)), ("B", (56, rank)))}
    return {m + part: torch.randn(shape, generator=draw) for m in MODULES for part, shape in shapes.items()}


def quality(frozen: Params) -> dict[str, float]:
    """Of the plain mean of both factors, seen by the clients of ROWS."""
    start, mean, total = adapter(0), adapter(0), sum(ROWS)
    sends = {k: Sent(start, frozen=frozen if k % 2 else {}) for k in range(len(ROWS))}

    def updates() -> Iterator[ClientUpdate]:
        for client, rows in enumerate(ROWS):
            delta = tree_map(lambda t: 0.3 * t, adapter(client + 1))
            for name in mean:
                mean[name] = mean[name] + rows / total * delta[name]
            yield ClientUpdate(client, delta, num_examples=rows, metrics={})

    watch = Products(sends, seed=7)
    assert [update.client for update in watch.watched(updates())] == list(range(len(ROWS)))
    return watch.quality(mean)


@pytest.mark.parametrize("frozen", [{}, adapter(90, rank=2)], ids=["no frozen adapter", "two frozen adapters"])
@pytest.mark.parametrize("limit", ["EXACT_RANK", "EXACT_BYTES"])
def test_a_sketch_estimates_the_exact_error(monkeypatch, frozen: Params, limit: str):
    exact = quality(frozen)
    monkeypatch.setattr(products, limit, getattr(products, limit) * 0 + 8)
    sketched = quality(frozen)
    assert set(exact) == {"result_rank", "aggregation_error"}
    assert sketched["aggregation_error_sketch"] == SKETCH
    assert 0.01 < exact["aggregation_error"] < 2
    assert sketched["aggregation_error"] == pytest.approx(exact["aggregation_error"], rel=0.09)
    assert quality(frozen) == sketched  # the projections come from the seed


def test_an_exact_error_is_that_of_the_whole_matrices():
    whole = dict.fromkeys(MODULES, 0.0)
    result: dict[str, torch.Tensor] = {}
    start, total = adapter(0), sum(ROWS)
    locals_ = [{n: t + 0.3 * adapter(k + 1)[n] for n, t in start.items()} for k in range(len(ROWS))]
    for module in MODULES:
        a, b = (
            sum(n / total * t[f"{module}.lora_{f}.weight"] for n, t in zip(ROWS, locals_, strict=True)) for f in "AB"
        )
        result[module] = b @ a
        whole[module] = sum(
            n / total * t[f"{module}.lora_B.weight"] @ t[f"{module}.lora_A.weight"]
            for n, t in zip(ROWS, locals_, strict=True)
        )
    square = sum(float((result[m] - whole[m]).norm() ** 2) for m in MODULES)
    expected = (square / sum(float(whole[m].norm() ** 2) for m in MODULES)) ** 0.5
    assert quality({})["aggregation_error"] == pytest.approx(expected, rel=1e-5)


def test_memory_does_not_grow_with_the_cohort(monkeypatch):
    monkeypatch.setattr(products, "EXACT_BYTES", 0)
    watch = Products({k: Sent(adapter(0)) for k in range(9)})
    for update in watch.watched(ClientUpdate(k, adapter(k), num_examples=1, metrics={}) for k in range(9)):
        assert watch._parts == []
        assert {tuple(t.shape) for t in watch._sums.values()} == {(56, SKETCH)}
        assert update.num_examples == 1
