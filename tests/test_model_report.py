"""doctor and estimate: figures against what is really allocated, and against what is publicly known of the real model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedmllm.backbones.base import FromFolder, Lora, Precision
from fedmllm.backbones.footprint import footprint
from fedmllm.backbones.hf import load_folder
from fedmllm.backbones.model_checks import NAMES
from fedmllm.cli.models import doctor, estimate
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.core.types import Conversation
from fedmllm.runs.resources import estimate as estimated
from support.tiny_families import write

FAMILIES = ["llava", "qwen3_vl", "minicpmv4_6", "gemma3", "internvl"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: write(family, root / family) for family in FAMILIES}


@pytest.fixture
def real_2_6(shared: Path, tmp_path: Path) -> Path:
    """A folder with nothing but the config.json of openbmb/MiniCPM-V-2_6: its sizes are public."""
    config = json.loads((shared / "parity" / "minicpmv26" / "config.json").read_text())
    config |= {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    config |= {"intermediate_size": 18944, "vocab_size": 151666, "query_num": 64}
    vision = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
    config["vision_config"] = vision | {"image_size": 980, "patch_size": 14, "model_type": "siglip"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_a_modality_gate_is_counted(folders: dict[str, Path], family: str) -> None:
    spec = FromFolder(path=str(folders[family]), lora=Lora(modality_gate=True))
    sizes, live = footprint(folders[family], spec), load_folder(spec, seed=0).trainable()
    gate = sum(p.numel() for name, p in live.items() if name.endswith(".modality_gate"))
    assert sizes.trained["modality gate"] == gate > 0
    assert sizes.num_trained == sum(p.numel() for p in live.values())


def experiment(folder: Path, **settings: Any) -> Experiment:
    backbone = {"name": "hf", "path": str(folder), **settings.pop("backbone", {})}
    return Experiment.parse({"data": "synthetic-irony", "backbone": backbone, **settings})


def test_the_real_minicpm_v_2_6_from_its_configuration(real_2_6: Path) -> None:
    """8.1 B weights; 5.0 M of LoRA, 544 M embeddings and 69 M resampler are what the reference trained and sent."""
    backbone = {"precision": {"base": "bfloat16"}, "lora": {"train_extra": ["embed_tokens", "resampler"]}}
    sizes, memory, traffic = estimated(experiment(real_2_6, backbone=backbone))
    assert round(sizes.num_weights / 1e9, 2) == 8.10
    assert sizes.base_bytes == 2 * sizes.num_weights
    assert sizes.trained["LoRA"] == 28 * 8 * 2 * (3584 + 3584 + 3584 + 512)  # q, o: 3584 -> 3584; k, v: -> 512
    assert [round(sizes.trained[name] / 1e6) for name in ("embed_tokens", "resampler")] == [544, 69]
    assert {p.name: round(p.num_weights / 1e6) for p in sizes.parts} == {
        "embeddings": 544,
        "language model": 6526,
        "language-model head": 544,
        "vpm": 418,
        "resampler": 69,
    }
    assert sum(line.num_bytes for line in traffic if line.part == "a round") == 4 * sizes.num_trained * 2 * 2
    activations = next(line.num_bytes for line in memory if line.part == "activations")
    assert 5e6 < activations / 1200 < 8e6  # bytes a token: on a GPU of 80 GB some 10,000 tokens next to the weights
    nf4 = footprint(real_2_6, FromFolder(path=str(real_2_6), precision=Precision(base="nf4"), device="cuda"))
    assert 5.8e9 < nf4.base_bytes < 6.2e9  # embeddings and head stay in bfloat16: 2.2 GB of it


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_an_estimate_is_what_is_allocated(folders: dict[str, Path], family: str, base: str) -> None:
    spec = FromFolder(path=str(folders[family]), precision=Precision.model_validate({"base": base}))
    sizes, backbone = footprint(folders[family], spec), load_folder(spec, 0)
    live = backbone.trainable()
    own = [p for p in backbone.model.parameters() if not any(p is q for q in live.values())]
    assert sizes.num_weights == sum(p.numel() for p in own)
    assert sizes.base_bytes == sum(p.numel() * p.element_size() for p in own)
    assert sizes.num_trained == sum(p.numel() for p in live.values())
    assert sizes.payload_bytes == sum(t.numel() * t.element_size() for t in backbone.lora().values())
    assert len(sizes.targets) == len(live) / 2
    assert sizes.num_layers == backbone.num_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps(folders: dict[str, Path], family: str) -> None:
    """Counted on a real pass over text. gemma3 also keeps its mask, which grows with the square of the length."""
    spec = FromFolder(path=str(folders[family]), max_tokens=4096)
    backbone = load_folder(spec, 0)
    row = backbone.encode(Conversation(("word " * 45,)), "yes")
    weights = {t.untyped_storage()._cdata for t in [*backbone.base.parameters(), *backbone.base.buffers()]}
    found: dict[int, tuple[int, Any]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone.loss(backbone.collate([row]), [1])
    kept = sum(size for key, (size, _) in found.items() if key not in weights)
    expected = footprint(folders[family], spec).activation_bytes * row.num_tokens
    assert expected == pytest.approx(kept, rel=0.25 if family == "gemma3" else 0.05)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bits_are_as_small_as_estimated(folders: dict[str, Path]) -> None:
    spec = FromFolder(path=str(folders["llava"]), precision=Precision(base="nf4"))
    backbone = load_folder(spec, 0)
    from bitsandbytes.nn import Params4bit

    held = 0
    for p in backbone.base.parameters():
        if isinstance(p, Params4bit):
            state = p.quant_state
            held += p.numel() + state.absmax.numel() + 4 * state.state2.absmax.numel()
        elif not p.requires_grad:
            held += p.numel() * p.element_size()
    # a scale of scales is held for every matrix, however small: 256 blocks of 64 weights share it in a large one
    assert footprint(folders["llava"], spec).base_bytes == pytest.approx(held, rel=0.02)


def test_a_stack_of_clients_holds_as_many_adapters(folders: dict[str, Path]) -> None:
    def trained(**settings: Any) -> float:
        lines = estimated(experiment(folders["llava"], **settings))[1]
        return sum(line.num_bytes for line in lines if line.part.startswith(("trained", "gradients")))

    assert trained(engine="stacked", cohort_size=6) == 6 * trained(engine="in-process")


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(doctor)
    app.command()(estimate)
    return app


def test_copies_of_the_model_on_the_cpu_are_added_up_and_on_cards_are_not(folders: dict[str, Path]) -> None:
    def lines(device: str, devices: object) -> dict[str, float]:
        keys = {"name": "hf", "path": str(folders["llava"]), "device": device}
        table = {"data": {"name": "synthetic-irony"}, "backbone": keys, "cohort_size": 5}
        e = Experiment.parse(
            {**table, "partition": {"name": "iid", "num_clients": 9}, "engine": {"name": "stacked", "devices": devices}}
        )
        return {line.part: line.num_bytes for line in estimated(e)[1]}

    one, two, cards = lines("cpu", []), lines("cpu", ["cpu", "cpu"]), lines("cuda", [f"cuda:{n}" for n in range(5)])
    assert two["trained: LoRA"] * 5 == one["trained: LoRA"] * 3  # three of five clients on the first device
    assert cards["trained: LoRA"] * 5 == one["trained: LoRA"]
    assert two["other copies"] == sum(
        size for part, size in two.items() if part not in ("other copies", "kept image features")
    )
    assert "other copies" not in {**one, **cards}


def test_doctor_of_a_good_model(folders: dict[str, Path]) -> None:
    out = CliRunner().invoke(_app(), ["doctor", str(folders["qwen3_vl"])], catch_exceptions=False)
    assert out.exit_code == 0
    assert out.stdout.count(" ok ") == len(NAMES)
    for said in ("qwen3_vl", "LoRA on model.language_model.layers.N.self_attn.k_proj (x2)", "one way, one client"):
        assert said in " ".join(out.stdout.split())


def test_doctor_shows_which_image_settings_of_a_folder_replace_the_family_s(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """InternVL's processor turns tiles on against the folder's own settings."""
    folder = Path(shutil.copytree(folders["internvl"], tmp_path / "model"))
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {"crop_to_patches": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    out = CliRunner().invoke(_app(), ["doctor", str(folder)], catch_exceptions=False)
    said = " ".join(out.stdout.split())
    assert "image setting crop_to_patches = False of the folder replaces the family's default True" in said


def test_doctor_names_what_is_wrong(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that sees padding, say: here one whose positions all shift with the batch."""
    from fedmllm.backbones.hf import TransformersBackbone

    right = TransformersBackbone.collate
    monkeypatch.setattr(
        TransformersBackbone, "collate", lambda self, rows, left=False: right(self, rows, left=True) | {}
    )
    out = CliRunner().invoke(_app(), ["doctor", str(folders["llava"])])
    assert isinstance(out.exception, FedmllmError)
    assert "dropout" in str(out.exception)
    assert "FAILED" in out.stdout


