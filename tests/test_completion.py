"""Completions: rules of every member, what travels and is recorded, and refusals before anything is loaded."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from fedmllm.backbones.base import Tiny
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.rng import stream
from fedmllm.core.spec import Named
from fedmllm.core.tensors import same_names
from fedmllm.core.types import Example
from fedmllm.runs.inputs import Inputs
from fedmllm.runs.result import load_run
from fedmllm.runs.run import run
from fedmllm.scenarios.modalities import describe
from fedmllm.scenarios.modalities.completion import Completer, Completion, CompletionSite, Filling, Nothing
from fedmllm.scenarios.modalities.retrieve import Retrieve
from fedmllm.testing import check_completion, examples, leak_probe, perturbed
from support.runs import Stop, events, experiment

BOTH = frozenset({"image", "text"})
MISSING = {"name": "missing", "rate": 0.5}


@pytest.fixture(scope="module")
def tiny():
    return Tiny().load(seed=0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    return examples(tmp_path_factory.mktemp("pictures"))[:8]


def variants() -> list[Completion]:
    """Every member, with the settings that change which rows it changes."""
    names = sorted(set(Completion.members) - {"diffusion"})  # needs a pipeline: tests/test_diffusion.py
    made = [Completion.pick(name, "completion") for name in names]
    others = [{"name": "retrieve", "test": True}, {"name": "describe", "mode": "add"}]
    others += [{"name": "describe", "mode": "replace", "ask": ["What is the face?", "What is the sky?"]}]
    return made + [Completion.pick(table, "completion") for table in others]


@pytest.mark.parametrize("completion", variants(), ids=lambda c: c.label())
def test_every_member_keeps_the_rules(completion: Completion, tiny, rows):
    check_completion(completion, tiny, rows)


CALLS: list[int] = []


@pytest.fixture
def broken():
    """A class that breaks a rule, as `how` says; a member only while the test runs."""
    before = dict(Completion.members)

    class Broken(Completion):
        """Breaks a rule, as `how` says."""

        name: Literal["broken"] = "broken"
        how: str = ""
        test: bool = True

        def at_test(self) -> bool:
            return True

        def prepare(self, site: CompletionSite) -> Filling:
            return _BrokenFilling(self.how, site)

    yield Broken
    Completion.members = before


class _BrokenFilling(Filling):
    def __init__(self, how: str, site: CompletionSite) -> None:
        self.how, self.site = how, site

    def fill(self, example: Example, training: bool) -> Example:
        if self.how == "random":
            CALLS.append(1)
            return replace(example, fields={**example.fields, "text": f"call {len(CALLS)}"})
        if self.how == "drops":
            return replace(example, fields={"text": "x"})
        if self.how == "invents":
            return replace(example, fields={**example.fields, "sound": "x"})
        vectors = next(iter(self.site.model.lora().values()))  # type: ignore[attr-defined]
        return replace(example, fields={**example.fields, "text": f"{float(vectors.sum())}"})


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ("random", "order of the calls"),
        ("drops", "takes away"),
        ("invents", "sound"),
        ("adapter", "depends on the adapter"),
    ],
)
def test_a_member_that_breaks_a_rule_is_caught(how: str, rule: str, broken, tiny, rows):
    with pytest.raises((AssertionError, FedmllmError), match=rule):
        check_completion(broken(how=how), tiny, rows)


def retrieve(tiny, public, **settings: Any) -> Completer:
    return Completer(Retrieve(**settings), CompletionSite(tiny, tuple(public), ("image", "text"), 0))


def test_retrieve_finds_the_row_itself(tiny, rows):
    """If the public rows are the rows themselves, the nearest one in the image has the true text."""
    own = retrieve(tiny, rows, neighbours=1)
    for row in rows:
        filled, present = own(row, frozenset({"image"}), training=True)
        assert (filled.fields, present) == (row.fields, BOTH)


def test_retrieve_with_one_public_row_borrows_from_it(tiny, rows):
    one = retrieve(tiny, rows[:1], answer="any")
    for mask in (frozenset[str](), frozenset({"image"}), frozenset({"text"})):
        filled, present = one(rows[3], mask, training=True)
        assert present == BOTH
        assert filled.fields == {m: rows[3].fields[m] if m in mask else rows[0].fields[m] for m in ("image", "text")}


def test_the_answer_counts_only_where_it_should(tiny, rows):
    """`own` borrows from rows with the answer alone, `any` does not read it, and a row of an unseen answer stays as it is."""
    by_text = {row.fields["text"]: row.answer for row in rows}
    public = [replace(row, fields={**row.fields, "text": f"{row.fields['text']} {row.answer}"}) for row in rows]
    own, free = retrieve(tiny, public), retrieve(tiny, public, answer="any")
    for row in rows:
        filled, _ = own(row, frozenset({"image"}), training=True)
        assert str(filled.fields["text"]).endswith(row.answer)
        other = replace(row, answer="yes" if row.answer == "no" else "no")
        mask = frozenset({"image"})
        assert free(other, mask, True)[0].fields == free(row, mask, True)[0].fields
    assert by_text
    nos = retrieve(tiny, [row for row in rows if row.answer == "no"])
    yes = next(row for row in rows if row.answer == "yes")
    assert nos(yes, frozenset({"image"}), training=True) == (yes, frozenset({"image"}))
    opened = replace(yes, choices=(), answer="nothing alike")
    assert nos(opened, frozenset({"image"}), training=True)[1] == BOTH  # an open answer that no public row has


def test_odd_rows_are_defined(tiny, rows):
    """Blank text, several pictures, and a test row that shows nothing."""
    paths = tuple(path for row in rows[:2] for path in row.fields["image"])
    odd = replace(rows[0], fields={"image": paths, "text": ""})
    both = retrieve(tiny, rows[2:], test=True)
    assert both(odd, frozenset({"text"}), training=True)[1] == BOTH
    assert both(odd, frozenset({"image"}), training=False)[1] == BOTH
    assert both(odd, frozenset(), training=False) == (odd, frozenset())


FACE_AND_SKY = {"name": "describe", "ask": ["What is the face?", "What is the sky?"]}


def test_the_frozen_model_describes_a_picture_once(tiny, monkeypatch):
    """Whatever the adapter is, and in batches as one by one; several questions are answered after one another."""
    data = Experiment.parse({"data": {"name": "synthetic-verdict", "num_train": 40}}).data
    drawn = data.load("train").examples[:40]
    monkeypatch.setattr(describe, "_ANSWERS", {})
    completer = Completer(Completion.pick(FACE_AND_SKY, "completion"), CompletionSite(tiny, (), ("image", "text"), 0))
    image = frozenset({"image"})
    completer.warm([(row, image) for row in drawn], training=True)
    texts = [str(completer(row, image, True)[0].fields["text"]) for row in drawn]
    known = [
        re.fullmatch(r"What is the face\? (smile|calm|frown) What is the sky\? (day|dusk|night)", text)
        for text in texts
    ]
    assert sum(map(bool, known)) >= 38
    assert len({match.groups() for match in known if match}) >= 6  # they are not all alike
    made = len(describe._ANSWERS)
    completer.warm([(row, image) for row in drawn], training=False)
    assert len(describe._ANSWERS) == made
    before = tiny.lora()
    tiny.set_lora(perturbed(tiny))
    monkeypatch.setattr(describe, "_ANSWERS", {})
    again = [str(completer(row, image, True)[0].fields["text"]) for row in drawn[:8]]
    tiny.set_lora(before)
    assert again == texts[:8]
    assert all(completer(row, frozenset(mask), True)[0] is row for row in drawn[:2] for mask in (BOTH, {"text"}, ()))


def test_modes_of_describe(tiny, monkeypatch):
    asked: list[str] = []

    class Parrot:
        digest = "parrot"

        def generate_frozen(self, prompts, max_new_tokens):
            asked.extend(str(prompt.parts[1]) for prompt in prompts)
            return ["" if "sky" in str(prompt.parts[1]) else " a  cat " for prompt in prompts]

    monkeypatch.setattr(describe, "_ANSWERS", {})
    path = Path(__file__)  # any file: the parrot does not look at it
    row = Example(0, {"image": (path, path), "text": "hello"}, "?", ("no", "yes"), "no", "here")

    def fields(visible: frozenset[str], **settings: Any) -> dict[str, Any]:
        completion = Completion.pick({"name": "describe", **settings}, "completion")
        return dict(
            Completer(completion, CompletionSite(Parrot(), (), ("image", "text"), 0))(row, visible, False)[0].fields
        )  # type: ignore[arg-type]

    assert fields(BOTH, mode="add") == {"image": (path, path), "text": "hello a cat a cat"}
    assert fields(BOTH, mode="replace") == {"text": "hello a cat a cat"}
    assert fields(frozenset({"image"})) == {"image": (path, path), "text": "a cat a cat"}
    assert asked == ["Describe the picture."]  # one picture, one question
    assert fields(BOTH) == row.fields  # it has a text
    assert fields(frozenset({"image"}), ask="the sky?")["text"] == "hello"  # no answer: the row stays as it is
    assert fields(frozenset({"image"}), ask=["the sky?", "a pet?"])["text"] == "a pet? a cat a pet? a cat"


def test_answers_that_leak_are_found(tiny):
    data = Experiment.parse({"data": {"name": "synthetic-verdict", "num_train": 300, "num_validation": 100}}).data
    train, public = data.load("train").examples, data.load("validation").examples
    assert not Retrieve.leaks
    for leak in leak_probe(Retrieve(), tiny, train, public).values():
        assert leak.filled <= leak.real + 0.05
    public = [replace(row, fields={**row.fields, "text": f"it is {row.answer}"}) for row in public]
    assert leak_probe(Retrieve(), tiny, train, public)["text"].filled > 0.99


SMALL: dict[str, Any] = {
    "scenario": MISSING,
    "num_rounds": 2,
    "public": {"rows": 8},
    "completion": {"name": "retrieve", "test": True},
}


def test_none_is_as_before_and_others_are_other_runs():
    plain = experiment(scenario=MISSING)
    assert experiment(scenario=MISSING, completion="none", public={"rows": 0}).run_id() == plain.run_id()
    others = [
        experiment(**SMALL),
        experiment(**{**SMALL, "completion": "retrieve"}),
        experiment(**{**SMALL, "public": {"rows": 7}}),
    ]
    assert len({e.run_id() for e in (plain, *others)}) == 4
    assert [e.method_name() for e in others] == [
        "fedavg+retrieve(test=True)",
        "fedavg+retrieve",
        "fedavg+retrieve(test=True)",
    ]
    assert Experiment.parse(others[0].dump()) == others[0]
    assert Experiment.parse(others[0].model_dump(mode="json")) == others[0]  # as the record has it


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completed")
    run(experiment(**SMALL), folder / "run")
    run(experiment(scenario=MISSING, num_rounds=2), folder / "none")
    return folder


def test_digests_masks_and_bytes_stay(completed: Path):
    (head,), (plain,) = events(completed / "run", "experiment"), events(completed / "none", "experiment")
    assert head["digests"] == {**plain["digests"], "public": head["digests"]["public"]}
    assert head["clients"] == plain["clients"]
    assert any(note.startswith("completion retrieve(test=True) from 8 public rows; hidden") for note in head["notes"])
    for one, two in zip(events(completed / "run", "round"), events(completed / "none", "round"), strict=True):
        assert (one["up_bytes"], one["down_bytes"]) == (two["up_bytes"], two["down_bytes"])  # nothing else leaves
        assert one["clients"][0]["num_tokens"] > two["clients"][0]["num_tokens"]  # the rows show more


def test_a_resumed_run_has_the_bytes_of_one_that_was_not_stopped(completed: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(experiment(**SMALL), tmp_path / "run", [Stop("round", 2)])
    run(experiment(**SMALL), tmp_path / "run", resume=True)
    same(tmp_path / "run", completed / "run", 0.0)


def test_engines_agree(completed: Path, tmp_path: Path):
    run(experiment(**SMALL, engine="in-process"), tmp_path / "in-process")
    same(tmp_path / "in-process", completed / "run", 1e-4)


def same(one: Path, two: Path, largest: float) -> None:
    a, b = load_run(one).adapter.tensors, load_run(two).adapter.tensors
    same_names(a, b)
    assert all(torch.allclose(a[n], b[n], rtol=0, atol=largest) for n in a)


def test_public_rows_as_one_more_client(tmp_path: Path):
    control = experiment(num_rounds=1, scenario=MISSING, public={"rows": 6, "client": True}, cohort_size=4)
    assert control.method_name() == "fedavg+public-client"
    run(control, tmp_path / "run")
    (head,), (first,) = events(tmp_path / "run", "experiment"), events(tmp_path / "run", "round")
    assert head["rows_per_client"] == [12, 12, 12, 6]
    assert (head["clients"][3]["name"], head["clients"][3]["shows"]) == ("public", {"image+text": 6})
    assert [c["num_examples"] for c in first["clients"]] == [12, 12, 12, 6]


def test_the_oracle_gives_the_hidden_rows_back(tmp_path: Path):
    """Training with it is training on aligned rows, and the record calls it a bound."""
    run(experiment(num_rounds=1, scenario=MISSING, completion="oracle"), tmp_path / "oracle")
    run(experiment(num_rounds=1), tmp_path / "aligned")
    same(tmp_path / "oracle", tmp_path / "aligned", 0.0)
    assert any("a bound, not a method" in note for note in events(tmp_path / "oracle", "experiment")[0]["notes"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"completion": "retrieve"}, "public.rows: got 0; completion 'retrieve' needs public rows"),
        ({"public": {"rows": 5}}, "public: no effect with completion = 'none'"),
        ({"public": {"client": True}}, "rows: got 0; data, split and client have no effect"),
        ({"public": {"rows": 5, "split": "train", "client": True}}, "whose rows are the clients'"),
        ({"public": {"rows": 5, "client": True}, "method": "local"}, "whose mean is over real clients"),
        ({**SMALL, "evaluate": {"every": 1, "select": "validation"}}, "its rows are the validation rows"),
        (
            {**SMALL, "engine": "flower-sites"},
            "supports neither completion nor public rows; allowed: flower-simulation",
        ),
        ({**SMALL, "backbone": {"name": "tiny", "lora": {"train_extra": ["resampler"]}}}, "must not be trained"),
        ({**SMALL, "completion": {"name": "retrieve", "whole": True, "test": True}}, "a test row cannot be replaced"),
        ({"completion": "retreive"}, "did you mean 'retrieve'"),
        ({"completion": {"name": "describe", "to": "sound"}}, "completion.to: got 'sound'; the rows have image, text"),
        ({**SMALL, "public": {"rows": 5, "data": "no-such-set"}}, "public.data.name: got 'no-such-set'"),
    ],
)
def test_what_cannot_go_together_is_refused_when_it_is_read(changed: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        experiment(**changed)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("public", "message"),
    [
        ({"rows": 9}, "public.rows: got 9; synthetic-irony has 8 complete rows in its validation split"),
        ({"rows": 5, "data": "synthetic-crisis", "split": "train"}, ""),
    ],
)
def test_public_rows_that_do_not_fit(public: dict[str, Any], message: str):
    e = experiment(**{**SMALL, "public": public})
    if not message:  # another task with the same modalities is allowed
        assert len(e.public.load(e.data)) == 5
        return
    with pytest.raises(ConfigError, match=message):
        e.public.load(e.data)


def test_members_are_a_family():
    assert Named in Completion.__bases__
    assert Experiment.model_fields["completion"].default == Nothing()
    assert json.loads(json.dumps(experiment(**SMALL).identity()))["completion"]["name"] == "retrieve"
    assert stream(0, "retrieve", "1").integers(9) == stream(0, "retrieve", "1").integers(9)


def test_text_alone_needs_no_pixels(tmp_path: Path):
    """`replace`: no row that is trained or evaluated has a picture, and both engines' rounds are sent as before."""
    e = experiment(num_rounds=1, completion={**FACE_AND_SKY, "mode": "replace"}, evaluate={"visible": ["all", "image"]})
    inputs = Inputs.load(e)
    clients = inputs.clients(1)
    clients.store.warm(clients.shards)
    made = [clients.store.row(i, BOTH) for i in clients.shards[0].rows[:4]]
    assert all(not row.image_key for row in made)
    run(e, tmp_path / "run")
    assert {row["visible"] for row in load_run(tmp_path / "run").rows} == {"all", "image"}


