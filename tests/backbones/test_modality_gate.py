"""The modality gate: identity at the start, what its vectors do, engines, travel, and refusals."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmllm.backbones.base import FromFolder, Lora, Precision, Tiny
from fedmllm.backbones.export import export
from fedmllm.backbones.hf import TransformersBackbone, load_folder
from fedmllm.backbones.modality_gate import GATE_SUFFIX
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.tensors import num_bytes
from fedmllm.core.types import Params
from fedmllm.data.prompts import Plain
from fedmllm.runs.predict import predict
from fedmllm.runs.predictions import choice_probabilities, read_predictions
from fedmllm.runs.result import load_run
from fedmllm.runs.run import run
from fedmllm.testing import examples, federation
from support.runs import Stop, events, experiment
from support.small_federation import assert_same, gradients_off, one_after_another, stirred, together

GATE = Lora(modality_gate=True)
IMAGE, TEXT = frozenset({"image"}), frozenset({"text"})


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory):
    return examples(tmp_path_factory.mktemp("pictures"))[:4]


@pytest.fixture(scope="module")
def gated() -> TransformersBackbone:
    return Tiny(lora=GATE).load(seed=0)  # type: ignore[return-value]


def is_gate(name: str) -> bool:
    return name.endswith(GATE_SUFFIX)


def losses(backbone: TransformersBackbone, rows, visible: frozenset[str]) -> torch.Tensor:
    batch = backbone.collate([backbone.encode(Plain().render(row, visible), row.answer) for row in rows])
    return backbone.loss(batch)[0]


def test_at_the_start_it_is_the_model_without_a_gate(gated, rows):
    plain = Tiny().load(seed=0)
    extra = gated.lora().keys() - plain.lora().keys()
    assert len(extra) == gated.num_layers == sum(map(is_gate, gated.lora()))
    assert {gated.layer_of(name) for name in extra} == set(range(gated.num_layers))
    for visible in (IMAGE | TEXT, IMAGE, TEXT, frozenset[str]()):
        prompts, choices = [Plain().render(row, visible) for row in rows], [row.choices for row in rows]
        assert torch.equal(losses(gated, rows, visible), losses(plain, rows, visible))  # type: ignore[arg-type]
        assert gated.score(prompts, choices) == plain.score(prompts, choices)
    assert gated.generate(prompts, 4) == plain.generate(prompts, 4)


def filled(backbone: TransformersBackbone, text: float, picture: float) -> Params:
    """The adapter with a gate of random vectors, multiplied with a number for each modality."""
    noise = torch.Generator().manual_seed(0)
    params = backbone.lora()
    for name in filter(is_gate, params):
        vector = torch.randn(params[name].shape[1], generator=noise)
        params[name] = torch.stack([text * vector, picture * vector])
    return params


def test_equal_vectors_are_a_bias_of_the_keys(gated, rows):
    plain = Tiny().load(seed=0)
    params, start = filled(gated, 0.5, 0.5), gated.lora()
    gated.set_lora(params)
    with torch.no_grad():
        for name, vectors in params.items():
            if is_gate(name):
                place = name.removeprefix("base_model.model.").removesuffix(GATE_SUFFIX)
                plain.base.get_submodule(place).base_layer.bias += vectors[0]  # type: ignore[attr-defined]
    for visible in (IMAGE | TEXT, TEXT):
        assert torch.allclose(losses(gated, rows, visible), losses(plain, rows, visible), rtol=1e-5)  # type: ignore[arg-type]
    gated.set_lora(start)


def test_an_absent_modality_neither_counts_nor_learns(gated, rows):
    start = gated.lora()
    gated.set_lora(filled(gated, 0.5, 0.0))
    without = losses(gated, rows, TEXT).detach()
    gated.set_lora(filled(gated, 0.5, 3.0))
    loss = losses(gated, rows, TEXT)
    assert torch.equal(loss.detach(), without)
    assert not torch.allclose(losses(gated, rows, IMAGE | TEXT), loss)
    weights = {name: w for name, w in gated.trainable().items() if is_gate(name)}
    for visible, moves in ((TEXT, False), (IMAGE | TEXT, True)):
        grads = torch.autograd.grad(losses(gated, rows, visible).sum(), list(weights.values()))
        assert all(bool(grad[1].any()) == moves for grad in grads)
        assert all(grad[0].any() for grad in grads)
    gated.set_lora(start)


def test_scores_with_a_cache_are_those_of_a_whole_pass(gated, rows):
    start = gated.lora()
    gated.set_lora(filled(gated, -1.0, 2.0))
    prompts = [Plain().render(row, IMAGE | TEXT) for row in rows]
    options = ["yes it is", "no"]
    scores = gated.score(prompts, [options] * len(rows))
    end = gated.encoder.end_of_turn
    for prompt, found in zip(prompts, scores, strict=True):
        for option, score in zip(options, found, strict=True):
            row = gated.encode(prompt, option)
            row = replace(row, labels=torch.where(row.input_ids == end, -100, row.labels))  # choices have no end
            assert -gated.loss(gated.collate([row]))[0].item() == pytest.approx(score, abs=1e-4)
    frozen = gated.generate_frozen(prompts[:1], 4)
    gated.set_lora(start)
    assert frozen == gated.generate(prompts[:1], 4)  # a frozen answer is one without the gate


def test_checkpointing_changes_no_bit_of_the_gradient(gated, rows):
    recomputed = Tiny(lora=GATE, precision=Precision(gradient_checkpointing=True)).load(seed=0)
    start, found = gated.lora(), []
    for backbone in (gated, recomputed):
        backbone.set_lora(filled(gated, -1.0, 2.0))
        loss = losses(backbone, rows, IMAGE | TEXT).sum()
        found.append(torch.autograd.grad(loss, list(backbone.trainable().values())))
        gated.set_lora(start)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_saved_run_predicts_with_its_gate(tmp_path: Path):
    """New rows get the predictions of the run's own evaluation, which differ from those with the gate at zero."""
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "text", "answer"])
        for row in examples(tmp_path)[:8]:
            (path,) = row.fields["image"]
            writer.writerow([row.id, Path(path).name, row.fields["text"], row.answer])
    file_ = str(tmp_path / "rows.csv")
    data = {
        "name": "table", "root": str(tmp_path), "train": file_, "test": file_, "question": "Is it?", "judged_by": ["accuracy"],
        "choices": ["no", "yes"], "columns": {"id": "id", "image": "image", "text": "text", "answer": "answer"},
    }  # fmt: skip
    table = {"data": data, "backbone": {"name": "tiny", "lora": {"modality_gate": True}}, "num_rounds": 1}
    run(experiment(**table, partition={"name": "iid", "num_clients": 2}), tmp_path / "run")
    (kept, *_) = read_predictions(tmp_path / "run" / "predictions.jsonl.gz")
    found = [row["p"]["yes"] for row in predict(tmp_path / "run", file_)]
    assert found == pytest.approx([choice_probabilities(p)[1] for p in kept.predictions], abs=1e-6)
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    save_file({n: t * (not is_gate(n)) for n, t in load_file(file).items()}, file)
    assert found != [row["p"]["yes"] for row in predict(tmp_path / "run", file_)]