def test_doctor_of_broken_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write("llava", tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "layers.0.self_attn.v_proj.weight" in n and "vision" not in n)
    save_file({**weights, name: weights[name] * float("nan")}, folder / "model.safetensors", metadata={"format": "pt"})
    out = CliRunner().invoke(_app(), ["doctor", str(folder)])
    assert isinstance(out.exception, FedmllmError)
    assert "these checks failed: image, text, mixed" in str(out.exception)


def test_estimate_needs_no_weights(real_2_6: Path, tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text(f'data = "synthetic-irony"\nbackbone = {{ name = "hf", path = "{real_2_6}" }}\n')
    arguments = ["estimate", str(file), "--set", "backbone.precision.base=bfloat16"]
    table = CliRunner().invoke(_app(), arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert "minicpmv: 8.099 B weights, 28 layers, base in bfloat16" in table.stdout
    assert "together" in table.stdout
    out = json.loads(CliRunner().invoke(_app(), [*arguments, "--json"], catch_exceptions=False).stdout)
    assert out["num_weights"] == 8_099_175_152
    assert out["total_memory_bytes"] == sum(out["memory_bytes"].values())


def test_a_configuration_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llava", "text_config": {"model_type": "qwen2", "hidden_size": "x"}}'
    )
    with pytest.raises(FedmllmError, match=r"config\.json: a model \(llava\) cannot be built from it"):
        footprint(tmp_path, FromFolder(path=str(tmp_path)))
