"""FFA-LoRA, RoLoRA, FedSA-LoRA: only one factor trains or travels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from fedmllm.algorithms.base import WithServer
from fedmllm.algorithms.lowrank import A, B, names_of
from fedmllm.core.tensors import mean_delta
from fedmllm.core.types import ClientUpdate, Params, Round, Sent, State


class Sharing(WithServer):
    """The tensors that travel are averaged, weighted by rows, and `server` applies their mean delta.

    With one factor the same everywhere, the mean of the other is exact: sum p_k B_k A = (sum p_k B_k) A.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"partial"})
    weighted_by: ClassVar[Literal["", "rows", "clients"]] = "rows"

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        return self.step(params, state, at, mean_delta(updates))


class FfaLora(Sharing):
    """A stays at its seeded initial value everywhere; B trains and travels (FFA-LoRA, arXiv:2403.12313)."""

    name: Literal["ffa-lora"] = "ffa-lora"
    of_the_mean: ClassVar[bool] = True
    warm_start: ClassVar[bool] = False

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        fixed = names_of(params, A)
        return Sent(params, trains=frozenset(params) - fixed, known=fixed)


class RoLora(Sharing):
    """B trains in odd rounds, A in even ones; the other factor rests (RoLoRA, arXiv:2502.01755).

    B comes first: while B = 0, A has no gradient. Both factors travel to the clients, the trained one back.
    """

    name: Literal["rolora"] = "rolora"
    of_the_mean: ClassVar[bool] = True

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        return Sent(params, trains=frozenset(params) - names_of(params, A if at.number % 2 else B))


class FedSaLora(Sharing):
    """Both factors train, A is averaged, and each client keeps its own B (FedSA-LoRA, arXiv:2410.01463).

    A client's model is (A, B_k); there is no global model, since the server never sees a B.
    """

    name: Literal["fedsa-lora"] = "fedsa-lora"
    needs: ClassVar[frozenset[str]] = frozenset({"partial", "client-state"})
    global_model: ClassVar[bool] = False

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        return Sent(params, keeps=names_of(params, B))

    def personal(self, params: Params, state: State, client: int, kept: Params) -> Params:
        return {name: kept.get(name, t) for name, t in params.items()}
