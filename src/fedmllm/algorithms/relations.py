"""Relations between clients: several global adapters that are mixed after each round.

Shapes: N clients, G nodes, M modalities.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
from pydantic import Field, NonNegativeFloat, SerializeAsAny

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.objectives import ClientView
from fedmllm.core.errors import FedmllmError, NothingToAverage
from fedmllm.core.spec import Named
from fedmllm.core.tensors import subtract, zeros
from fedmllm.core.types import ClientUpdate, LocalRule, Modality, Outcome, Params, Round, Sent, Shard, State, Visible

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]

Share = Annotated[float, Field(ge=0, le=1)]
PublicLoss: TypeAlias = Callable[[int, Params], tuple[float, Params]]
"""(node, adapter) -> mean loss on the public rows as the node's clients see theirs, and its gradient."""


@dataclass(frozen=True)
class Profile:
    """Summary of a client for a relation: all that leaves the client for it.

    Attributes:
        num_rows: Number of its rows.
        shares: Share of its rows in which each modality is visible [M].
        visible: Modalities that are visible in at least one row.
    """

    num_rows: int
    shares: tuple[float, ...]
    visible: Visible


def profile_of(shard: Shard, modalities: Sequence[Modality]) -> Profile:
    """Profile of a client.

    Args:
        shard: Its rows and masks.
        modalities: Of the data set.

    Returns:
        Rows, shares and visible modalities.
    """
    rows = len(shard.rows)
    shares = tuple(sum(m in v for v in shard.visible) / rows if rows else 0.0 for m in modalities)
    return Profile(rows, shares, frozenset[Modality]().union(*shard.visible))


class Relation(Named):
    """A graph over groups of clients. Each node has an adapter of its own; after each round W <- R W."""

    personal: ClassVar[bool] = False
    """True if each client is a node, and the clients' own adapters are evaluated."""
    learns: ClassVar[bool] = False
    """True if `mix` depends on the clients' deltas, which the server then sees one by one."""
    needs_public: ClassVar[bool] = False
    """True if the server measures adapters on the public rows."""

    def label(self) -> str:
        """The name in tables: with the settings that differ from their defaults.

        Returns:
            A name such as "profile" or "profile(rho=1.0)".
        """
        changed = {k: v for k, v in self.model_dump(mode="json", exclude_defaults=True).items() if k != "name"}
        return f"{self.name}({','.join(f'{k}={v}' for k, v in changed.items())})" if changed else self.name

    @abstractmethod
    def nodes(self, profiles: Sequence[Profile]) -> list[int]:
        """Assign clients to nodes.

        Args:
            profiles: Of all clients, in order.

        Returns:
            For each client the number of its node, from 0, without gaps.
        """

    @abstractmethod
    def mix(self, profiles: Sequence[Profile], deltas: Sequence[Params | None]) -> Matrix:
        """Weights of the mixing.

        Args:
            profiles: Of each node: the sum of the rows, and the mean shares, of its clients.
            deltas: The latest delta of each node if `learns`, or None if there is none.

        Returns:
            R [G, G]; no entry is negative, and rows add up to 1.
        """


@dataclass(frozen=True, eq=False)
class Mixing:
    """A round before its adapters are mixed.

    Attributes:
        at: The round.
        profiles: Of each node.
        deltas: The latest delta of each node; None if there is none.
        adapters: Of each node, after the aggregator's step.
        moved: The nodes that took a step in this round, ascending.
        public_loss: Measures an adapter with the server's model.
    """

    at: Round
    profiles: Sequence[Profile]
    deltas: Sequence[Params | None]
    adapters: Sequence[Params]
    moved: Sequence[int]
    public_loss: PublicLoss


class LearnedRelation(Relation):
    """A relation that the server trains in each round, by the loss on labelled public rows."""

    learns: ClassVar[bool] = True
    needs_public: ClassVar[bool] = True

    @abstractmethod
    def start(self, profiles: Sequence[Profile]) -> State:
        """Return what is learned, before the first round.

        Args:
            profiles: Of each node.

        Returns:
            Named sets of tensors, whose names and shapes do not change. The numbers of the set "measured", if there is one,
            go into the record of each round.
        """

    @abstractmethod
    def train(self, mixing: Mixing, learned: State) -> tuple[State, Matrix]:
        """Learn from a round; pure.

        Args:
            mixing: The round.
            learned: What `start` or the round before returned.

        Returns:
            What is learned now, and R [G, G] as of `mix`.
        """


