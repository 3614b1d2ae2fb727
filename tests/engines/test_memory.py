"""Cutting of rows into passes, the size of a pass on a GPU, and errors of passes that were too large."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedmllm.backbones.base import Row
from fedmllm.federation.engines.stacked.memory import CPU_TOKENS, CUDA_LARGEST, is_out_of_memory, token_budget
from fedmllm.federation.engines.stacked.packing import Item, passes

GIB = 2**30


def row(num_tokens: int) -> Item:
    ids = torch.zeros(num_tokens, dtype=torch.int64)
    return Item(Row(ids, ids), slot=0, weight=1.0, dropout_seed=0)


class Model:
    """As much of a backbone as the trial pass needs; remembers what it was tried with."""

    def __init__(self, device: str) -> None:
        self.device, self.weight, self.tried = torch.device(device), torch.nn.Parameter(torch.ones(1)), []

    def collate(self, rows):
        self.tried += [r.num_tokens for r in rows]
        return rows

    def loss(self, batch, seeds):
        return self.weight * 2, torch.ones(1)

    def trainable(self):
        return {"w": self.weight}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    memory = SimpleNamespace(used=GIB, free=40 * GIB, share=1.0)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 5 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 5 * GIB + memory.used)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (memory.free, max(80 * GIB, memory.free + 5 * GIB)))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda *_: memory.share)
    return memory


def test_on_the_cpu_it_is_a_constant() -> None:
    model = Model("cpu")
    assert token_budget(model, [row(3)]) == CPU_TOKENS
    assert model.tried == []


def test_on_cuda_the_longest_row_is_tried_and_the_rest_is_arithmetic(cuda: SimpleNamespace) -> None:
    model = Model("cuda")
    assert token_budget(model, [row(20), row(280), row(7)]) == 4096  # 0.7 * 40 GiB / 1 GiB * 280 = 7,840 -> 2^12
    assert model.tried == [280]
    assert model.weight.grad is None
    cuda.share = 0.25  # of 80 GiB, of which 5 are taken: 0.7 * 15 GiB / 1 GiB * 280 = 2,940 -> 2^11
    assert token_budget(model, [row(280)]) == 2048


@pytest.mark.parametrize(("free", "tokens"), [(GIB // 100, CPU_TOKENS), (4000 * GIB, CUDA_LARGEST)])
def test_there_are_limits(cuda: SimpleNamespace, free: int, tokens: int) -> None:
    cuda.free = free
    assert token_budget(Model("cuda"), [row(280)]) == tokens


@pytest.mark.parametrize(
    ("error", "yes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_what_means_out_of_memory(error: RuntimeError, yes: bool) -> None:
    assert is_out_of_memory(error) is yes


def test_an_allocation_that_fails_on_this_cpu_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def cost(cut: list[list[int]], pass_tokens: int) -> int:
    return sum(pass_tokens + len(part) * max(part) for part in cut)


def every_cut(lengths: list[int], budget: int) -> list[list[list[int]]]:
    """All ways to cut the sorted lengths, by brute force."""
    if not lengths:
        return [[]]
    firsts = [n for n in range(1, len(lengths) + 1) if n == 1 or n * lengths[0] <= budget]
    return [[lengths[:n], *rest] for n in firsts for rest in every_cut(lengths[n:], budget)]


@pytest.mark.parametrize("pass_tokens", [0, 64, 1000])
@pytest.mark.parametrize("budget", [1, 120, 330, 10_000])
def test_rows_are_cut_in_the_cheapest_way(budget: int, pass_tokens: int) -> None:
    lengths = [106, 105, 105, 60, 42, 42, 41, 12, 3]
    cut = [[item.row.num_tokens for item in part] for part in passes([row(n) for n in lengths], budget, pass_tokens)]
    assert [n for part in cut for n in part] == lengths
    assert cost(cut, pass_tokens) == min(cost(other, pass_tokens) for other in every_cut(lengths, budget))


def test_a_short_row_does_not_fill_up_a_pass_of_long_ones() -> None:
    cut = passes([row(100)] * 3 + [row(20)] * 6, 1000, pass_tokens=64)
    assert [len(part) for part in cut] == [3, 6]  # 300 + 120 + 2 * 64 tokens against 900 + 64
