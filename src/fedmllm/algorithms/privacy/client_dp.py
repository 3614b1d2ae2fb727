"""DP-FedAvg: one noisy mean of clipped updates a round.

McMahan et al., arXiv:1710.06963; adaptive clip: Andrew et al., arXiv:1905.03871.

Shapes: P numbers of an update.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from fedmllm.algorithms.privacy.accounting import CLOSED_FORM, gaussian_epsilon, poisson_epsilon
from fedmllm.algorithms.privacy.base import Privacy, noise_label
from fedmllm.algorithms.privacy.guarantee import SIMULATED, Guarantee
from fedmllm.algorithms.privacy.noise import keyed_normals
from fedmllm.core.errors import FedmllmError
from fedmllm.core.types import ClientUpdate, Params, State

if TYPE_CHECKING:
    from torch import Tensor

CLIP_STATE = "privacy.clip"  # key of the state that holds the adaptive clip
_GRID = 2.0**-20  # step of the grid on which sum and noise are added, over the noise's standard deviation
_OUTSIDE = (
    "the server, which sees every update",
    "whether and when a client responded, with finite numbers",
    "training tokens, seconds and bytes of a run, and the digests of its rows",
)


class ClientDp(Privacy):
    """The server clips every client's update, adds noise to their sum, and hands that one mean to the aggregator.

    DP-FedAvg (McMahan et al., arXiv:1710.06963); adaptive clip: Andrew et al., arXiv:1905.03871. A client
    that fails counts as an update of zeros; the denominator is `cohort_size`, whoever responds.
    """

    name: Literal["client-dp"] = "client-dp"
    central: ClassVar[bool] = True
    noise_multiplier: NonNegativeFloat
    """Standard deviation of the noise over the clip; 0 = clipping alone, which is not private."""
    clip: Annotated[float, Field(gt=0, strict=True)] | Literal["adaptive"]
    """Largest norm of an update, over all its tensors; a longer one is scaled down. "adaptive" follows a quantile of
    the norms."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Delta of the guarantee; below 1 / number of clients."""
    initial_clip: PositiveFloat = 0.1
    """First value of an adaptive clip."""
    clip_quantile: float = Field(0.5, gt=0, lt=1)
    """Share of the updates that an adaptive clip leaves as they are."""
    clip_lr: PositiveFloat = 0.2
    """Step of an adaptive clip, in its logarithm."""
    simulate_noise: bool = False
    """Draw the noise and the cohorts from the public seed: runs are reproducible and not private."""

    @model_validator(mode="after")
    def _adaptive_settings_have_an_effect(self) -> ClientDp:
        fields = type(self).model_fields
        odd = [key for key in ("clip_lr", "clip_quantile", "initial_clip") if getattr(self, key) != fields[key].default]
        if self.clip != "adaptive" and odd:
            raise ValueError(f'{odd[0]} has no effect with clip = {self.clip:g}; set clip = "adaptive"')
        return self

    def label(self) -> str:
        return noise_label(self.name, self.noise_multiplier, self.simulate_noise)

    def init(self) -> State:
        import torch

        if self.clip != "adaptive":
            return {}
        return {CLIP_STATE: {"clip": torch.tensor([self.initial_clip], dtype=torch.float64)}}

    def noise_of_sum(self, size: int) -> float:
        """z_D, the noise multiplier of the sum of updates.

        An adaptive clip releases a noisy count, too; the pair is one Gaussian release with multiplier z if
        z_D = (z^-2 - (2 sigma_b)^-2)^(-1/2) (arXiv:1905.03871, Thm. 1), sigma_b the noise of the count.

        Args:
            size: Clients of a round.

        Returns:
            A multiplier, at least `noise_multiplier`.

        Raises:
            ValueError: The cohort is too small for an adaptive clip.
        """
        z = self.noise_multiplier
        if self.clip != "adaptive" or not z:
            return z
        sigma = count_noise(size)
        if 2 * sigma <= z:
            raise ValueError(
                f'clip: "adaptive" needs a cohort of over {10 * z:g} clients at noise_multiplier {z:g}; cohort_size is '
                f"{size}; allowed: a number, or a larger cohort"
            )
        return float((z**-2 - (2 * sigma) ** -2) ** -0.5)

    def guarantee(
        self,
        size: int,
        num_clients: int,
        releases: Sequence[int],
        poisson: bool,
        outside: tuple[str, ...] = (),
        count_draw: bool = True,
    ) -> Guarantee:
        """Return the guarantee after a number of releases.

        Args:
            size: Clients of a round (on average, if `poisson`).
            num_clients: That can be drawn.
            releases: Of each round that contains the most frequent client; of each round if `poisson`.
            poisson: Whether the cohorts are a secret Poisson draw.
            outside: What leaves without noise, in addition to `_OUTSIDE`.
            count_draw: Whether epsilon counts the secrecy of a Poisson draw, which takes a second. Otherwise it is larger.

        Returns:
            The statement.
        """
        z, rate = self.noise_multiplier, size / num_clients
        if poisson and count_draw:
            epsilon, accountant = poisson_epsilon(z, releases, self.delta, rate)
        else:
            epsilon, accountant = gaussian_epsilon(z, sum(releases), self.delta), CLOSED_FORM
        secret = poisson and accountant.startswith("PLD")
        return Guarantee(
            mechanism=self.name,
            unit="client",
            relation="a client's updates replaced by zeros",
            adversary="whoever sees every round's adapter" + (" but not the cohorts" if secret else " and the cohorts"),
            epsilon=epsilon,
            delta=self.delta,
            accountant=accountant,
            noise_multiplier=z,
            clip=self.clip,
            denominator=float(size),
            num_releases=sum(releases),
            sampling=f"Poisson, rate {rate:.4g}" if poisson else f"{size} of {num_clients} clients by the public seed",
            sampling_is_secret=secret,
            noise=SIMULATED if self.simulate_noise else "keyed",
            outside=(*_OUTSIDE, *outside),
        )


