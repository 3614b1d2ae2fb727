"""A relation that the server learns: attention over the clients' adapters.

Shapes: G nodes, F features of a node, M modalities, S numbers of a sketch, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from fedmllm.algorithms.relations import LearnedRelation, Mixing, Profile, combined
from fedmllm.algorithms.server_optimizers import FedAdam
from fedmllm.core.rng import torch_stream
from fedmllm.core.types import ClientUpdate, Params, State

if TYPE_CHECKING:
    from torch import Tensor

    from fedmllm.algorithms.relations import Matrix

SLOPE = 0.2  # of LeakyReLU below 0, as in graph attention networks
TAU = 1e-6  # added to Adam's denominator: gradients are far below 1, and their size should not count


class GraphAttention(LearnedRelation):
    """A node for each client, mixed by attention that is trained on public rows (after pFedGAT, arXiv:2503.05474).

    h_i = the shares of modality profile i and a fixed random sketch of client i's last delta (LoRA's B, length 1). With
    b_ij = n_j if client j trained in this round, otherwise 0, but b_ii = keep n_i,

        s_ij = a . LeakyReLU(W h_i + V h_j);  R_ij = mean over heads of b_ij exp(s_ij) / sum_k b_ik exp(s_ik)

    In each round the server trains W, V and a by Adam on the mean, over the clients that trained, of the loss of row i's
    mixture on the public rows, masked as the client's own are. Its slope along R_ij is <gradient, theta_j>: one backward pass
    of the adapter a client. a starts at 0: without training each round is FedAvg's. `static` attention is that of the paper,
    LeakyReLU(a . [W h_i, W h_j]), which ranks the clients alike for everyone (arXiv:2105.14491). W, V and the sketch are drawn
    once, the same for each seed of an experiment.

    The server needs single deltas, the profiles, the public rows and a model to train.
    """

    personal: ClassVar[bool] = True

    name: Literal["graph-attention"] = "graph-attention"
    heads: PositiveInt = 4
    """Heads, whose weights are averaged."""
    width: PositiveInt = 8
    """Channels of a head."""
    sketch: NonNegativeInt = 16
    """Numbers that a delta is projected on; 0 = profiles alone."""
    steps: NonNegativeInt = 1
    """Training steps a round, each of one pass over the public rows for each client that trained."""
    lr: NonNegativeFloat = 0.1
    """Learning rate of Adam without bias correction: steps of a weight of up to twice this."""
    keep: NonNegativeFloat = 0.0
    """Factor of the own adapter's prior weight for a client that did not train in a round."""
    static: bool = False
    """Attention of the paper, which ranks clients alike for everyone."""

    def nodes(self, profiles: Sequence[Profile]) -> list[int]:
        return list(range(len(profiles)))

    def mix(self, profiles: Sequence[Profile], deltas: Sequence[Params | None]) -> Matrix:
        known = [i for i, delta in enumerate(deltas) if delta is not None and profiles[i].num_rows]
        if not known:
            return np.eye(len(profiles))
        start = self.start(profiles)["weights"]
        weights: Matrix = self._attention(start, self._features(profiles, deltas), self._prior(profiles, known)).numpy()
        return weights

    def start(self, profiles: Sequence[Profile]) -> State:
        import torch

        num_features = len(profiles[0].shares) + self.sketch
        draw = torch_stream(0, "graph-attention")
        shape = (self.heads, self.width, num_features)
        into, out = (torch.randn(shape, generator=draw, dtype=torch.float64) / num_features**0.5 for _ in range(2))
        halves = {"query": torch.zeros(self.heads, self.width, dtype=torch.float64)} if self.static else {"V": out}
        weights = {"W": into, "a": torch.zeros(self.heads, self.width, dtype=torch.float64), **halves}
        measured = {
            "public_loss": torch.zeros(self.steps, dtype=torch.float64),
            "own_weight": torch.zeros((), dtype=torch.float64),
        }
        return {"weights": weights, "measured": measured, **self._adam().init(weights)}

    def train(self, mixing: Mixing, learned: State) -> tuple[State, Matrix]:
        import torch

        weights, moments = learned["weights"], {key: learned[key] for key in ("m", "v")}
        features_GF = self._features(mixing.profiles, mixing.deltas)
        prior_GG = self._prior(mixing.profiles, mixing.moved)
        losses: list[float] = []
        for _ in range(self.steps):
            leaves = {name: t.detach().clone().requires_grad_() for name, t in weights.items()}
            mixed_GG = self._attention(leaves, features_GF, prior_GG)
            slopes_GG = torch.zeros_like(mixed_GG)
            total = 0.0
            for i in mixing.moved:
                row = mixed_GG[i].detach().numpy()
                adapter = combined(mixing.adapters, row)
                loss, gradient = mixing.public_loss(i, adapter)
                total += loss
                for j in np.nonzero(row)[0].tolist():  # less the mixture: a constant of a row has no slope, but digits
                    slopes_GG[i, j] = _slope(gradient, mixing.adapters[j], adapter)
            losses.append(total / len(mixing.moved))
            if not self.lr:
                continue
            (mixed_GG * slopes_GG).sum().div(len(mixing.moved)).backward()  # type: ignore[no-untyped-call]
            descent = {name: -t.grad for name, t in leaves.items() if t.grad is not None}
            weights, moments = self._adam().apply(weights, moments, mixing.at, [ClientUpdate(0, descent, 1, {})])
        final_GG = self._attention(weights, features_GF, prior_GG)
        measured = {
            "public_loss": torch.tensor(losses, dtype=torch.float64),
            "own_weight": final_GG.diagonal()[list(mixing.moved)].mean(),
        }
        return {"weights": weights, "measured": measured, **moments}, final_GG.numpy()

    def _adam(self) -> FedAdam:
        return FedAdam(lr=self.lr or 1.0, tau=TAU)

    def _prior(self, profiles: Sequence[Profile], moved: Sequence[int]) -> Tensor:
        """b [G, G]: rows of the clients that trained, and the diagonal."""
        import torch

        rows_G = torch.tensor([p.num_rows for p in profiles], dtype=torch.float64)
        moved_G = torch.zeros(len(profiles), dtype=torch.float64)
        moved_G[list(moved)] = 1.0
        return (rows_G * moved_G).repeat(len(profiles), 1) + torch.diag(self.keep * rows_G * (1 - moved_G))

    def _features(self, profiles: Sequence[Profile], deltas: Sequence[Params | None]) -> Tensor:
        """h [G, F]."""
        import torch

        shares_GM = torch.tensor([p.shares for p in profiles], dtype=torch.float64)
        sketch_GS = torch.zeros(len(profiles), self.sketch, dtype=torch.float64)
        known = {i: delta for i, delta in enumerate(deltas) if delta is not None}
        names = sorted(name for name in next(iter(known.values()), {}) if "lora_B" in name)
        if not (names and self.sketch):
            return torch.cat([shares_GM, sketch_GS], 1)
        squares_G = torch.zeros(len(profiles), dtype=torch.float64)
        for name in names:  # a count sketch: each number is added to one place with a random sign
            size = next(iter(known.values()))[name].numel()
            draw = torch_stream(0, "sketch", name)
            places = torch.randint(self.sketch, (size,), generator=draw)
            signs = torch.randint(2, (size,), generator=draw) * 2 - 1
            for i, delta in known.items():
                values = delta[name].double().flatten()
                sketch_GS[i].index_add_(0, places, values * signs)
                squares_G[i] += values.square().sum()
        lengths_G = squares_G.sqrt().where(squares_G > 0, torch.ones_like(squares_G))
        return torch.cat([shares_GM, sketch_GS / lengths_G[:, None]], 1)

    def _attention(self, weights: Params, features_GF: Tensor, prior_GG: Tensor) -> Tensor:
        """R [G, G]."""
        import torch
        from torch.nn.functional import leaky_relu

        into_HGD = torch.einsum("gf,hdf->hgd", features_GF, weights["W"])
        if self.static:
            query_HG, key_HG = (torch.einsum("hgd,hd->hg", into_HGD, weights[n]) for n in ("query", "a"))
            scores_HGG = leaky_relu(query_HG[:, :, None] + key_HG[:, None], SLOPE)
        else:
            out_HGD = torch.einsum("gf,hdf->hgd", features_GF, weights["V"])
            pairs_HGGD = leaky_relu(into_HGD[:, :, None] + out_HGD[:, None], SLOPE)
            scores_HGG = torch.einsum("hijd,hd->hij", pairs_HGGD, weights["a"])
        largest_HG1 = scores_HGG.masked_fill(prior_GG == 0, -torch.inf).amax(2, keepdim=True).detach()
        shares_HGG = prior_GG * (scores_HGG - largest_HG1).clamp(max=0).exp()
        return (shares_HGG / shares_HGG.sum(2, keepdim=True)).mean(0)


def _slope(gradient: Params, adapter: Params, mixed: Params) -> float:
    """<g, theta_j - mixture>."""
    parts = (g.double() * (adapter[name].double() - mixed[name].double()) for name, g in gradient.items())
    return float(sum(part.sum() for part in parts))