class One(Relation):
    """One global adapter for all clients."""

    name: Literal["one"] = "one"

    def nodes(self, profiles: Sequence[Profile]) -> list[int]:
        return [0] * len(profiles)

    def mix(self, profiles: Sequence[Profile], deltas: Sequence[Params | None]) -> Matrix:
        return np.ones((1, 1))


class ByProfile(Relation):
    """A node for each set of visible modalities, mixed by how much they have in common (after SFL, arXiv:2203.00829).

    With a_gm the share of node g's rows in which modality m is visible and n_g its rows,

        A_gh = max(floor, sum_m min(a_gm, a_hm) / sum_m max(a_gm, a_hm)),  A_gg = 1
        S_gh = n_h A_gh / sqrt(sum_j A_gj sum_j A_hj), rows normalized;  R = (1 - rho) I + rho S

    rho = 0: separate federations. rho = 1 and floor = 1: one model, weighted by rows. Without a floor, clients that share no
    modality would never mix.
    """

    name: Literal["profile"] = "profile"
    rho: Share = 0.5
    """Share of a node's adapter that comes from the graph in each round."""
    floor: Share = 0.3
    """Least affinity of two nodes."""

    def nodes(self, profiles: Sequence[Profile]) -> list[int]:
        patterns = sorted({tuple(sorted(p.visible)) for p in profiles if p.num_rows})
        number = {pattern: i for i, pattern in enumerate(patterns)}
        return [number.get(tuple(sorted(p.visible)), 0) for p in profiles]  # a client without rows is never asked

    def mix(self, profiles: Sequence[Profile], deltas: Sequence[Params | None]) -> Matrix:
        shares_GM = np.array([p.shares for p in profiles], dtype=np.float64)
        least = np.minimum(shares_GM[:, None], shares_GM[None]).sum(-1)
        most = np.maximum(shares_GM[:, None], shares_GM[None]).sum(-1)
        affinity_GG = np.maximum(np.divide(least, most, out=np.zeros_like(least), where=most > 0), self.floor)
        np.fill_diagonal(affinity_GG, 1.0)
        degree_G = affinity_GG.sum(1)
        rows_G = np.array([p.num_rows for p in profiles], dtype=np.float64)
        graph_GG = affinity_GG / np.sqrt(degree_G[:, None] * degree_G[None]) * rows_G[None]
        graph_GG /= graph_GG.sum(1, keepdims=True)
        mixed: Matrix = (1 - self.rho) * np.eye(len(profiles)) + self.rho * graph_GG
        return mixed


class Similarity(Relation):
    """A node for each client, mixed by the cosine of their deltas (pFedGraph, ICML 2023, without its client term).

    With d_ij = 1 - cos(Delta_i, Delta_j) on LoRA's B alone (A's random start would dominate) and p_j = n_j / n, row i of R is

        argmin over the simplex of sum_j (w_j - p_j)^2 + alpha sum_j w_j d_ij = projection of p - alpha / 2 d_i

    alpha = 0 is FedAvg. A client that has not been asked follows p; one whose delta is not known yet is left out of the
    others' rows. The server needs single deltas.
    """

    personal: ClassVar[bool] = True
    learns: ClassVar[bool] = True

    name: Literal["similarity"] = "similarity"
    alpha: NonNegativeFloat = 0.8
    """Weight of dissimilarity."""

    def nodes(self, profiles: Sequence[Profile]) -> list[int]:
        return list(range(len(profiles)))

    def mix(self, profiles: Sequence[Profile], deltas: Sequence[Params | None]) -> Matrix:
        known = [i for i, delta in enumerate(deltas) if delta is not None]
        mixed: Matrix = np.eye(len(profiles))
        if not known:
            return mixed
        rows = np.array([profiles[i].num_rows for i in known], dtype=np.float64)
        prior = rows / rows.sum()
        vectors = np.stack([_direction(delta) for delta in deltas if delta is not None])
        distance = 1 - np.clip(vectors @ vectors.T, -1, 1)
        np.fill_diagonal(distance, 0.0)
        mixed[:] = 0.0
        mixed[:, known] = prior
        for place, i in enumerate(known):
            mixed[i, known] = projected(prior - self.alpha / 2 * distance[place])
        return mixed


