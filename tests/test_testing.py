"""`fedmllm.testing`: its checks hold for the members that are shipped, and catch those that break a rule."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import pytest

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.objectives import Objective
from fedmllm.algorithms.server_optimizers import FedAvg
from fedmllm.config.engine import Engine
from fedmllm.core.metrics import METRICS
from fedmllm.core.spec import Named
from fedmllm.core.tensors import mean_delta
from fedmllm.core.types import Conversation, Example, Prediction, Sent
from fedmllm.data.prompts import Agnostic, Plain, Prompt
from fedmllm.scenarios.masks import Scenario
from fedmllm.testing import (
    check_aggregator,
    check_engine,
    check_metric,
    check_objective,
    check_prompt,
    check_scenario,
    examples,
    federation,
    perturbed,
)

ROW = Example(0, {"text": "some words"}, "Is it so?", ("no", "yes"), "yes", "here")


@pytest.fixture(autouse=True)
def _members_as_before():
    families = [(family, dict(family.members)) for family in Named.__subclasses__()]
    yield
    for family, members in families:
        family.members = members


@pytest.mark.parametrize("name", sorted(Scenario.members))
def test_scenarios(name: str):
    settings = {"name": name, "num_image_clients": 2} if name == "cross" else {"name": name}
    check_scenario(Scenario.pick(settings, "scenario"))


def test_a_scenario_that_keeps_no_seed_or_invents_a_modality_is_caught():
    class Sound(Scenario):
        name: Literal["sound"] = "sound"

        def hide(self, rows, modalities, seed):
            return [[frozenset({"sound"}) for _ in own] for own in rows]

    calls = []

    class Moody(Scenario):
        name: Literal["moody"] = "moody"

        def hide(self, rows, modalities, seed):
            calls.append(seed)
            return [[frozenset(modalities[: len(calls) % 2]) for _ in own] for own in rows]

    with pytest.raises(AssertionError, match="modalities that the rows do not have: \\['sound'\\]"):
        check_scenario(Sound())
    with pytest.raises(AssertionError, match="other masks for the same rows and seed"):
        check_scenario(Moody())


def test_an_objective_with_a_negative_weight_is_caught():
    class Push(Objective):
        name: Literal["push"] = "push"

        def prox_mu(self, tensor, client):
            return -client.missing_rate

    with pytest.raises(AssertionError, match="finite and not negative"):
        check_objective(Push())


@pytest.mark.parametrize("prompt", [Plain(), Agnostic()])
def test_prompts(tmp_path: Path, prompt: Prompt):
    check_prompt(prompt, examples(tmp_path))


def test_a_prompt_that_leaks_a_hidden_text_is_caught(tmp_path: Path):
    class Leaky(Prompt):
        name: Literal["leaky"] = "leaky"

        def render(self, example, visible):
            return Conversation((*Plain().render(example, visible).pictures, str(example.fields["text"])))

    with pytest.raises(AssertionError, match="leaks a hidden text"):
        check_prompt(Leaky(), examples(tmp_path))


@pytest.mark.parametrize("name", sorted(METRICS))
def test_metrics(name: str):
    rows = [Prediction(ROW, scores, None) for scores in ((0.0, 1.0), (2.0, 1.0), (0.0, 0.5))]
    check_metric(METRICS[name], rows)


def test_a_metric_of_the_first_row_alone_is_caught():
    rows = [Prediction(ROW, (0.0, score), None) for score in (1.0, 2.0)]
    with pytest.raises(AssertionError, match="depends on the order of the rows"):
        check_metric(lambda predictions: predictions[0].scores[1] if predictions else None, rows)


def test_an_engine_that_changes_the_result_is_caught(tmp_path: Path):
    from fedmllm.backbones.base import Tiny

    clients = federation(Tiny().load(0), examples(tmp_path), max_steps=1)
    start = perturbed(clients.backbone)
    check_engine(Engine.pick("in-process", "engine"), clients, start)

    class Halved(Engine):
        name: Literal["halved"] = "halved"
        import_path = f"{__name__}:halved"

    with pytest.raises(AssertionError, match=r"client 0: a weight differs by"):
        check_engine(Halved(), clients, start)


def halved(settings, clients):
    from dataclasses import replace

    from fedmllm.config.engine import InProcess as Settings
    from fedmllm.federation.engines.in_process import InProcessEngine

    whole = InProcessEngine(Settings(), clients)
    return lambda at, sents: [replace(u, delta={n: t / 2 for n, t in u.delta.items()}) for u in whole(at, sents)]


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "median", "krum", "scaffold", "feddyn", "ffa-lora", "rolora"])
def test_aggregators(name: str):
    check_aggregator(Aggregator.pick(name, "aggregator"))


def test_an_aggregator_that_counts_empty_clients_or_writes_into_its_arguments_is_caught():
    class Plain(Aggregator):
        name: Literal["mean-of-all"] = "mean-of-all"

        def apply(self, params, state, at, updates):
            listed = list(updates)
            return {n: w + sum(u.delta[n] for u in listed) / len(listed) for n, w in params.items()}, state

    class InPlace(Aggregator):
        name: Literal["in-place"] = "in-place"

        def apply(self, params, state, at, updates):
            deltas = mean_delta(updates)
            return {n: w.add_(deltas[n]) for n, w in params.items()}, state

    with pytest.raises(AssertionError, match="a client without rows changed the result"):
        check_aggregator(Plain())
    with pytest.raises(AssertionError, match=r"other values for the same updates|changed the adapter"):
        check_aggregator(InPlace())


def test_an_aggregator_that_needs_more_than_the_mean_it_states_is_caught():
    class Largest(Aggregator):
        name: Literal["largest"] = "largest"
        of_the_mean: ClassVar[bool] = True

        def apply(self, params, state, at, updates):
            mean_delta(kept := [u for u in updates if u.num_examples])
            largest = max(kept, key=lambda u: u.metrics.get("loss", 0.0))
            return {n: w + largest.delta[n] for n, w in params.items()}, state

    class Alone(FedAvg):
        name: Literal["alone"] = "alone"
        of_the_mean: ClassVar[bool] = True

        def sends(self, params, state, at, client):
            return Sent({n: w + client for n, w in params.items()})

    for member, rule in ((Largest(), "another result for the mean"), (Alone(), r"sends\(\) differs by client")):
        with pytest.raises(AssertionError, match=rule):
            check_aggregator(member)