def test_engines_agree(tmp_path: Path):
    clients = federation(Tiny(lora=GATE).load(seed=0), examples(tmp_path))
    assert max(gradients_off(clients)) < 1e-5
    wide = replace(clients, backbone=Tiny(lora=GATE, precision=Precision(base="float64")).load(seed=0))
    start = stirred(wide.backbone)
    assert_same(one_after_another(wide, start), together(wide, start), 1e-9)


def test_it_travels_with_the_adapter(tmp_path: Path):
    table = {"backbone": {"name": "tiny", "lora": {"modality_gate": True}}, "num_rounds": 2}
    plain, gated = experiment(num_rounds=2), experiment(**table)
    assert gated.run_id() != plain.run_id()
    assert gated.method_name() == "fedavg+modality-gate"
    run(gated, tmp_path / "gated")
    adapter = load_run(tmp_path / "gated").adapter.tensors
    gate = {name: t for name, t in adapter.items() if is_gate(name)}
    assert all(t.any() for t in gate.values())
    rounds = events(tmp_path / "gated", "round")
    assert all(e["up_bytes"] - e["up_lora_bytes"] == len(e["clients"]) * num_bytes(gate) for e in rounds)
    with pytest.raises(KeyboardInterrupt):
        run(gated, tmp_path / "again", [Stop("round", 2)])
    run(gated, tmp_path / "again", resume=True)
    assert all(torch.equal(t, adapter[n]) for n, t in load_run(tmp_path / "again").adapter.tensors.items())
    config = json.loads((tmp_path / "gated" / "adapter" / "adapter_config.json").read_text())
    assert config["modality_gate"] is True
    more = {"name": "tiny", "lora": {"modality_gate": True}, "adapter": str(tmp_path / "gated" / "adapter")}
    run(experiment(backbone=more, num_rounds=1), tmp_path / "more")  # training continues from it
    with pytest.raises(FedmllmError, match=r"4 unknown tensors, such as .*modality_gate"):
        run(experiment(backbone={**more, "lora": {}}, num_rounds=1), tmp_path / "other")
    with pytest.raises(FedmllmError, match="no weight of the base can hold them"):
        export(tmp_path / "gated", tmp_path / "merged")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_other_families(family: str, folder_of, loaded, prompts):
    plain = loaded(family)
    gated = load_folder(FromFolder(path=str(folder_of(family)), lora=GATE), seed=0)
    before = plain.lora()
    gated.set_lora({**gated.lora(), **before})
    choices = [["yes", "no"]] * len(prompts)
    assert gated.score(prompts, choices) == plain.score(prompts, choices)
    gated.set_lora(filled(gated, 0.0, 2.0) | before)
    scores = gated.score(prompts, choices)
    off = [a != b for a, b in zip(scores, plain.score(prompts, choices), strict=True)]
    assert off == [bool(prompt.pictures) for prompt in prompts]


def test_a_model_without_key_projections_is_refused(folder_of):
    with pytest.raises(ConfigError, match=r"backbone.lora.modality_gate: layer \d+ of .* has 0 modules attn.k_proj"):
        load_folder(FromFolder(path=str(folder_of("qwen3_5")), lora=GATE), seed=0)
