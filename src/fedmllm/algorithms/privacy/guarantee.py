"""Statement of what a privacy mechanism guarantees."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

SIMULATED: Literal["simulated: not private"] = "simulated: not private"


@dataclass(frozen=True)
class Guarantee:
    """Everything that a privacy claim has to name; without these, an epsilon means nothing.

    Attributes:
        mechanism: Name of the member of `[privacy]`.
        unit: Whose presence is hidden.
        relation: How two neighbouring federations differ.
        adversary: Against whom it holds.
        epsilon: Infinity without noise.
        delta: Probability that epsilon is exceeded, about.
        accountant: What computed epsilon, with its version.
        noise_multiplier: z, standard deviation of the noise over the sensitivity.
        clip: Largest norm of a contribution, or its schedule.
        denominator: Of the mean; fixed before the run.
        num_releases: Noisy releases that count for a unit.
        sampling: How units are drawn.
        sampling_is_secret: Whether epsilon counts that the draw is secret.
        noise: "keyed", or `SIMULATED`.
        outside: What leaves without noise.
    """

    mechanism: str
    unit: str
    relation: str
    adversary: str
    epsilon: float
    delta: float
    accountant: str
    noise_multiplier: float
    clip: float | str
    denominator: float
    num_releases: int
    sampling: str
    sampling_is_secret: bool
    noise: Literal["keyed", "simulated: not private"]
    outside: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """True if anything is guaranteed at all."""
        return self.noise == "keyed" and math.isfinite(self.epsilon)

    def claim(self) -> str:
        """One line for tables."""
        numbers = f"epsilon {self.epsilon:.4g} at delta {self.delta:g} per {self.unit}"
        if self.noise == SIMULATED:
            return f"{SIMULATED} (with secret noise: {numbers})" if math.isfinite(self.epsilon) else SIMULATED
        return numbers if self.holds else "not private: no noise"

    def to_json(self) -> dict[str, Any]:
        """The statement as JSON; epsilon is null unless the guarantee holds.

        Returns:
            The fields, `claim`, and `simulated_epsilon` if the noise was simulated.
        """
        table = {**asdict(self), "outside": list(self.outside), "claim": self.claim()}
        if not self.holds:
            table["epsilon"] = None
            if self.noise == SIMULATED and math.isfinite(self.epsilon):
                table["simulated_epsilon"] = self.epsilon
        return table