def count_noise(size: int) -> float:
    """sigma_b of an adaptive clip: a twentieth of the cohort (arXiv:1905.03871, section 3.1)."""
    return size / 20


class NoisyMean:
    """Makes one noisy pseudo-update of a round's updates.

    Noise depends on the key, the round, its own size, and the digest of the clipped sum. So the same round computed again,
    after a stop, has the same bytes, and a round that is repeated with other updates or other noise has independent noise:
    two noisy sums with equal noise would give their difference away.

    Args:
        settings: Clip and noise.
        size: Clients of a round: the fixed denominator.
        key: 32 secret bytes; `simulation_key` for simulated noise.
        released: Called as (round, tag) before a release leaves; equal tags are equal releases.
    """

    def __init__(
        self, settings: ClientDp, size: int, key: bytes, released: Callable[[int, str], None] | None = None
    ) -> None:
        self._settings, self._size, self._key, self._released = settings, size, key, released
        self._noise_of_sum = settings.noise_of_sum(size)

    def clip(self, state: State) -> float:
        """The clip of the next round."""
        fixed = self._settings.clip
        return float(state[CLIP_STATE]["clip"]) if fixed == "adaptive" else fixed

    def __call__(
        self, updates: Iterable[ClientUpdate], round_: int, like: Params, state: State
    ) -> tuple[ClientUpdate, State, dict[str, Any]]:
        """Clip, sum, add noise and divide.

        Args:
            updates: In ascending client order; those of failed clients are left out. Read once.
            round_: Number of the round.
            like: The tensors that a client returns; their values are not read.
            state: The server's, with the part that `ClientDp.init` or the round before left.

        Returns:
            One update of client 0 with one row, this mechanism's part of the next state, and what the record may hold of it.

        Raises:
            FedmllmError: The order, the names or the shapes are wrong.
        """
        z, clip = self._settings.noise_multiplier, self.clip(state)
        std = self._noise_of_sum * clip
        total_P, num_unclipped = clipped_sum(updates, like, clip, std * _GRID)
        sigma = count_noise(self._size)
        content = total_P.tobytes() + np.array([num_unclipped, std, sigma], np.float64).tobytes()
        digest = hashlib.sha256(content).digest()
        if self._released:
            self._released(round_, hmac.digest(self._key, round_.to_bytes(8, "big") + digest, "sha256").hex())
        if std:
            step = std * _GRID
            noise_P = keyed_normals(self._key, len(total_P), "client-dp", round_, digest)
            total_P = (total_P + np.rint(noise_P / _GRID)) * step
        own: State = {}
        entry = {"clip": clip, "noise_std": std / self._size}
        if self._settings.clip == "adaptive":
            count = num_unclipped
            if z:
                # The count is a whole number of halves, so of steps, too: no low bit of the sum separates the two.
                step = 2.0 ** math.floor(math.log2(sigma * _GRID))
                noise = sigma * float(keyed_normals(self._key, 1, "count", round_, digest)[0])
                count += step * round(noise / step)
            own = self._next(clip, count)
        return ClientUpdate(0, _tree(total_P / self._size, like), 1, {}), own, entry

    def _next(self, clip: float, count: float) -> State:
        import torch

        s = self._settings
        # A failed client counts as an unclipped update of zeros would: b - 1/2 = 0 for it, so `count` is centred.
        share = count / self._size + 0.5
        step = max(-50.0, min(50.0, -s.clip_lr * (share - s.clip_quantile)))
        return {CLIP_STATE: {"clip": torch.tensor([clip * math.exp(step)], dtype=torch.float64)}}


