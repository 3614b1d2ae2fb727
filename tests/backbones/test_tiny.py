"""The embedded model: small, in the hub's layout, able to read its world, and without a view on what it is later asked."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from fedmllm.backbones.base import Backbone, Tiny
from fedmllm.backbones.tiny import CHECKPOINTS
from fedmllm.core.rng import stream
from fedmllm.core.types import Conversation, Picture
from fedmllm.data.captions import THEMES, TONES, caption, tweet
from fedmllm.data.prompts import Agnostic, Plain, Prompt
from fedmllm.data.scenes import COLOURS, FACES, SKIES, THINGS, Scene, draw
from fedmllm.data.synthetic import SyntheticIrony
from fedmllm.data.synthetic_verdict import SyntheticVerdict

SCRIPTS = Path(__file__).parents[2] / "scripts"
RESULTS = Path(__file__).parents[2] / "results"
NUM_SCENES = 60


@pytest.fixture(scope="module", params=[1, 2], ids="edition {}".format)
def edition(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def backbone(edition) -> Backbone:
    return Tiny(edition=edition).load(seed=0)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Scene, Path]]:
    folder, drawn = tmp_path_factory.mktemp("scenes"), []
    for i in range(NUM_SCENES):
        rng = stream(7, "test", i)
        scene = Scene.random(rng)
        draw(scene, rng).save(folder / f"{i}.png")
        drawn.append((scene, folder / f"{i}.png"))
    return drawn


def accuracy(backbone: Backbone, prompts: Sequence[Conversation], values: Sequence[str], truth: Sequence[str]) -> float:
    scores = backbone.score(prompts, [values] * len(prompts))
    return float(np.mean([values[int(np.argmax(row))] == right for row, right in zip(scores, truth, strict=True)]))


def test_it_is_small(edition):
    files = list(CHECKPOINTS[edition].iterdir())
    assert sum(p.stat().st_size for p in files) <= 8e6
    assert {p.name for p in files} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_the_files_are_those_that_the_log_of_the_script_names():
    log = json.loads((RESULTS / "pretrain_tiny_2.json").read_text(encoding="utf-8"))
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in CHECKPOINTS[2].iterdir()} == log["sha256"]


def test_it_has_a_million_weights(backbone):
    base = sum(p.numel() for n, p in backbone.model.named_parameters() if "lora_" not in n)
    assert 0.5e6 <= base <= 3e6
    assert sum(p.numel() for p in backbone.trainable().values()) == 32768  # 4 layers x q, k, v, o x 8 x (128 + 128)


@pytest.mark.parametrize(
    ("question", "attribute", "values"),
    [
        ("What is the color?", "colour", COLOURS),
        ("What is the sky?", "sky", SKIES),
        ("What is the thing?", "thing", THINGS),
        ("What is the face?", "face", FACES),
    ],
)
def test_it_reads_pictures(backbone, scenes, question, attribute, values):
    prompts = [Conversation((Picture(path), question)) for _, path in scenes]
    assert accuracy(backbone, prompts, values, [getattr(scene, attribute) for scene, _ in scenes]) >= 0.9


@pytest.mark.parametrize(
    ("question", "kinds", "write"), [("What is the tone?", TONES, caption), ("What is the theme?", THEMES, tweet)]
)
def test_it_reads_texts(backbone, question, kinds, write):
    rng = stream(8, "texts")
    truth = [str(rng.choice(list(kinds))) for _ in range(NUM_SCENES)]
    prompts = [Conversation((f"{write(kind, rng)}\n{question}",)) for kind in truth]
    assert accuracy(backbone, prompts, list(kinds), truth) >= 0.95


def test_it_answers_in_words(backbone, scenes):
    prompts = [Conversation((Picture(path), "What is the color?")) for _, path in scenes[:10]]
    assert backbone.generate(prompts, max_new_tokens=4) == [scene.colour for scene, _ in scenes[:10]]


@pytest.mark.parametrize("visible", [("image", "text"), ("image",), ("text",)], ids=" and ".join)
def test_it_ranks_verdicts_nearly_at_random(backbone, edition, visible):
    rows = SyntheticVerdict(num_test=1000, wording=edition).load("test").examples
    prompt, seen = Plain(), frozenset(visible)
    scores = backbone.score([prompt.render(r, seen) for r in rows], [prompt.options(r) for r in rows])
    assert 0.40 <= roc_auc_score([r.choices.index(r.answer) for r in rows], [b - a for a, b in scores]) <= 0.60


@pytest.mark.parametrize("prompt", [Plain(), Agnostic()], ids=lambda p: p.name)
def test_the_first_edition_has_no_view_on_irony(prompt: Prompt):
    """Zero-shot near chance: the downstream question is new to it."""
    backbone = Tiny().load(seed=0)
    rows = SyntheticIrony().load("test").examples
    scores = backbone.score([prompt.render(r, frozenset(r.fields)) for r in rows], [prompt.options(r) for r in rows])
    auc = roc_auc_score([r.answer == "ironic" for r in rows], [b - a for a, b in scores])
    assert 0.40 <= auc <= 0.65


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (1000, 40), (640, 480)])
def test_any_picture_goes_through(backbone, tmp_path, size):
    Image.new("RGB", size, (120, 90, 60)).save(tmp_path / "user.png")
    prompt = Conversation((Picture(tmp_path / "user.png"), "Is the left lung enlarged? 12 mm, naïve 肺"))
    assert np.isfinite(backbone.score([prompt], [("yes", "no")])).all()
    assert backbone.encode(prompt, "no").num_tokens < 80


def test_the_corpus_does_not_depend_on_the_order_of_a_set():
    """Two processes whose strings hash in another order draw the same corpus: else the model cannot be rebuilt."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tiny_tasks import Scene, corpus; "
        "from fedmllm.core.rng import stream; rng = stream(0, 'scenes'); "
        "samples = corpus([Scene.random(rng) for _ in range(20)], 400, stream(0, 'corpus')); "
        "print(list(frozenset({'image', 'text'}))[0], [(s.scene, s.conversation.text, s.answer) for s in samples])"
    )
    found: dict[str, str] = {}
    for seed in range(20):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        out = subprocess.run(
            [sys.executable, "-c", code, str(SCRIPTS)], env=environment, capture_output=True, text=True, check=True
        )
        first, _, drawn = out.stdout.partition(" ")
        found[first] = drawn
        if len(found) == 2:
            break
    assert len(found) == 2
    assert found["image"] == found["text"]


def test_pre_training_put_rows_as_the_backbone_does(backbone, scenes, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from pretrain_tiny import Encoded
    from tiny_tasks import corpus

    samples = corpus([scene for scene, _ in scenes], 40, stream(9, "corpus"))
    encoded = Encoded(samples, backbone.encoder.tokenizer)
    for n, sample in enumerate(samples):
        parts = tuple(Picture(scenes[0][1]) if isinstance(p, Picture) else p for p in sample.conversation.parts)
        row = backbone.encode(Conversation(parts), sample.answer)
        assert row.input_ids.tolist() == encoded.prompts[n] + encoded.answers[n]
