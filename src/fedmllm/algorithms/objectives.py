"""Objectives: terms added to the task loss of a client."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, model_validator

from fedmllm.core.spec import Named

Fraction = Annotated[float, Field(ge=0, lt=0.5)]


@dataclass(frozen=True)
class ClientView:
    """Facts about a client and its model that an algorithm may use."""

    missing_rate: float  # share of the client's (row, modality) slots that are hidden, 0..1
    num_layers: int  # of the language model
    layer_of: Callable[[str], int | None]  # LoRA tensor name -> layer, 0-based


class Objective(Named):
    """Task loss + sum_i mu_i / 2 * ||w_i - w_i(global)||^2 over the LoRA tensors i.

    A quadratic term around the start of the round is all that the objectives need; mu per tensor instead of a loss lets an
    engine add its gradient, mu (w - w_global), to many clients in one operation.
    """

    @abstractmethod
    def prox_mu(self, tensor: str, client: ClientView) -> float:
        """mu of one LoRA tensor; 0 = no proximal term.

        Args:
            tensor: Saved name of the LoRA tensor.
            client: The client and the model.

        Returns:
            The weight mu >= 0 of mu / 2 * ||w - w(global)||^2.
        """


class TaskLoss(Objective):
    """The task loss alone."""

    name: Literal["task"] = "task"

    def prox_mu(self, tensor: str, client: ClientView) -> float:
        return 0.0


class FedProx(Objective):
    """The same proximal weight for every tensor (Li et al., arXiv:1812.06127, Eq. 2)."""

    name: Literal["fedprox"] = "fedprox"
    mu: NonNegativeFloat = 0.01
    """Proximal weight of every tensor."""

    def prox_mu(self, tensor: str, client: ClientView) -> float:
        return self.mu


class AdaptiveFedProx(Objective):
    """FedProx on a band of middle layers, stronger for clients that miss more (after FedMLLM, arXiv:2411.14717).

    Published: the term is on layers s <= l <= L-1-s with s = 4 of L = 28, at the constant weight 0.1. The band is given
    here as a fraction of depth, so that it fits any model. Not published is the weighting by client: it grows linearly from
    `mu_min`, for a client with complete rows, to `mu_max`, for one without any modality left. The published
    constant is mu_min = mu_max = 0.1.
    """

    name: Literal["fedprox-adaptive"] = "fedprox-adaptive"
    mu_min: NonNegativeFloat = 0.01
    """Proximal weight of a client with complete rows."""
    mu_max: NonNegativeFloat = 0.1
    """Proximal weight of a client without any modality."""
    skip: Fraction = 4 / 28
    """Share of the layers without the term at either end."""

    @model_validator(mode="after")
    def _ordered(self) -> AdaptiveFedProx:
        if self.mu_min > self.mu_max:
            raise ValueError(f"mu_min = {self.mu_min} must not exceed mu_max = {self.mu_max}")
        return self

    def prox_mu(self, tensor: str, client: ClientView) -> float:
        layer = client.layer_of(tensor)
        skipped = round(self.skip * client.num_layers)
        if layer is None or not skipped <= layer <= client.num_layers - 1 - skipped:
            return 0.0
        return self.mu_min + (self.mu_max - self.mu_min) * client.missing_rate
