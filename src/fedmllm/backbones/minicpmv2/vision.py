"""Vision encoder and resampler of MiniCPM-V 2.6 and MiniCPM-Llama3-V 2.5.

Parameters have the hub's names.

Sources: the tower is SigLIP (arXiv:2303.15343) at its pictures' own resolution, as NaViT (arXiv:2307.06304) and Idefics2
have it; the resampler is the one of Qwen-VL (arXiv:2308.12966).

Shapes: S slices, C = 3 channels, P patch side, N patches of a slice (padded to one length), Q queries of the resampler,
V width of the vision tower, D width of the language model.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.idefics2.modeling_idefics2 import Idefics2Encoder

HEAD_WIDTH = 128  # of the resampler's attention, whatever the language model's own heads


def position_buckets(count: int, side: int) -> Tensor:
    """Return the positions [count], of a trained tower's `side`, that `count` patches in a row take: NaViT's fractions.

    The step is rounded to float32 before it is multiplied: with float64, or with i / count, other buckets come out for 25,
    49, 50, 55 and 58 patches at side 70, and the trained positions were used with these.
    """
    step = 1 / torch.tensor(count, dtype=torch.int32, device="cpu")
    fractions = torch.arange(0, 1 - 1e-6, step.item(), dtype=torch.float32, device="cpu")
    boundaries = torch.arange(1 / side, 1.0, 1 / side, dtype=torch.float32, device="cpu")
    return torch.bucketize(fractions, boundaries, right=True)


@cache
def grid_positions(rows: int, columns: int, side: int) -> Tensor:
    """The position of each of rows x columns patches in a table of side x side: [rows * columns]."""
    return (position_buckets(rows, side)[:, None] * side + position_buckets(columns, side)).flatten()


class VisionEmbeddings(nn.Module):
    """Patches -> vectors plus the positions of a SigLIP trained on one square size."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.side = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, pixels_SCPX: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Pixels [S, C, P, N * P] and each slice's (rows, columns) of positions, N in all -> [S, N, V]."""
        patches_SNV = self.patch_embedding(pixels_SCPX.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        ids_SN = torch.stack([grid_positions(*grid, self.side) for grid in grids]).to(patches_SNV.device)
        out: Tensor = patches_SNV + self.position_embedding(ids_SN)
        return out


class VisionTower(nn.Module):
    """SigLIP without its pooling head. Slices come in groups of one length, so no attention mask is needed."""

    def __init__(self, config: Any, drop_last_layer: bool) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = Idefics2Encoder(config)
        if drop_last_layer:
            self.encoder.layers = self.encoder.layers[:-1]
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels_SCPX: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """As `VisionEmbeddings`."""
        hidden_SNV = self.encoder(inputs_embeds=self.embeddings(pixels_SCPX, grids)).last_hidden_state
        out: Tensor = self.post_layernorm(hidden_SNV)
        return out


def axis_positions(count: int, width: int, device: torch.device) -> Tensor:
    """[count, width] float32: the sines, then the cosines, of 0..count-1 at width / 2 frequencies (arXiv:1706.03762)."""
    exponents = torch.arange(width // 2, dtype=torch.float32, device=device) / (width / 2)
    angles = torch.arange(count, dtype=torch.float32, device=device)[:, None] * (1.0 / 10000**exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class CrossAttention(nn.Module):
    """Multi-head attention with the parameter names of `nn.MultiheadAttention`, for separate keys and values.

    Ours because `out_proj` is called as a module here, so that a quantized or LoRA layer may take its place.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query_QD: Tensor, key_SND: Tensor, value_SND: Tensor, real_SN: Tensor | None) -> Tensor:
        """-> [S, Q, D]; keys where `real_SN` is False are not seen; None = all are."""

        def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # [S, length, D] -> [S, heads, length, width]
            return F.linear(x, weight, bias).reshape(*x.shape[:2], -1, HEAD_WIDTH).transpose(1, 2)

        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        inputs = (query_QD[None], key_SND, value_SND)
        query, key, value = (project(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        query = query.expand(len(key), -1, -1, -1)
        mask = None if real_SN is None else real_SN[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Resampler(nn.Module):
    """Learned queries look once at a slice's patches: any number of patches becomes `query_num` vectors."""

    def __init__(self, num_queries: int, width: int, vision_width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_queries, width))
        self.kv_proj = nn.Linear(vision_width, width, bias=False) if vision_width != width else nn.Identity()
        self.attn = CrossAttention(width)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(width, eps=1e-6)
        self.ln_post = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(self, patches_SNV: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Patches and each slice's true (height, width) -> [S, Q, D]. What lies behind height * width is padding."""
        values_SND = self.ln_kv(self.kv_proj(patches_SNV))
        device, width = values_SND.device, values_SND.shape[-1]
        # Computed at every call: transformers 5 builds models on the meta device, where a buffer that is not saved is lost.
        table = axis_positions(max(max(size) for size in sizes), width // 2, device)
        index_N = torch.arange(values_SND.shape[1], device=device)
        heights, widths = torch.tensor(sizes, device=device).T[:, :, None]
        padded = any(height * width < len(index_N) for height, width in sizes)
        real_SN = index_N < heights * widths if padded else None
        rows, columns = (index_N // widths).clamp(max=len(table) - 1), index_N % widths
        positions_SND = torch.cat([table[columns], table[rows]], dim=-1).to(values_SND.dtype)
        mixed_SQD = self.attn(self.ln_q(self.query), values_SND + positions_SND, values_SND, real_SN)
        out: Tensor = self.ln_post(mixed_SQD) @ self.proj
        return out
