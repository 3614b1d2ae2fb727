"""DP-SGD on a client's own rows (Abadi et al., arXiv:1607.00133).

Shapes: S rows of a pass, T numbers that train.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat

from fedmllm.algorithms.privacy.accounting import CLOSED_FORM, gaussian_epsilon
from fedmllm.algorithms.privacy.base import Privacy, noise_label
from fedmllm.algorithms.privacy.guarantee import SIMULATED, Guarantee
from fedmllm.algorithms.privacy.noise import keyed_normals
from fedmllm.core.spec import ADDED_LATER

if TYPE_CHECKING:
    from torch import Tensor

_GRID = 2.0**-20  # step of the grid to which a noisy sum is rounded, over the noise's standard deviation
_OUTSIDE = (
    "the number of rows and steps of each client",
    "whether and when a client responded",
    "which modalities a client has",
)
_OUTSIDE_HERE = ("the tokens and seconds of each client",)  # which a site keeps to itself


class RowDp(Privacy):
    """Each client clips the gradient of every row, or group of rows, and adds noise to their sum, before an optimizer step.

    DP-SGD (Abadi et al., arXiv:1607.00133) on a client's own rows. Nothing that a client computes from the noisy gradients
    needs more noise: AdamW, weight decay, the proximal term, the aggregation. It holds against the server, too, if each
    client is a site with its own key.
    """

    name: Literal["row-dp"] = "row-dp"
    noise_multiplier: NonNegativeFloat
    """Standard deviation of the noise over the clip; 0 = clipping alone, which is not private."""
    clip: Annotated[float, Field(gt=0, strict=True)]
    """Largest norm of one unit's gradient, over all tensors that train; a longer one is scaled down."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Delta of the guarantee; below 1 / number of units."""
    unit: Annotated[Literal["row", "group"], ADDED_LATER] = "row"
    """What is clipped and protected: each row, or all rows with one value in the column `data.group`, such as a patient's. A
    step then takes batch_size x accumulation groups, with all their rows."""
    simulate_noise: bool = False
    """Draw the noise from the public seed: runs are reproducible and not private."""

    def label(self) -> str:
        label = noise_label(self.name, self.noise_multiplier, self.simulate_noise)
        return label if self.unit == "row" else f"{label} per group"

    def unit_of(self, column: str) -> str:
        """Name of what is protected: "row", or "group 'patient'"; "group" where each site has its own column."""
        if self.unit == "row":
            return "row"
        return f"group {column!r}" if column else "group"

    def guarantee(
        self, num_visits: int, at_sites: bool = False, outside: tuple[str, ...] = (), column: str = ""
    ) -> Guarantee:
        """Return the guarantee after a number of visits to each row, or group.

        It is in one step of each epoch, so its visits are epochs x rounds of its client, whatever the order.
        The order is public: sampling does not help.

        Args:
            num_visits: Noisy steps that contain a row (a group) of the most frequent client.
            at_sites: Whether the clients are real sites that add noise from keys of their own.
            outside: What leaves without noise, in addition to `_OUTSIDE`.
            column: Of the groups; "" = each site has its own.

        Returns:
            The statement.
        """
        who = "the server and whoever sees updates or adapters"
        return Guarantee(
            mechanism=self.name,
            unit=self.unit_of(column),
            relation=f"a {self.unit}'s gradients replaced by zeros",
            adversary=who if at_sites else f"{who}, but not the machine that runs all clients",
            epsilon=gaussian_epsilon(self.noise_multiplier, num_visits, self.delta),
            delta=self.delta,
            accountant=CLOSED_FORM,
            noise_multiplier=self.noise_multiplier,
            clip=self.clip,
            denominator=0.0,
            num_releases=num_visits,
            sampling=f"every {self.unit} once an epoch, in a public order",
            sampling_is_secret=False,
            noise=SIMULATED if self.simulate_noise else "keyed",
            outside=(*_OUTSIDE, *(() if at_sites else _OUTSIDE_HERE), *outside),
        )


class RowNoise:
    """Adds noise to the sum of a step's clipped gradients.

    Secret noise depends on the sum and on its own size as well as on run, round, client and step: a server that asks for the
    same round twice with another adapter, noise multiplier or clip receives independent noise, so the difference of two replies
    is noise as well.

    Args:
        settings: Clip and noise.
        key: 32 secret bytes; `simulation_key` for simulated noise.
        run_id: Of the experiment.
        column: Of the groups, with unit "group".
    """

    def __init__(self, settings: RowDp, key: bytes, run_id: str, column: str = "") -> None:
        self.settings, self._key, self._run_id = settings, key, run_id
        self.group = column if settings.unit == "group" else ""
        self._sums: dict[tuple[int, int, int], bytes] = {}  # (round, client, step) -> digest of the sum

    def noisy(self, sum_T: Tensor, client: int, round_: int, step: int) -> Tensor:
        """The sum with noise, rounded to a grid much finer than the noise.

        Args:
            sum_T: Sum of the clipped gradients.
            client: Whose rows.
            round_: Number of the round.
            step: Number of the step in the round, from 0.

        Returns:
            A tensor of the same type and device.
        """
        import torch

        std = self.settings.noise_multiplier * self.settings.clip
        if not std:
            return sum_T
        values = sum_T.detach().cpu().contiguous()
        purpose: tuple[str | int | bytes, ...] = ("row-dp", self._run_id, round_, client, step, repr(std))
        if not self.settings.simulate_noise:
            digest = hashlib.sha256(values.numpy().tobytes()).digest()
            self._sums[round_, client, step] = digest
            purpose = (*purpose, digest)
        step_size = std * _GRID
        noise = keyed_normals(self._key, len(values), *purpose)
        noisy = np.rint(values.double().numpy() / step_size + noise / _GRID) * step_size
        return torch.from_numpy(noisy).to(sum_T.device, sum_T.dtype)

    def tag(self, round_: int) -> str:
        """Tag of the secret noise of a round: equal if all sums were, and then the noise was, too. The sums are dropped."""
        keys = sorted(key for key in self._sums if key[0] == round_)
        content = b"".join(repr(key).encode() + self._sums.pop(key) for key in keys)
        return hmac.digest(self._key, b"tag of a round" + content, "sha256").hex()


def clip_factors(grads_ST: Tensor, clip: float) -> Tensor:
    """min(1, C / norm) of each row or group; 0 for one whose gradient is not finite.

    Args:
        grads_ST: A gradient per row or group.
        clip: C.

    Returns:
        [S]
    """
    import torch

    norms_S = torch.linalg.vector_norm(grads_ST, dim=1)
    factors_S = (clip / norms_S.clamp_min(1e-30)).clamp_max(1.0)
    return torch.where(norms_S.isfinite(), factors_S, torch.zeros_like(factors_S))
