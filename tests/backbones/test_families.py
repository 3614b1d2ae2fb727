"""One code path, every family: what one row gives alone, it gives in any batch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image

from fedmllm.backbones.base import FromFolder, Row
from fedmllm.backbones.folder import load_base
from fedmllm.backbones.hf import CAUSAL, TransformersBackbone, load_folder
from fedmllm.core.errors import FedmllmError
from fedmllm.core.images import CANVAS, FEATURES
from fedmllm.core.storage import write_tensors
from fedmllm.core.types import Conversation, Picture
from support.tiny_families import FAMILIES, PORTS, stirred

ALL = [*FAMILIES, *PORTS]
ANSWERS = ["yes", "no, never", "ok"]
CHOICES = [("A", "B"), ("yes it is", "no", "maybe"), ("(A) cat", "(B)")]
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}  # float32, sums of up to 10 terms of about 6

Loaded = Callable[[str], TransformersBackbone]
pytestmark = pytest.mark.parametrize("family", ALL)


@pytest.fixture
def backbone(loaded: Loaded, family: str) -> TransformersBackbone:
    return loaded(family)


@pytest.fixture
def rows(backbone: TransformersBackbone, prompts: list[Conversation]) -> list[Row]:
    return [backbone.encode(prompt, answer) for prompt, answer in zip(prompts, ANSWERS, strict=True)]


def test_labels_are_the_answer_and_the_end_of_the_turn(backbone: TransformersBackbone, rows: list[Row]) -> None:
    for row, answer in zip(rows, ANSWERS, strict=True):
        labels = row.labels[row.labels != -100].tolist()
        assert backbone.encoder.decode(labels[:-1]) == answer
        assert labels == row.input_ids[-len(labels) :].tolist()
        assert labels[-1] == backbone.encoder.end_of_turn != backbone.encoder.tokenizer.pad_token_id


@pytest.mark.parametrize("members", [(0, 1), (2, 2), (0, 2), (2, 1, 0)], ids=["images", "texts", "mixed", "all"])
def test_batched_loss_is_the_loss_of_each_row_alone(
    backbone: TransformersBackbone, rows: list[Row], members: tuple[int, ...]
) -> None:
    chosen = [rows[i] for i in members]
    nll_B, num_B = backbone.loss(backbone.collate(chosen))
    alone = [backbone.loss(backbone.collate([row])) for row in chosen]
    torch.testing.assert_close(nll_B, torch.cat([nll for nll, _ in alone]), **TOLERANCE)
    assert num_B.tolist() == [int((row.labels != -100).sum()) for row in chosen]


def test_the_loss_is_that_of_the_family_s_own_forward_pass(backbone: TransformersBackbone, rows: list[Row]) -> None:
    """Pixels and labels given to transformers itself, all positions through the head: the mean over label tokens."""
    for row in rows:
        nll_B, num_B = backbone.loss(backbone.collate([row]))
        theirs = backbone.base(
            input_ids=row.input_ids[None],
            labels=row.labels[None],
            **row.images,
            **{key: value.unsqueeze(value.ndim - 1) for key, value in row.per_token.items()},
        )
        logits = theirs.logits[0, :-1].log_softmax(-1)
        kept = row.labels[1:] != -100
        expected = -logits[kept].gather(1, row.labels[1:][kept][:, None]).sum()
        torch.testing.assert_close(nll_B[0], expected, **TOLERANCE)
        assert int(num_B) == int(kept.sum())


def test_scores_do_not_depend_on_the_batch_and_are_sums_of_label_losses(
    backbone: TransformersBackbone, prompts: list[Conversation]
) -> None:
    together = backbone.score(prompts, CHOICES)
    for prompt, options, scores in zip(prompts, CHOICES, together, strict=True):
        torch.testing.assert_close(scores, backbone.score([prompt], [options])[0], **TOLERANCE)
        row = backbone.encoder.prompt(prompt)
        whole = [backbone.encoder.answered(row, backbone.encoder.answer_ids(option)) for option in options]
        nll_B, _ = backbone.loss(backbone.collate(whole))
        torch.testing.assert_close(scores, (-nll_B).tolist(), **TOLERANCE)


def test_greedy_answers_do_not_depend_on_the_batch(backbone: TransformersBackbone, prompts: list[Conversation]) -> None:
    together = backbone.generate(prompts, max_new_tokens=6)
    assert together == [backbone.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_a_greedy_answer_is_the_likeliest_token_by_token(
    backbone: TransformersBackbone, prompts: list[Conversation]
) -> None:
    row = backbone.encoder.prompt(prompts[0])
    ids: list[int] = []
    for _ in range(4):
        batch = backbone.collate([backbone.encoder.answered(row, ids)])
        last = torch.tensor([batch["input_ids"].shape[1] - 1])
        token = int(backbone.logits(batch, last)[0].argmax())
        if token in backbone.ends:
            break
        ids.append(token)
    assert backbone.generate(prompts[:1], max_new_tokens=4) == [backbone.encoder.decode(ids)]


@pytest.mark.parametrize("members", [(0,), (2,), (0, 1, 2)], ids=["image", "text", "mixed"])
def test_a_gradient_reaches_every_lora_b(
    backbone: TransformersBackbone, rows: list[Row], members: tuple[int, ...]
) -> None:
    live = backbone.trainable()
    nll_B, _ = backbone.loss(backbone.collate([rows[i] for i in members]), dropout_seeds=list(members))
    gradients = torch.autograd.grad(nll_B.sum(), list(live.values()))
    assert all(float(g.abs().sum()) > 0 for g in gradients)
    assert not any(p.requires_grad for p in set(backbone.base.parameters()) - set(live.values()))


def test_lora_lies_on_the_language_model_s_attention_alone(backbone: TransformersBackbone) -> None:
    layers = set()
    for name in backbone.lora():
        assert re.fullmatch(
            r"base_model\.model\.(model\.language_model|model\.text_model|llm\.model)\.layers\.\d+\."
            r"(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_qkv|out_proj))\.lora_[AB]\.weight",
            name,
        )
        layers.add(backbone.layer_of(name))
    assert layers == set(range(backbone.num_layers))


def test_lora_comes_back_as_it_was_put_in(backbone: TransformersBackbone) -> None:
    before = backbone.lora()
    try:
        drawn = {name: torch.randn(t.shape) for name, t in before.items()}
        backbone.set_lora(drawn)
        after = backbone.lora()
        assert list(after) == sorted(drawn)
        assert all(torch.equal(after[name], drawn[name]) for name in drawn)
        next(iter(after.values())).zero_()  # a copy: the model must not notice
        assert all(torch.equal(t, drawn[name]) for name, t in backbone.lora().items())
    finally:
        backbone.set_lora(before)


def test_an_adapter_of_other_names_or_shapes_is_refused(backbone: TransformersBackbone) -> None:
    params = backbone.lora()
    name = next(iter(params))
    with pytest.raises(FedmllmError, match=re.escape(name)):
        backbone.set_lora({k: v for k, v in params.items() if k != name})
    with pytest.raises(FedmllmError, match="differ"):
        backbone.set_lora({**params, "base_model.model.unknown.lora_A.weight": params[name]})
    with pytest.raises(FedmllmError, match=re.escape(name)):
        backbone.set_lora({**params, name: params[name][:, :-1]})


def test_dropout_of_a_row_depends_on_its_seed_alone(backbone: TransformersBackbone, rows: list[Row]) -> None:
    alone = torch.cat([backbone.loss(backbone.collate([row]), [7 + i])[0] for i, row in enumerate(rows)])
    for order in itertools.permutations(range(len(rows))):
        nll_B, _ = backbone.loss(backbone.collate([rows[i] for i in order]), [7 + i for i in order])
        torch.testing.assert_close(nll_B, alone[list(order)], **TOLERANCE)
    other, _ = backbone.loss(backbone.collate(rows), [8, 9, 10])
    off, _ = backbone.loss(backbone.collate(rows))
    assert (other - alone).abs().min() > 1e-4
    assert (off - alone).abs().min() > 1e-4


def test_a_saved_adapter_is_peft_s_own(
    backbone: TransformersBackbone, rows: list[Row], tmp_path: Path, folder_of: Callable[[str], Path], family: str
) -> None:
    backbone.save(tmp_path)
    base, _, _ = load_base(FromFolder(path=str(folder_of(family))))
    theirs = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    row = rows[1]
    tokens = {key: value.unsqueeze(value.ndim - 1) for key, value in row.per_token.items()}
    arguments = {"input_ids": row.input_ids[None], **row.images, **tokens}
    with torch.no_grad():
        assert torch.equal(theirs(**arguments).logits, backbone.base(**arguments).logits)


def test_loading_is_deterministic_and_leaves_the_global_random_state(
    folder_of: Callable[[str], Path], family: str
) -> None:
    spec = FromFolder(path=str(folder_of(family)))
    state = torch.get_rng_state()
    first = load_folder(spec, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    again, other = load_folder(spec, seed=3), load_folder(spec, seed=4)
    assert all(torch.equal(t, again.lora()[name]) for name, t in first.lora().items())
    assert first.digest == again.digest == other.digest
    for name, t in first.lora().items():
        if ".lora_B." in name:
            assert not t.any()
        else:
            assert not torch.equal(t, other.lora()[name])
            bound = t.shape[1] ** -0.5  # kaiming-uniform with a = sqrt(5)
            assert 0.9 * bound < float(t.abs().max()) <= bound


def test_cached_image_features_change_nothing_to_the_bit(
    folder_of: Callable[[str], Path], family: str, prompts: list[Conversation]
) -> None:
    off, cached = (
        stirred(load_folder(FromFolder(path=str(folder_of(family)), keep_image_features_mb=mb), seed=0))
        for mb in (0, 1)
    )
    rows = [off.encode(prompt, "yes") for prompt in prompts]
    nll_B, _ = off.loss(off.collate(rows), [1, 2, 3])
    for _ in range(2):  # the second time without the tower
        again_B, _ = cached.loss(cached.collate(rows), [1, 2, 3])
        assert torch.equal(nll_B, again_B)
        cached.features._tower = lambda **_: pytest.fail("the tower ran again")


def test_no_mask_is_needed_because_padding_is_never_seen(
    backbone: TransformersBackbone, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backbone.encoder.family not in CAUSAL:
        assert "attention_mask" in backbone.collate(rows)
        return
    without = backbone.collate(rows)
    assert "attention_mask" not in without
    monkeypatch.setattr("fedmllm.backbones.hf.CAUSAL", frozenset())
    masked = backbone.collate(rows)
    assert masked["attention_mask"].sum(dim=1).tolist() == [row.num_tokens for row in rows]
    torch.testing.assert_close(backbone.loss(without)[0], backbone.loss(masked)[0], **TOLERANCE)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 0, 1), (1, 1)], ids=lambda order: "".join(map(str, order)))
def test_each_picture_of_a_prompt_may_be_imagined(
    backbone: TransformersBackbone, pictures: tuple[Picture, Picture], order: tuple[int, ...], tmp_path: Path
) -> None:
    """The tower's output is replaced where a picture is imagined (1), and is the tower's own otherwise (0)."""
    blank = tmp_path / "blank.png"
    Image.new("RGB", (CANVAS, CANVAS), "white").save(blank)
    paths = [tmp_path / f"made{i}{FEATURES}" if made else pictures[0].path for i, made in enumerate(order)]
    own = backbone.picture_vectors(blank)
    for i, path in enumerate(paths):
        if path.suffix == FEATURES:
            write_tensors(path, {"vectors": torch.full_like(own, float(i + 1))})
    row = backbone.encode(Conversation((*map(Picture, paths), "Which?")), "yes")
    real = [Picture(blank) if path.suffix == FEATURES else Picture(path) for path in paths]
    with_blanks = backbone.encode(Conversation((*real, "Which?")), "yes")
    assert row.input_ids.tolist() == with_blanks.input_ids.tolist()
    expected, left = backbone.features.vectors(with_blanks).clone(), 0
    for i, path in enumerate(paths):
        count = len(own) if path.suffix == FEATURES else len(backbone.picture_vectors(path))
        if path.suffix == FEATURES:
            expected[left : left + count] = float(i + 1)
        left += count
    assert torch.equal(backbone.features.vectors(row), expected)
    nll_B, _ = backbone.loss(backbone.collate([row, with_blanks]))
    assert torch.isfinite(nll_B).all()
    assert nll_B[0] != nll_B[1]
