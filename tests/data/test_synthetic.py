"""The embedded data sets: same bytes from the same seed, the real sets' forms, and labels that need both modalities."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from fedmllm.core.rng import stream
from fedmllm.core.types import Visible
from fedmllm.data.base import Dataset
from fedmllm.data.captions import THEMES, TONES
from fedmllm.data.crisismmd import CHOICES as CRISIS_CLASSES
from fedmllm.data.scenes import Scene
from fedmllm.data.synthetic import _KIND, SyntheticCrisis, SyntheticIrony, crisis_row
from fedmllm.data.synthetic_verdict import SyntheticVerdict

SCRIPTS = Path(__file__).parents[2] / "scripts"
KINDS = [SyntheticIrony, SyntheticCrisis, SyntheticVerdict]
VISIBLE = [frozenset(v) for v in (("image", "text"), ("image",), ("text",), ())]
SMALL = {"num_train": 12, "num_validation": 3, "num_test": 5}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMLLM_CACHE", str(tmp_path / "cache"))


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_bytes(kind, tmp_path, monkeypatch):
    first = files(kind(**SMALL).folder())
    monkeypatch.setenv("FEDMLLM_CACHE", str(tmp_path / "other"))
    assert files(kind(**SMALL).folder()) == first
    assert files(kind(**SMALL, seed=1).folder()) != first


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_rows_do_not_depend_on_how_many_are_drawn(kind):
    few, many = (
        kind(**SMALL).load("test").examples,
        kind(**{**SMALL, "num_train": 20, "num_test": 9}).load("test").examples,
    )
    assert [(e.fields["text"], e.answer) for e in few] == [(e.fields["text"], e.answer) for e in many[:5]]


def test_two_may_draw_at_once():
    with ThreadPoolExecutor(4) as pool:
        folders = {f.result() for f in [pool.submit(SyntheticIrony(**SMALL).folder) for _ in range(4)]}
    (folder,) = folders
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no draft is left behind
    assert len(files(folder)) == 20 + 3


def test_irony_has_the_files_of_hateful_memes():
    data = SyntheticIrony(**SMALL)
    rows = [json.loads(line) for line in (data.folder() / "dev_seen.jsonl").read_text().splitlines()]
    assert [sorted(row) for row in rows] == [["id", "img", "label", "text"]] * 3
    assert {p.name for p in data.folder().glob("*.jsonl")} == {"train.jsonl", "dev_seen.jsonl", "test_seen.jsonl"}
    for row, example in zip(rows, data.load("validation").examples, strict=True):
        assert example.answer == example.choices[row["label"]]
        (path,) = example.fields["image"]
        assert path == data.folder() / row["img"]
        assert Image.open(path).size == (56, 56)


def test_crisis_has_the_files_of_crisismmd():
    data = SyntheticCrisis(**SMALL)
    path = data.folder() / "crisismmd_datasplit_all" / "task_humanitarian_text_img_train.tsv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert list(rows[0]) == [
        "event_name", "tweet_id", "image_id", "tweet_text", "image", "label", "label_text", "label_image",
        "label_text_image",
    ]  # fmt: skip
    examples = data.load("train").examples
    assert [e.answer for e in examples] == [row["label_image"] for row in rows]
    assert all("http" in row["tweet_text"] for row in rows)
    assert not any("http" in e.fields["text"] for e in examples)
    assert all((data.folder() / row["image"]).is_file() for row in rows)
    assert {e.choices for e in examples} == {CRISIS_CLASSES}


def best_guess(labels: Sequence[int], seen: Sequence[Hashable]) -> list[float]:
    """For each row the share of label 1 among rows that look the same: what a perfect model could know."""
    by_look: dict[Hashable, list[int]] = defaultdict(list)
    for label, look in zip(labels, seen, strict=True):
        by_look[look].append(label)
    return [sum(by_look[look]) / len(by_look[look]) for look in seen]


def tone_of(text: str) -> str:
    return next(tone for tone, words in TONES.items() if set(words) & set(text.split()))


def seen(scene: Scene, text: str, visible: Visible) -> Hashable:
    """The part of a row that its label depends on."""
    image, words = (scene.face, scene.sky), (tone_of(text), text.startswith("sure"))
    return tuple(look for name, look in (("image", image), ("text", words)) if name in visible)


@pytest.mark.parametrize("visible", VISIBLE, ids=lambda v: "+".join(sorted(v)) or "none")
@pytest.mark.parametrize(
    ("data", "seed"),
    [
        (SyntheticIrony(), 0),
        (SyntheticVerdict(), 1),
        (SyntheticVerdict(image_weight=0.5, text_weight=3.0, interaction_weight=-2.0, noise=0.1), 2),
    ],
    ids=["irony", "verdict", "other weights and noise"],
)
def test_the_ceilings_of_a_two_way_law_are_those_of_a_large_sample(data, seed, visible):
    rows = [data.row(stream(seed, "many", i)) for i in range(20000)]
    labels = [int(label) for _, _, label in rows]
    known = best_guess(labels, [seen(scene, text, visible) for scene, text, _ in rows])
    rate = sum(labels) / len(labels)
    found = {
        "auc": roc_auc_score(labels, known),
        "auc_hard": balanced_accuracy_score(labels, [p > rate for p in known]),
        "accuracy": accuracy_score(labels, [p > 0.5 for p in known]),
    }
    assert data.ceilings(visible) == pytest.approx(found, abs=0.012)


def test_the_ceilings_of_the_default_verdict():
    """The figures of an independent sum over the law: complete rows, image only, text only."""
    ceilings = [SyntheticVerdict().ceilings(visible)["auc"] for visible in VISIBLE]
    assert ceilings == pytest.approx([0.926, 0.788, 0.782, 0.5], abs=5e-4)
    ceilings = [SyntheticVerdict(interaction_weight=-2.0).ceilings(visible)["auc"] for visible in VISIBLE[:3]]
    assert ceilings == pytest.approx([0.935, 0.785, 0.778], abs=5e-4)


def test_a_weight_of_zero_silences_its_modality():
    silent = SyntheticVerdict(image_weight=0.0, interaction_weight=0.0)
    assert silent.ceilings(frozenset({"image"}))["auc"] == pytest.approx(0.5)
    assert silent.ceilings(VISIBLE[0]) == pytest.approx(silent.ceilings(frozenset({"text"})))


def test_weights_change_labels_alone_and_have_folders_of_their_own():
    one, other = SyntheticVerdict(**SMALL), SyntheticVerdict(**SMALL, interaction_weight=-5.0)
    assert one.folder() != other.folder()
    pairs = list(zip(one.load("train").examples, other.load("train").examples, strict=True))
    assert all(a.fields["text"] == b.fields["text"] for a, b in pairs)
    assert all(a.fields["image"][0].read_bytes() == b.fields["image"][0].read_bytes() for a, b in pairs)
    assert [a.answer for a, _ in pairs] != [b.answer for _, b in pairs]


def test_the_ceilings_of_the_eight_way_set():
    data = SyntheticCrisis()
    rows = [crisis_row(stream(3, "many", i)) for i in range(20000)]
    theme = {word: theme for theme, words in THEMES.items() for word in words}
    themes = [next(theme[w] for w in text.split() if w in theme) for _, text, _ in rows]
    for visible, looks in (("image", [_KIND.get(scene.thing, "goods") for scene, _, _ in rows]), ("text", themes)):
        counts = np.zeros((4, 8))
        for look, (_, _, label) in zip(looks, rows, strict=True):
            counts[sorted(set(looks)).index(look), label] += 1
        given = np.eye(8)[list(itertools.product(range(8), repeat=4))]  # [rule, look, label]: every rule
        right, marked = (given * counts).sum(1), (given * counts.sum(1, keepdims=True)).sum(1)
        found = {
            "macro_f1": (2 * right / (marked + counts.sum(0))).mean(1).max(),
            "accuracy": counts.max(1).sum() / len(rows),
        }
        assert data.ceilings(frozenset({visible})) == pytest.approx(found, abs=0.012)
    assert data.ceilings(frozenset({"image", "text"})) == pytest.approx({"macro_f1": 1.0, "accuracy": 1.0})


def test_crisis_needs_both_modalities():
    rows = [crisis_row(stream(0, "many", i)) for i in range(6000)]
    theme = {word: theme for theme, words in THEMES.items() for word in words}

    def accuracy(looks: Sequence[Hashable]) -> float:
        counts: dict[Hashable, Counter[int]] = defaultdict(Counter)
        for look, (_, _, label) in zip(looks, rows, strict=True):
            counts[look][label] += 1
        return sum(c.most_common(1)[0][1] for c in counts.values()) / len(rows)

    themes = [next(theme[w] for w in text.split() if w in theme) for _, text, _ in rows]
    assert accuracy([scene.thing for scene, _, _ in rows]) < 0.5
    assert accuracy(themes) < 0.65
    assert accuracy([(scene.thing, t) for (scene, _, _), t in zip(rows, themes, strict=True)]) == 1
    assert {label for _, _, label in rows} == set(range(8))


def test_another_wording_changes_the_question_and_the_options_alone():
    one, two = (SyntheticVerdict(**SMALL, wording=n).load("train").examples for n in (1, 2))
    assert {r.question for r in two} == {"Which pool is the content in?"}
    assert [r.choices.index(r.answer) for r in one] == [r.choices.index(r.answer) for r in two]
    assert [r.fields for r in one] == [r.fields for r in two]
    assert "wording" not in SyntheticVerdict().identity()


@pytest.mark.parametrize("kind", [*KINDS, partial(SyntheticVerdict, wording=2)])
def test_pre_training_never_shows_the_question_or_the_labels(kind, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from tiny_tasks import Scene, corpus

    rng = stream(0, "search")
    samples = corpus([Scene.random(rng) for _ in range(100)], 20000, rng)
    data: Dataset = kind(**SMALL)
    row = data.load("train").examples[0]
    texts = [line for s in samples for line in (*s.conversation.text.lower().split("\n"), s.answer.lower())]
    whole = [rf"{word}\b" for word in (row.question.lower().rstrip("?"), *row.choices)]  # "lower" is not "low"
    for forbidden in (*whole, "ironic", "irony", "sarcas", "contradict"):
        assert not [text for text in texts if re.search(rf"\b{forbidden}", text)]