def clipped_sum(
    updates: Iterable[ClientUpdate], like: Params, clip: float, step: float = 0.0
) -> tuple[NDArray[np.float64], float]:
    """Sum of the updates, each scaled down to norm `clip`, and the centred number of those that were not.

    Args:
        updates: In ascending client order. An update with NaN or Inf counts as zeros.
        like: Names, order and shapes.
        clip: C.
        step: If above 0, the sum is in units of it: each clipped update is rounded towards 0 to whole units first, which
            never makes it longer. Sums of whole numbers are exact, so no bit of the sum depends on rounding.

    Returns:
        float64 [P], and the sum over the updates of 1/2 if its norm is at most C, otherwise -1/2.

    Raises:
        FedmllmError: The order, the names or the shapes are wrong.
    """
    total_P = np.zeros(sum(t.numel() for t in like.values()))
    count, last = 0.0, -1
    for update in updates:
        if update.client <= last:
            raise FedmllmError(f"client {update.client} came after client {last}; updates must be in ascending order")
        last = update.client
        flat_P = _flat(update.delta, like)
        size = float(np.linalg.norm(flat_P))
        if not math.isfinite(size):
            continue
        count += 0.5 if size <= clip else -0.5
        if size > clip:
            flat_P *= clip / size
            # Rounding of the product may leave a norm of C (1 + 1e-16); the guarantee allows none.
            flat_P *= min(1.0, clip / max(float(np.linalg.norm(flat_P)), clip))
        total_P += np.trunc(flat_P / step) if step else flat_P
    return total_P, count


def _flat(delta: Params, like: Params) -> NDArray[np.float64]:
    if {n: t.shape for n, t in delta.items()} != {n: t.shape for n, t in like.items()}:
        raise FedmllmError(f"parameter names or shapes differ: {sorted(delta.keys() ^ like.keys())[:3]}")
    return np.concatenate([delta[n].detach().double().reshape(-1).numpy() for n in like] or [np.zeros(0)])


def _tree(flat_P: NDArray[np.float64], like: Params) -> Params:
    import torch

    flat: Tensor = torch.from_numpy(flat_P)
    out, begin = {}, 0
    for name, t in like.items():
        out[name] = flat[begin : begin + t.numel()].reshape(t.shape).to(t.dtype).clone()
        begin += t.numel()
    return out
