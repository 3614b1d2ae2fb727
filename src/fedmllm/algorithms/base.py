"""Interface of a federated algorithm: server half and client half."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, SerializeAsAny, field_validator

from fedmllm.algorithms.objectives import ClientView
from fedmllm.core.errors import ConfigError
from fedmllm.core.spec import ADDED_LATER, Named
from fedmllm.core.tensors import same_names
from fedmllm.core.types import ClientUpdate, LocalRule, Outcome, Params, Round, Sent, State

Beta = Annotated[float, Field(ge=0, lt=1)]


class Aggregator(Named):
    """A federated algorithm. Every default is that of FedAvg, so a member defines what differs, usually `apply` alone.

    The server calls `sends`, then `apply`, then `result`; a client calls `begin` before its first step and `finish` after
    its last one. All are pure functions of their arguments. The conformance tests hold every member to that.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Capabilities that an engine must have (`config.engine.Capability`); checked when an experiment is parsed."""
    optimizes: ClassVar[bool] = False
    """True if `apply` depends on the mean of the deltas alone, tensor by tensor: it can be another member's `server`."""

    of_the_mean: ClassVar[bool] = False
    """True if all that `apply` uses of a round is the clients' mean delta, nothing that they keep or return in addition, and
    `sends` is the same for all: one private mean can take the clients' place (`privacy`)."""

    weighted_by: ClassVar[Literal["", "rows", "clients"]] = ""
    """Weights of the mean of the deltas, if `apply` depends on the updates through it alone; "" if it needs each update.
    Secure aggregation, where the server has only the sum, requires one. `update.num_clients` counts the clients in it."""

    mixed_ranks: ClassVar[bool] = False
    """True if clients may have unequal ranks (`lora.ranks`)."""
    no_server: ClassVar[str] = "has no combined delta that a server optimizer could apply"
    """Why the algorithm takes no `server`, after its name; for the error message if one is given."""

    trusted: ClassVar[tuple[str, ...]] = ("of_the_mean", "weighted_by")
    """Flags that privacy and secure aggregation rely on. A plug-in states them itself: they are not inherited, since a class
    that changes a method of a shipped one may break what its base promises."""
    global_model: ClassVar[bool] = True
    """False if only the clients' own models (`personal`) are evaluated."""

    warm_start: ClassVar[bool] = True
    """False if the algorithm needs a new adapter, so that `backbone.adapter` is refused."""
    grows: ClassVar[bool] = False
    """True if the rank of `result` grows with the rounds."""
    one_round: ClassVar[bool] = False
    """True if the federation has one round."""
    lora_init: ClassVar[str] = "kaiming"
    """The value of `backbone.lora.init` that the algorithm starts from."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if cls.plugin:
            for flag in cls.trusted:
                if flag not in vars(cls):
                    setattr(cls, flag, getattr(Aggregator, flag))

    @classmethod
    def pick(cls, table: object, place: str) -> Self:
        """Return the member that a table describes.

        Args:
            table: A table with `name`, or the bare name.
            place: Beginning of each line of an error message.

        Returns:
            The member.

        Raises:
            ConfigError: A key or value is not allowed; of a `server` that has no meaning it says why.
        """
        if isinstance(table, Mapping) and "server" in table:
            member = cast("type[Aggregator] | None", cls.members.get(str(table.get("name"))))
            if member and "server" not in member.model_fields:
                able = ", ".join(sorted(name for name, one in cls.members.items() if "server" in one.model_fields))
                why = "is a server optimizer itself" if member.optimizes else member.no_server
                raise ConfigError(
                    f"{place}.server: unknown key: {member.model_fields['name'].default} {why}; leave server out. "
                    f"Aggregators with a server: {able}"
                )
        return super().pick(table, place)

    @classmethod
    def unstated(cls, flag: str) -> str:
        """Say that a plug-in does not state a flag that one of its bases has.

        Args:
            flag: One of `trusted`.

        Returns:
            The end of an error message; "" if no base has the flag.
        """
        if not any(vars(base).get(flag) for base in cls.__mro__):
            return ""
        return f". A plug-in does not inherit {flag}: {cls.__name__} has to state it if it holds"

    def least_updates(self) -> int:
        """Least number of updates for which the formula is defined.

        Returns:
            A number of clients, at least 1.
        """
        return 1

    def not_over_sites(self) -> str:
        """Say why real sites would refuse what these settings send.

        Returns:
            Key, value, reason and what works, after "aggregator."; "" = they do not.
        """
        return ""

    def label(self) -> str:
        """The name in tables.

        Returns:
            The TOML name, with that of the nested server optimizer if there is one.
        """
        return self.name

    def init(self, params: Params) -> State:
        """The server's state before the first round.

        Args:
            params: The adapter before any training.

        Returns:
            Named sets of tensors; {} if the algorithm has no state.
        """
        return {}

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        """Return the tensors that `client` receives in this round, and those that it trains and keeps.

        Args:
            params: The global adapter before the round.
            state: The server's state before the round.
            at: The round.
            client: One of `at.cohort`.

        Returns:
            The adapter to start from, what trains, and the tensors sent in addition.
        """
        return Sent(params)

    def returned_extra(self, sent: Sent) -> Params:
        """Names and shapes of the tensors that `finish` returns to the server; {} = none.

        Args:
            sent: As `sends` made it.

        Returns:
            Tensors whose values are not read.
        """
        return {}

    @abstractmethod
    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        """Aggregate one round.

        Args:
            params: The global adapter before the round.
            state: The server's state before the round.
            at: The round.
            updates: In ascending client order, possibly a stream: it is read once.

        Returns:
            The global adapter and the server's state after the round.

        Raises:
            NothingToAverage: no update has a row; the adapter then stays as it is.
            FedmllmError: the order, the names or the shapes are wrong.
        """

    def result(self, params: Params, state: State) -> Params:
        """The global model as one adapter, of any rank: evaluated, saved and exported.

        Args:
            params: The global adapter.
            state: The server's state.

        Returns:
            LoRA tensors under PEFT's saved names.
        """
        return params

    def measured(self, state: State) -> dict[str, Any]:
        """Numbers that `apply` took on the server, for the record of the round.

        Args:
            state: The server's state after the round.

        Returns:
            Fields of the event `round`.
        """
        return {}

    def personal(self, params: Params, state: State, client: int, kept: Params) -> Params | None:
        """A client's own model as one adapter; None if the algorithm has a global model only.

        Args:
            params: The global adapter.
            state: The server's state.
            client: Whose model.
            kept: The client's own state, {} if it has none.

        Returns:
            LoRA tensors under PEFT's saved names, or None.
        """
        return None

    def begin(self, at: Round, view: ClientView, sent: Sent, kept: Params) -> LocalRule:
        """The client half, before the first local step.

        Args:
            at: The round.
            view: The client and the model.
            sent: As `sends` made it.
            kept: What the client kept in its last round that counted; {} if there is none.

        Returns:
            What each local optimizer step adds to the gradients.
        """
        return LocalRule()

    def finish(self, at: Round, view: ClientView, outcome: Outcome, kept: Params) -> tuple[Params, Params]:
        """The client half, after the last local step.

        Args:
            at: The round.
            view: The client and the model.
            outcome: What training came to.
            kept: As in `begin`.

        Returns:
            Tensors that travel to the server in addition to the delta (`ClientUpdate.extra`), and tensors that the client
            keeps until its next round. {} of the latter leaves what it kept before.
        """
        return {}, {}


class WithServer(Aggregator):
    """An aggregator whose combined delta a server optimizer applies: `server = { name = "fedadam", lr = 1e-2 }`."""

    server: Annotated[SerializeAsAny[Aggregator] | None, ADDED_LATER] = None
    """Optimizer that applies the combined delta; without it the delta is added. One of the server optimizers."""

    @field_validator("server", mode="before")
    @classmethod
    def _pick(cls, table: Any) -> Any:
        if table is None:
            return None
        server = Aggregator.pick(table, "aggregator.server")
        if not server.optimizes:
            members = ((name, cast("type[Aggregator]", member)) for name, member in Aggregator.members.items())
            allowed = ", ".join(sorted(name for name, member in members if member.optimizes))
            raise ConfigError(
                f"aggregator.server.name: got {server.name!r}, which needs more than one combined delta; allowed: {allowed}"
            )
        return server

    def label(self) -> str:
        return f"{self.name}+{self.server.name}" if self.server else self.name

    def init(self, params: Params) -> State:
        inner = self.server.init(params) if self.server else {}
        return {f"server.{key}": tree for key, tree in inner.items()}

    def step(self, params: Params, state: State, at: Round, delta: Params, lr: float = 1.0) -> tuple[Params, State]:
        """Move the tensors named in `delta`; the others keep their value and their optimizer state.

        Args:
            params: The global adapter.
            state: Of this aggregator; the optimizer's part has keys that begin with "server.".
            at: The round.
            delta: The combined delta, of some or all tensors of `params`.
            lr: Factor of the delta if there is no `server`.

        Raises:
            FedmllmError: `delta` has a name or a shape that `params` does not have.
        """
        if self.server is None:
            return added(params, delta, lr), state
        mine = {k.removeprefix("server."): tree for k, tree in state.items() if k.startswith("server.")}
        merged, moved = dict(mine), dict(params)
        # A tree made in the first round lacks the factor that rested then: for that factor the first round is now.
        groups: dict[frozenset[str], Params] = {}
        for name, tensor in _moving(params, delta).items():
            groups.setdefault(frozenset(k for k, tree in mine.items() if name in tree), {})[name] = tensor
        for keys, moving in groups.items():
            inner = {k: {n: mine[k][n] for n in moving} for k in sorted(keys)}
            whole = ClientUpdate(0, {n: delta[n] for n in moving}, 1, {})
            after, trees = self.server.apply(moving, inner, at, [whole])
            moved |= after
            merged |= {k: {**merged.get(k, {}), **tree} for k, tree in trees.items()}
        return moved, {**state, **{f"server.{k}": tree for k, tree in merged.items()}}


def added(params: Params, delta: Params, lr: float = 1.0) -> Params:
    """`params` + lr * `delta` for the tensors named in `delta`.

    Raises:
        FedmllmError: `delta` has a name or a shape that `params` does not have.
    """
    moving = _moving(params, delta)
    return {n: w + lr * delta[n] if n in moving else w for n, w in params.items()}


def _moving(params: Params, delta: Params) -> Params:
    moving = {n: w for n, w in params.items() if n in delta}
    same_names(moving, delta)
    return moving
