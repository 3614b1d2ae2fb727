"""Token budget of a pass on a device, and out-of-memory errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedmllm.backbones.base import Backbone
from fedmllm.federation.engines.stacked.packing import Item

CPU_TOKENS = 1024  # half as many hold half the memory and are up to a third slower (results/stacked.md)
CUDA_LARGEST = 65536
SHARE = 0.7  # of the free memory: other lengths need other workspaces


def token_budget(backbone: Backbone, rows: Sequence[Item]) -> int:
    """Tokens of one pass: a constant on the CPU, where caches decide; on CUDA as many as fit by a trial pass.

    Not a timing on purpose: a budget that varied with the machine's load would vary the last bits of a run's results. A
    power of two, so that small differences in free memory do not matter.
    """
    if torch.device(backbone.device).type != "cuda":
        return CPU_TOKENS
    trial = max(rows, key=lambda item: item.row.num_tokens)
    torch.cuda.synchronize(backbone.device)
    torch.cuda.reset_peak_memory_stats(backbone.device)
    before = torch.cuda.memory_allocated(backbone.device)
    nll_B, _ = backbone.loss(backbone.collate([trial.row]), [trial.dropout_seed])
    torch.autograd.grad(nll_B.sum(), list(backbone.trainable().values()), allow_unused=True)
    used = torch.cuda.max_memory_allocated(backbone.device) - before
    release(backbone.device)
    free, total = torch.cuda.mem_get_info(backbone.device)
    allowed = torch.cuda.get_per_process_memory_fraction(backbone.device) * total
    free = int(min(free, allowed - torch.cuda.memory_allocated(backbone.device)))
    fit = int(SHARE * free / max(1, used) * trial.row.num_tokens)
    return min(CUDA_LARGEST, max(CPU_TOKENS, 1 << (fit.bit_length() - 1)))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch could not allocate, on the GPU or on the CPU (which has no exception class of its own)."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release(device: Any) -> None:
    """Give cached blocks back, so that a smaller pass finds them whole."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
