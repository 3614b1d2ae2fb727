"""Faults that are planted in a privacy mechanism, which an audit has to catch."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from fedmllm.algorithms.privacy.client_dp import ClientDp, NoisyMean
from fedmllm.algorithms.privacy.noise import NOISE_KEY_BYTES, simulation_key
from fedmllm.algorithms.privacy.row_dp import RowDp, RowNoise
from fedmllm.config.experiment import Experiment
from fedmllm.core.types import ClientUpdate, Params, State

FAULTS = {
    "client-dp": ("", "noise / 10", "weights by rows", "noise from the public seed"),
    "row-dp": ("", "noise / 10", "noise from the public seed"),
}
USUAL_ROWS = 10  # of a client that counts once in a mean by rows


class WeightedByRows(NoisyMean):
    """The fault: a clipped update counts as often as it has rows."""

    def __call__(
        self, updates: Iterable[ClientUpdate], round_: int, like: Params, state: State
    ) -> tuple[ClientUpdate, State, dict[str, Any]]:
        clip, total = self.clip(state), {name: t.double() * 0 for name, t in like.items()}
        for update in updates:
            norm = float(sum(t.double().square().sum() for t in update.delta.values())) ** 0.5
            weight = update.num_examples / USUAL_ROWS * min(1.0, clip / max(norm, 1e-30))
            total = {name: t + weight * update.delta[name] for name, t in total.items()}
        noise, own, entry = super().__call__([], round_, like, state)
        delta = {name: (t + total[name] / self._size).to(t.dtype) for name, t in noise.delta.items()}
        return ClientUpdate(0, delta, 1, {}), own, entry


def planted(experiment: Experiment, fault: str) -> NoisyMean | RowNoise:
    """The experiment's mechanism with a fault, one of `FAULTS`; "" = as it should be."""
    settings = experiment.privacy
    assert isinstance(settings, ClientDp | RowDp)
    if fault == "noise / 10":
        settings = settings.model_copy(update={"noise_multiplier": settings.noise_multiplier / 10})
    public = fault == "noise from the public seed"
    key = simulation_key(experiment.seed) if public else secrets.token_bytes(NOISE_KEY_BYTES)
    if isinstance(settings, RowDp):
        # Simulated noise does not depend on the sum, as a fault that draws from the public seed would not.
        return RowNoise(settings.model_copy(update={"simulate_noise": public}), key, experiment.run_id())
    kind = WeightedByRows if fault == "weights by rows" else NoisyMean
    return kind(settings, experiment.cohort_size, key)
