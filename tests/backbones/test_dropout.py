"""Dropout masks as numbers: reproducible, fair and independent."""

from __future__ import annotations

import hashlib

import pytest
import torch

from fedmllm.backbones.dropout import RowDropout, Seeds, dropout_mask, module_key, seed_tensor

GOLDEN = "271ec1fcae04a5a9023e120a846f3d4428986c2dcb4362d9a5beab4d0840d02f"
SEEDS = seed_tensor([3, 2**63 - 1, 3], torch.device("cpu"))


def test_a_mask_is_these_bytes_on_every_machine() -> None:
    """Golden: a change of the hash is a change of results and needs a new name. `pytest -m gpu` compares CUDA's."""
    mask = dropout_mask(SEEDS, module_key("model.layers.0.q_proj"), (3, 5, 17), 0.3)
    assert hashlib.sha256(mask.numpy().tobytes()).hexdigest() == GOLDEN


def test_a_mask_depends_on_seed_module_position_and_channel() -> None:
    mask = dropout_mask(SEEDS, 1, (3, 64, 64), 0.5)
    assert torch.equal(mask[0], mask[2])  # the same seed
    for other in (mask[1], dropout_mask(SEEDS, 2, (3, 64, 64), 0.5)[0], mask[0].roll(1, 0), mask[0].roll(1, 1)):
        agree = (mask[0] == other).float().mean()
        assert 0.45 < float(agree) < 0.55  # as two coins do; 4,096 of them lie within 0.5 +- 0.03


def test_a_mask_does_not_see_the_padding_behind_it() -> None:
    wide = dropout_mask(SEEDS, 1, (3, 50, 20), 0.5)
    assert torch.equal(dropout_mask(SEEDS[1:2], 1, (1, 30, 20), 0.5)[0], wide[1, :30])
    assert torch.equal(dropout_mask(SEEDS, 1, (3, 50, 7), 0.5), wide[:, :, :7])


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p(p: float) -> None:
    mask = dropout_mask(seed_tensor(range(8), torch.device("cpu")), 5, (8, 256, 512), p)
    dropped = 1 - mask.float()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(float(dropped.mean()) - p) <= 4 * sigma / 2**10 + 2**-17  # 2^20 draws, p in steps of 2^-16
    for dim in ((1, 2), (0, 2), (0, 1)):  # over rows, positions, channels: no row, column or channel is favoured
        count = dropped.numel() / dropped.sum(dim).numel()
        assert float((dropped.mean(dim) - p).abs().max()) <= 6 * sigma / count**0.5 + 2**-17


def test_neighbours_are_not_correlated() -> None:
    kept = dropout_mask(SEEDS[:1], 9, (1, 512, 512), 0.5)[0].double() * 2 - 1
    for shift in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0)):
        moved = kept.roll(shift, (0, 1))
        assert abs(float((kept * moved).mean())) < 5 / 512  # five standard deviations


def test_off_without_seeds_and_scaled_with_them() -> None:
    seeds, x = Seeds(), torch.ones(3, 40, 16)
    layer = RowDropout(0.25, 7, seeds).train()
    assert layer(x) is x
    with seeds.set(SEEDS):
        assert layer(x).unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert layer(x) is x