def _direction(delta: Params) -> Matrix:
    """The B factors as one vector of length 1; zeros if they did not move."""
    parts = [t.double().numpy().ravel() for name, t in sorted(delta.items()) if "lora_B" in name]
    vector: Matrix = np.concatenate(parts) if parts else np.zeros(1)
    length = float(np.linalg.norm(vector))
    unit: Matrix = vector / length if length else vector
    return unit


def projected(values: Matrix) -> Matrix:
    """Project a vector onto the simplex, exactly, by sorting (Duchi et al., ICML 2008).

    Args:
        values: [N].

    Returns:
        The nearest vector without a negative entry that adds up to 1.
    """
    descending = np.sort(values)[::-1]
    excess = np.cumsum(descending) - 1
    count = int(np.nonzero(descending * np.arange(1, len(values) + 1) > excess)[0][-1]) + 1
    nearest = np.maximum(values - excess[count - 1] / count, 0.0)
    scaled: Matrix = nearest / nearest.sum()  # up to rounding it is already
    return scaled


class Related(Aggregator):
    """An aggregator on each node of a graph, and the mixing. Not a member: a run makes it of `[aggregator]` and `[relation]`.

    The global adapter is the mean of the nodes' weighted by rows. With one node it is that node's, to the bit.
    """

    name: str
    inner: SerializeAsAny[Aggregator]
    """Aggregator of each node, with a state of its own."""
    relation: SerializeAsAny[Relation]
    """The graph."""
    profiles: tuple[Profile, ...]
    """Of all clients."""
    public_loss: Callable[..., Any] | None = None
    """A `PublicLoss`, for a relation that needs it; the server's alone."""

    def node_of(self) -> list[int]:
        """The node of each client.

        Returns:
            Numbers from 0.
        """
        return self.relation.nodes(self.profiles)

    def node_profiles(self) -> list[Profile]:
        """The nodes' profiles: sums of rows, and shares weighted by rows.

        Returns:
            One per node.
        """
        of = self.node_of()
        made = []
        for node in range(max(of) + 1):
            members = [p for p, n in zip(self.profiles, of, strict=True) if n == node and p.num_rows]
            rows = sum(p.num_rows for p in members)
            shares = tuple(
                sum(p.num_rows * p.shares[m] for p in members) / rows if rows else 0.0
                for m in range(len(self.profiles[0].shares))
            )
            made.append(Profile(rows, shares, frozenset[Modality]().union(*(p.visible for p in members))))
        return made

    def adapter(self, params: Params, state: State, node: int) -> Params:
        """The adapter of a node.

        Args:
            params: The global adapter.
            state: Of this aggregator.
            node: Its number.

        Returns:
            LoRA tensors.
        """
        return state.get(f"node{node}/adapter", params)

    def for_visible(self, params: Params, state: State, visible: Visible) -> Params:
        """The adapter for rows in which exactly these modalities are visible.

        Args:
            params: The global adapter.
            state: Of this aggregator.
            visible: Modalities of a test row.

        Returns:
            That of the node with these modalities; the global adapter if there is none.
        """
        profiles = self.node_profiles()
        node = next((i for i, p in enumerate(profiles) if p.visible == visible), None)
        return params if node is None or self.relation.personal else self.adapter(params, state, node)

    def init(self, params: Params) -> State:
        state: State = {}
        for node in range(len(self.node_profiles())):
            state |= {f"node{node}/adapter": params}
            state |= {f"node{node}/{key}": tree for key, tree in self.inner.init(params).items()}
            if self.relation.learns:
                state |= {f"node{node}/delta": zeros(params)}  # zeros = not known yet
        if isinstance(self.relation, LearnedRelation):
            state |= {f"relation/{key}": tree for key, tree in self.relation.start(self.node_profiles()).items()}
        return state

    def _inner(self, state: State, node: int) -> State:
        prefix = f"node{node}/"
        own = {key.removeprefix(prefix): tree for key, tree in state.items() if key.startswith(prefix)}
        return {key: tree for key, tree in own.items() if key not in ("adapter", "delta")}

    def _at(self, at: Round, node: int) -> Round:
        of = self.node_of()
        members = sum(1 for k, n in enumerate(of) if n == node and self.profiles[k].num_rows)
        return replace(at, cohort=tuple(k for k in at.cohort if of[k] == node), num_clients=members)

    def sends(self, params: Params, state: State, at: Round, client: int) -> Sent:
        node = self.node_of()[client]
        return self.inner.sends(self.adapter(params, state, node), self._inner(state, node), self._at(at, node), client)

    def apply(self, params: Params, state: State, at: Round, updates: Iterable[ClientUpdate]) -> tuple[Params, State]:
        of, profiles = self.node_of(), self.node_profiles()
        received: dict[int, list[ClientUpdate]] = {}
        for update in updates:
            received.setdefault(of[update.client], []).append(update)
        new, moved = dict(state), list[int]()
        for node, own in sorted(received.items()):
            before = self.adapter(params, state, node)
            try:
                after, inner = self.inner.apply(before, self._inner(state, node), self._at(at, node), own)
            except NothingToAverage:
                continue
            moved.append(node)
            new |= {f"node{node}/adapter": after, **{f"node{node}/{key}": tree for key, tree in inner.items()}}
            if self.relation.learns:
                new[f"node{node}/delta"] = subtract(after, before)
        if not moved:
            raise NothingToAverage("nothing to average: no client trained on any row this round")
        if len(profiles) == 1:
            return new["node0/adapter"], new
        deltas = [_known(new.get(f"node{node}/delta")) for node in range(len(profiles))]
        adapters = [new[f"node{node}/adapter"] for node in range(len(profiles))]
        if isinstance(self.relation, LearnedRelation):
            if self.public_loss is None:
                raise FedmllmError(f"relation {self.relation.name!r} learns from public rows, and none are at hand")
            learned = {k.removeprefix("relation/"): tree for k, tree in state.items() if k.startswith("relation/")}
            mixing = Mixing(at, profiles, deltas, adapters, moved, self.public_loss)
            learned, weights_GG = self.relation.train(mixing, learned)
            new |= {f"relation/{key}": tree for key, tree in learned.items()}
        else:
            weights_GG = self.relation.mix(profiles, deltas)
        mixed = [combined(adapters, weights) for weights in weights_GG]
        new |= {f"node{node}/adapter": adapter for node, adapter in enumerate(mixed)}
        rows = np.array([p.num_rows for p in profiles], dtype=np.float64)
        return combined(mixed, rows / rows.sum()), new

    def measured(self, state: State) -> dict[str, Any]:
        numbers = {name: t.tolist() for name, t in state.get("relation/measured", {}).items() if t.numel()}
        return {"relation": numbers} if numbers and max(self.node_of()) else {}

    def begin(self, at: Round, view: ClientView, sent: Sent, kept: Params) -> LocalRule:
        return self.inner.begin(at, view, sent, kept)

    def finish(self, at: Round, view: ClientView, outcome: Outcome, kept: Params) -> tuple[Params, Params]:
        return self.inner.finish(at, view, outcome, kept)

    def personal(self, params: Params, state: State, client: int, kept: Params) -> Params | None:
        return self.adapter(params, state, self.node_of()[client])


def _known(delta: Params | None) -> Params | None:
    """None for a delta that is all zeros: it was not seen."""
    return delta if delta is not None and any(bool(t.any()) for t in delta.values()) else None


def combined(adapters: Sequence[Params], weights: Matrix) -> Params:
    """The weighted sum of adapters, in float64; a weight of 1 gives the adapter itself.

    Args:
        adapters: With equal names and shapes.
        weights: One for each.

    Returns:
        An adapter in the types of the first one.
    """
    used = [(float(w), a) for w, a in zip(weights, adapters, strict=True) if w]
    if len(used) == 1 and used[0][0] == 1.0:
        return used[0][1]
    return {n: sum((w * a[n].double() for w, a in used[1:]), used[0][0] * used[0][1][n].double()).to(t.dtype)
            for n, t in adapters[0].items()}  # fmt: skip
