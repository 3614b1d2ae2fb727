"""On CUDA: the same numbers as on the CPU within what bfloat16 leaves, and the same dropout. `pytest -m gpu`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedmllm.backbones.base import FromFolder, Precision
from fedmllm.backbones.dropout import dropout_mask
from fedmllm.backbones.hf import TransformersBackbone, load_folder
from fedmllm.core.types import Conversation
from support.tiny_families import FAMILIES, PORTS, TWO_BILLION, stirred, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU checks were NOT run"),
]
FolderOf = Callable[[str], Path]


def load(folder: Path, device: str, base: str = "float32") -> TransformersBackbone:
    precision = Precision.model_validate({"base": base})
    return stirred(load_folder(FromFolder(path=str(folder), device=device, precision=precision), seed=0))


def loss_and_gradient(backbone: TransformersBackbone, prompts: list[Conversation]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [backbone.encode(prompt, "yes") for prompt in prompts]
    live = backbone.trainable()
    nll_B, _ = backbone.loss(backbone.collate(rows), dropout_seeds=range(len(rows)))
    gradients = torch.autograd.grad(nll_B.sum(), list(live.values()))
    return nll_B.detach().cpu().double(), torch.cat([g.flatten() for g in gradients]).cpu().double()


def test_dropout_masks_are_those_of_the_cpu() -> None:
    seeds = torch.tensor([0, 1, 2**62 + 12345], dtype=torch.int64)
    for p in (0.05, 0.5):
        here, there = (dropout_mask(seeds.to(d), 99, (3, 700, 129), p).cpu() for d in ("cpu", "cuda"))
        assert torch.equal(here, there)


@pytest.mark.parametrize("family", [*FAMILIES, *PORTS])
def test_float32_on_cuda_is_float32_on_the_cpu(folder_of: FolderOf, prompts: list[Conversation], family: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    (nll_B, grad), (other_B, other) = (loss_and_gradient(load(folder_of(family), d), prompts) for d in ("cpu", "cuda"))
    torch.testing.assert_close(other_B, nll_B, rtol=1e-4, atol=1e-4)
    assert float((other - grad).norm() / grad.norm()) < 1e-3
    scores = [load(folder_of(family), d).score(prompts, [("A", "no, never")] * 3) for d in ("cpu", "cuda")]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", ["minicpmv2.6", "qwen3_vl"])
def test_four_bits_train_on_cuda(folder_of: FolderOf, prompts: list[Conversation], family: str) -> None:
    pytest.importorskip("bitsandbytes")
    backbone = load(folder_of(family), "cuda", "nf4")
    backbone.score(prompts, [("A", "B")] * 3)
    nll_B, grad = loss_and_gradient(backbone, prompts)
    assert bool(nll_B.isfinite().all())
    assert float(grad.norm()) > 0


def test_two_billion_weights_train_in_bfloat16_as_on_the_cpu_in_float32(
    tmp_path: Path, prompts: list[Conversation], capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights in the shape of a 2 B-class model. Tolerance: 2 % of the loss, which is ln V on random weights."""
    folder = write("qwen2_vl", tmp_path / "two_billion", sizes=TWO_BILLION)
    reference = load(folder, "cpu")
    nll_B, _ = reference.loss(reference.collate([reference.encode(p, "yes") for p in prompts]))
    expected = nll_B.detach().double()
    del reference
    backbone = load(folder, "cuda", "bfloat16")
    rows = [backbone.encode(p, "yes") for p in prompts]
    first, _ = backbone.loss(backbone.collate(rows))
    torch.testing.assert_close(first.detach().cpu().double(), expected, rtol=0.02, atol=0.02)
    optimizer = torch.optim.AdamW(backbone.trainable().values(), lr=1e-3)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        nll_B, num_B = backbone.loss(backbone.collate(rows))
        (nll_B / num_B).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    with capsys.disabled():
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"\n2 B-class, bfloat16: {(time.perf_counter() - began) / 10:.3f} s a step, peak {peak:.1f} GiB")
    last, _ = backbone.loss(backbone.collate(rows))
    assert float(last.sum()) < 0.9 * float(first.sum())
