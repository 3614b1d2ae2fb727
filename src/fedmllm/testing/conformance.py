"""Conformance checks: rules that every member of a family keeps.

Each check raises AssertionError with the rule that is broken. Call it from a test of one's own:

    from fedmllm.testing import check_scenario

    def test_my_scenario():
        check_scenario(MyScenario(rate=0.3))
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.objectives import ClientView, Objective
from fedmllm.algorithms.relations import LearnedRelation, Mixing, Profile, Relation
from fedmllm.config.engine import Engine, InProcess
from fedmllm.core.errors import FedmllmError
from fedmllm.core.metrics import Metric
from fedmllm.core.spec import Named
from fedmllm.core.tensors import mean_delta, plain_mean_delta
from fedmllm.core.types import ClientUpdate, Example, Modality, Params, Prediction, Round, Sent, State
from fedmllm.data.prompts import Prompt
from fedmllm.federation.client import Clients
from fedmllm.scenarios.masks import Scenario
from fedmllm.testing.federation import COHORT, assert_same

SIDES = {"A": (2, 6), "B": (5, 2)}  # shapes of LoRA's two factors
ROWS = ((0, 3, 7, 2), (5,), (), (1, 4, 6, 8, 9))  # per client, the rows that it holds


def check_settings(member: Named) -> None:
    """Assert that a member survives the way through a file: `parse(dump(x)) == x`.

    Args:
        member: A member of any family.

    Raises:
        AssertionError: The settings do not round-trip, or the member is not registered under its name.
    """
    family = next(base for base in type(member).__mro__ if Named in base.__bases__)
    assert issubclass(family, Named)
    assert family.members.get(member.name) is type(member), (
        f"{family.family} {member.name!r}: another class has this name"
    )
    assert family.pick(member.dump(), family.family) == member, f"{member.name}: parse(dump(x)) is not x"
    assert family.pick(member.model_dump(mode="json"), family.family) == member, (
        f"{member.name}: settings do not round-trip"
    )


def check_scenario(scenario: Scenario, modalities: tuple[Modality, ...] = ("image", "text")) -> None:
    """Assert that a scenario is a pure function of rows and seed that only hides.

    Args:
        scenario: The scenario under test.
        modalities: Modalities of the rows.

    Raises:
        AssertionError: A mask is missing, names another modality, or differs between two calls.
    """
    check_settings(scenario)
    scenario.check(modalities, len(ROWS))
    masks = scenario.hide(ROWS, modalities, 0)
    assert [len(own) for own in masks] == [len(own) for own in ROWS], "hide() must give one mask per row of each client"
    odd = {m for own in masks for mask in own for m in mask} - set(modalities)
    assert not odd, f"hide() left modalities that the rows do not have: {sorted(odd)}"
    assert scenario.hide(ROWS, modalities, 0) == masks, "hide() gave other masks for the same rows and seed"


def check_aggregator(aggregator: Aggregator) -> None:
    """Assert that an aggregator is a pure function of a stream of updates in ascending client order.

    Args:
        aggregator: The aggregator under test.

    Raises:
        AssertionError: A rule is broken; the message names it.
    """
    check_settings(aggregator)
    shapes = {f"model.layers.{i}.q_proj.lora_{side}.weight": shape for i in (0, 1) for side, shape in SIDES.items()}
    noise = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}
    at = Round(1, 0, 5, tuple(range(6)), 10)
    updates = [_update(aggregator, start, at, client, noise) for client in range(6)]
    kept, state = _copy({"": start}), aggregator.init(start)
    before = _copy(state)
    params, after = aggregator.apply(start, state, at, iter(updates))
    again, _ = aggregator.apply(start, state, at, updates)
    assert params.keys() == start.keys(), "apply() must return every tensor, under its name"
    assert _equal({"": params}, {"": again}), "apply() gave other values for the same updates"
    assert _equal(kept, {"": start}), "apply() changed the adapter that it was given"
    assert _equal(before, state), "apply() changed the state that it was given"
    tensors = [tensor for tree in (params, *after.values()) for tensor in tree.values()]
    assert all(tensor.dtype == torch.float32 for tensor in tensors), "adapter and state must be float32"
    assert all(bool(tensor.isfinite().all()) for tensor in tensors), "adapter and state must be finite"
    empty = ClientUpdate(9, {name: torch.full_like(t, 7.0) for name, t in updates[0].delta.items()}, 0, {"loss": 0.0})
    with_empty, _ = aggregator.apply(start, state, at, [*updates, replace(empty, extra=updates[0].extra)])
    assert _equal({"": params}, {"": with_empty}), "a client without rows changed the result"
    if aggregator.weighted_by:
        mean = (mean_delta if aggregator.weighted_by == "rows" else plain_mean_delta)(updates)
        whole = replace(updates[0], delta=mean, num_examples=21, clients=at.cohort)
        of_mean, _ = aggregator.apply(start, state, at, [whole])
        assert all(torch.allclose(params[n], of_mean[n], rtol=1e-3, atol=1e-4) for n in params), (
            f"weighted_by is {aggregator.weighted_by!r}, but apply() gave another result for that mean of the updates"
        )
    if aggregator.of_the_mean:
        _check_of_the_mean(aggregator, start, state, at, updates)
    for bad, rule in ((reversed(updates), "updates in descending order"), ((), "a round without updates")):
        try:
            aggregator.apply(start, state, at, bad)
        except FedmllmError:
            continue
        raise AssertionError(f"apply() accepted {rule}; it must raise FedmllmError")


def _check_of_the_mean(
    aggregator: Aggregator, start: Params, state: State, at: Round, updates: Sequence[ClientUpdate]
) -> None:
    """Assert that one update can take the clients' place: their mean, whatever they report in addition."""
    one, other = (aggregator.sends(start, state, at, client) for client in (0, 1))
    assert one.trained() == other.trained(), "of_the_mean is true, but sends() has clients train different tensors"
    assert _equal({"": one.travelling()}, {"": other.travelling()}), (
        "of_the_mean is true, but sends() differs by client"
    )
    assert not aggregator.returned_extra(one), "of_the_mean is true, but clients return more than their delta"
    equal = [replace(update, num_examples=3, metrics={"loss": float(update.client)}) for update in updates]
    params, _ = aggregator.apply(start, state, at, equal)
    mean = ClientUpdate(0, plain_mean_delta(equal), 1, {})
    of_mean, _ = aggregator.apply(start, state, at, [mean])
    assert all(torch.allclose(params[n], of_mean[n], rtol=1e-3, atol=1e-4) for n in params), (
        "of_the_mean is true, but apply() gave another result for the mean of the updates"
    )


