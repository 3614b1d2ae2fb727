"""The family of privacy mechanisms."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedmllm.core.spec import Named
from fedmllm.core.types import State


class Privacy(Named):
    """Privacy mechanism: values that are clipped and noised before anyone sees them."""

    central: ClassVar[bool] = False
    """True if the server sees every update and releases one noisy mean of them."""

    def label(self) -> str:
        """The name in tables, so that results with and without noise are never in one cell.

        Returns:
            "" without privacy, otherwise the name with the noise multiplier.
        """
        return ""

    def init(self) -> State:
        """The mechanism's part of the server's state before the first round.

        Returns:
            Named sets of tensors, under keys that begin with "privacy."; {} if it has no state.
        """
        return {}


def noise_label(name: str, noise_multiplier: float, simulated: bool) -> str:
    """Name of a mechanism in tables: "row-dp z=1", "client-dp z=0.5 simulated"."""
    return f"{name} z={noise_multiplier:g}" + (" simulated" if simulated else "")


class NoPrivacy(Privacy):
    """Updates are aggregated as they are: no differential privacy."""

    name: Literal["none"] = "none"
