"""The family of privacy mechanisms."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedmllm.core.spec import Named
from fedmllm.core.types import State


class Privacy(Named):
    """What is clipped and noised before anyone sees it."""

    central: ClassVar[bool] = False
    """True if the server sees every update and releases one noisy mean of them."""

    def init(self) -> State:
        """The mechanism's part of the server's state before the first round.

        Returns:
            Named sets of tensors, under keys that begin with "privacy."; {} if it has no state.
        """
        return {}


class NoPrivacy(Privacy):
    """Updates are aggregated as they are: no differential privacy."""

    name: Literal["none"] = "none"