def _update(aggregator: Aggregator, start: Params, at: Round, client: int, noise: torch.Generator) -> ClientUpdate:
    sent = aggregator.sends(start, aggregator.init(start), at, client)
    delta = {n: 0.01 * torch.randn(t.shape, generator=noise) for n, t in sent.returned().items()}
    extra = {n: 0.01 * torch.randn(t.shape, generator=noise) for n, t in aggregator.returned_extra(sent).items()}
    return ClientUpdate(client, delta, client + 1, {"loss": 0.0}, extra)


def _copy(trees: Mapping[str, Params]) -> dict[str, Params]:
    return {key: {name: tensor.clone() for name, tensor in tree.items()} for key, tree in trees.items()}


def _equal(one: Mapping[str, Params], two: Mapping[str, Params]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k][n], two[k][n]) for k in one for n in one[k])


def check_relation(relation: Relation) -> None:
    """Assert that a relation assigns every client to a node, and that its weights are a pure mean of the nodes.

    Args:
        relation: The relation under test.

    Raises:
        AssertionError: A node is missing, or a row of the weights is not a mean.
    """
    check_settings(relation)
    seen = (("image",), ("text",), ("image", "text"), ("image", "text"), ())
    shares = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.4, 0.6), (0.0, 0.0))
    profiles = [Profile(10 * n, s, frozenset(v)) for n, s, v in zip((3, 2, 1, 5, 0), shares, seen, strict=True)]
    nodes = relation.nodes(profiles)
    assert len(nodes) == len(profiles), "nodes() must give one node per client"
    assert set(nodes) == set(range(max(nodes) + 1)), "nodes must be numbered from 0 without gaps"
    noise = torch.Generator().manual_seed(0)
    own = [profiles[nodes.index(node)] for node in range(max(nodes) + 1)]
    deltas: list[Params | None] = [{"q.lora_B.weight": torch.randn(4, generator=noise)} for _ in own]
    for known in (deltas, [None] * len(own)) if relation.learns else (deltas,):
        weights = relation.mix(own, known)
        assert weights.shape == (len(own), len(own)), "mix() must give one weight for each pair of nodes"
        assert (weights >= 0).all(), "mix() gave a negative weight"
        assert abs(weights.sum(1) - 1).max() < 1e-12, "the weights of a node must add up to 1"
        assert (weights == relation.mix(own, known)).all(), "mix() gave other weights"
    if isinstance(relation, LearnedRelation):
        _check_learned(relation, own, [delta for delta in deltas if delta])