@pytest.mark.parametrize("name", ["none", "oracle", "retrieve", "imagine"])
def test_a_complete_row_is_encoded_once_and_costs_no_other_pass(name: str, tiny, tmp_path: Path, monkeypatch):
    """Three rounds over rows of which some are complete: each is encoded once, and none reaches a filling."""
    train = {"lr": 1e-3, "batch_size": 4, "accumulation": 1}
    table: dict[str, Any] = {"scenario": MISSING, "num_rounds": 3, "train": train, "cohort_size": 3}
    table |= {"completion": {"name": "imagine", "rounds": 1, "steps": 2} if name == "imagine" else name}
    table |= {"public": {"rows": 4}} if name == "retrieve" else {}
    encoded, filled = Counter[str](), list[Example]()
    before_encode, before_given = type(tiny).encode, Completer._given

    def encode(self, prompt, answer):
        encoded[str(prompt)] += 1
        return before_encode(self, prompt, answer)

    def given(self, example, visible, training):
        found = before_given(self, example, visible, training)
        if found is not None:
            filled.append(replace(example, fields=example.visible_fields(visible)))
        return found

    inputs = Inputs.load(experiment(**table))
    complete = {r for s in inputs.shards for r, v in zip(s.rows, s.visible, strict=True) if v == BOTH}
    prompts = {str(inputs.experiment.prompt.render(inputs.train[row], BOTH)) for row in complete}
    monkeypatch.setattr(type(tiny), "encode", encode)
    monkeypatch.setattr(Completer, "_given", given)
    run(experiment(**table), tmp_path / "run")
    assert len(prompts) == len(complete) > 3
    assert {encoded[prompt] for prompt in prompts} == {1}
    assert all(len(row.fields) < 2 for row in filled)