def _check_learned(relation: LearnedRelation, profiles: Sequence[Profile], deltas: Sequence[Params]) -> None:
    """Training must be pure, keep names and shapes, and give means of the nodes."""

    def public_loss(node: int, adapter: Params) -> tuple[float, Params]:
        return sum(float(t.square().sum()) for t in adapter.values()), {n: 2 * t for n, t in adapter.items()}

    at, learned = Round(1, 0, 3, (0, 1), len(profiles)), relation.start(profiles)
    for number in (1, 2):
        mixing = Mixing(replace(at, number=number), profiles, deltas, deltas, (0, 1), public_loss)
        before = {key: {n: t.clone() for n, t in tree.items()} for key, tree in learned.items()}
        after, weights = relation.train(mixing, learned)
        assert _equal(before, learned), "train() changed what it received"
        again, same = relation.train(mixing, learned)
        assert _equal(after, again), "train() learned something else from the same round"
        assert (weights == same).all(), "train() gave other weights for the same round"
        shapes = [{(k, n): t.shape for k, tree in state.items() for n, t in tree.items()} for state in (learned, after)]
        assert shapes[0] == shapes[1], "train() must keep the names and shapes of start()"
        assert (weights >= 0).all(), "train() gave a negative weight"
        assert abs(weights.sum(1) - 1).max() < 1e-12, "the weights of a node must add up to 1"
        learned = after


def check_objective(objective: Objective) -> None:
    """Assert that an objective's weights are pure, finite and never negative.

    Args:
        objective: The objective under test.

    Raises:
        AssertionError: A weight is negative or infinite, or differs between two calls.
    """
    check_settings(objective)
    tensors = [f"model.layers.{layer}.self_attn.q_proj.lora_A.weight" for layer in range(4)] + ["vision.weight"]
    for missing_rate in (0.0, 0.5, 1.0):
        view = ClientView(missing_rate, 4, lambda name: int(name.split(".")[2]) if "layers" in name else None)
        first = [objective.prox_mu(tensor, view) for tensor in tensors]
        assert all(0 <= mu < float("inf") for mu in first), f"prox_mu must be finite and not negative: {first}"
        assert first == [objective.prox_mu(tensor, view) for tensor in tensors], "prox_mu gave another value"


def check_prompt(prompt: Prompt, examples: Sequence[Example]) -> None:
    """Assert that a prompt renders what is visible and nothing else, and that an option begins its target.

    Args:
        prompt: The prompt under test.
        examples: Rows with a picture and a text, as `fedmllm.testing.examples` makes them.

    Raises:
        AssertionError: A hidden modality leaks, a visible picture is lost, or options and targets do not fit.
    """
    check_settings(prompt)
    for example in examples:
        for visible in (frozenset[str](), frozenset({"image"}), frozenset({"text"}), frozenset({"image", "text"})):
            conversation = prompt.render(example, visible)
            assert conversation == prompt.render(example, visible), "render() gave another conversation"
            assert bool(conversation.pictures) == ("image" in visible), f"pictures for visible {sorted(visible)}"
            text = str(example.fields["text"])
            hidden = "text" not in visible and text not in (example.question, *example.choices)
            assert not (hidden and text in conversation.text), "render() leaks a hidden text"
        options = prompt.options(example)
        assert len(options) == len(example.choices), "options() must give one text per choice"
        right = options[example.choices.index(example.answer)]
        assert prompt.target(example).startswith(right), "an option must begin its target"


def check_metric(metric: Metric, predictions: Sequence[Prediction]) -> None:
    """Assert that a metric gives a number, the same for any order of the rows, and None or a number for no rows.

    Args:
        metric: The metric under test.
        predictions: Of some test rows.

    Raises:
        AssertionError: The value is not a number, or depends on the order of the rows.
    """
    value, reverse = metric(predictions), metric(list(reversed(predictions)))
    assert value is None or isinstance(value, float), f"got {value!r}; a metric gives a float, or None if not defined"
    differ = (value is None) != (reverse is None) or abs((value or 0.0) - (reverse or 0.0)) > 1e-9 * max(
        1.0, abs(value or 0.0)
    )
    assert not differ, "the value depends on the order of the rows"
    empty = metric([])
    assert empty is None or isinstance(empty, float), f"got {empty!r} without rows; a metric gives a float or None"


def check_engine(engine: Engine, clients: Clients, start: Params, largest: float = 1e-12) -> None:
    """Assert that an engine gives the updates of the reference engine, `in-process`.

    Args:
        engine: Settings of the engine under test.
        clients: A federation, such as `fedmllm.testing.federation`, best with a float64 backbone.
        start: The global adapter of the round.
        largest: Bound on the difference of a weight.

    Raises:
        AssertionError: The updates differ, or do not come in ascending client order.
    """
    check_settings(engine)
    assert_same(_updates(InProcess(), clients, start), _updates(engine, clients, start), largest)


def _updates(settings: Engine, clients: Clients, start: Params) -> list[ClientUpdate]:
    module, _, name = settings.import_path.partition(":")
    at = Round(2, clients.seed, clients.num_rounds, tuple(COHORT), len(clients.shards))
    engine = getattr(importlib.import_module(module), name)(settings, clients)
    return list(engine(at, {client: Sent(start) for client in COHORT}))
