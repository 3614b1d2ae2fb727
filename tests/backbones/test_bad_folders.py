"""Bad model folders and settings, and their error messages."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmllm.backbones.base import FromFolder, Lora, Precision
from fedmllm.backbones.hf import TransformersBackbone, load_folder
from fedmllm.core.errors import ConfigError, DataError, FedmllmError
from fedmllm.core.types import Conversation, Picture


@pytest.fixture
def folder(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a llava folder, to be broken."""
    return Path(shutil.copytree(folder_of("llava"), tmp_path / "model"))


def load(folder: Path, **settings: Any) -> TransformersBackbone:
    return load_folder(FromFolder(path=str(folder), **settings), seed=0)


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FedmllmError, match=r"nowhere is not a folder; give a model folder, or hub:owner/name"):
        load(tmp_path / "nowhere")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FedmllmError, match=r"is not a model folder: it has no config\.json$"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FedmllmError, match="holds a LoRA adapter: give the folder of its base model"):
        load(tmp_path)


def test_an_adapter_next_to_a_model(folder: Path) -> None:
    """transformers loaded the model that the adapter names, merged with it; the digest was that of this folder."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    with pytest.raises(
        FedmllmError, match=r"adapter_config\.json: a LoRA adapter next to a model; .*backbone\.adapter"
    ):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": 3}', "\xff\xfe"])
def test_a_config_without_a_family(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(FedmllmError, match=r"config\.json: not a model's configuration"):
        load(folder)


@pytest.mark.parametrize(
    ("family", "hint"), [("qwen2", "such as: minicpmv"), ("llama", "such as"), ("qwen2-vl", "did you mean 'qwen2_vl'?")]
)
def test_a_model_that_reads_no_pictures(folder: Path, family: str, hint: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(FedmllmError) as error:
        load(folder)
    assert f"model_type '{family}' is not a family that reads pictures and text" in str(error.value)
    assert hint in str(error.value)


def test_a_family_whose_forward_pass_takes_no_features(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "kosmos-2"}))
    with pytest.raises(FedmllmError, match="kosmos-2"):
        load(folder)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (("tokenizer.json",), "the tokenizer is missing"),
        (("preprocessor_config.json", "processor_config.json"), "the settings of its image processor are missing"),
        (("chat_template.jinja",), "no chat template"),
        (("model.safetensors",), "no *.safetensors"),
    ],
)
def test_a_missing_file(folder: Path, missing: tuple[str, ...], said: str) -> None:
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(FedmllmError) as error:
        load(folder)
    assert str(folder) in str(error.value)
    assert said in str(error.value)


def test_weights_in_a_format_that_may_run_code(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FedmllmError, match="they may run code"):
        load(folder)


def test_weights_of_another_model(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.1" in name and "q_proj.weight" in name)
    for kind, changed in {
        "missing": {k: v for k, v in weights.items() if k != name},
        "unexpected": {**weights, "model.unknown.weight": weights[name].clone()},
        "mismatched": {**weights, name: weights[name][:-1].clone()},
    }.items():
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(FedmllmError) as error:
            load(folder)
        assert str(folder) in str(error.value)
        assert ("unknown" if kind == "unexpected" else "layers.1") in str(error.value)


def test_a_truncated_weight_file(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(FedmllmError, match="its weights cannot be loaded"):
        load(folder)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("q_proj", "matches no module"),
        (r".*\.q_proj", "also matches 'model.vision_tower"),
        (r"model\.language_model\.layers\.0\.mlp", "a Qwen2MLP, not a linear layer"),
        ("(", "not a regular expression"),
    ],
)
def test_lora_targets_that_do_not_fit(folder: Path, targets: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(folder, lora=Lora(targets=targets))
    assert str(error.value).startswith("lora.targets: ")
    assert said in str(error.value)
    if said.startswith("matches no"):
        assert "'layers.N.self_attn.q_proj'" in str(error.value)  # what would be right


@pytest.mark.parametrize(
    ("name", "said"),
    [("embed_token", "did you mean 'embed_tokens'?"), ("layers", "modules have this name")],
)
def test_whole_modules_that_are_not_there(folder: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(folder, lora=Lora(train_extra=(name,)))
    assert f"lora.train_extra: '{name}'" in str(error.value)
    assert said in str(error.value)


def test_a_device_that_is_not_here(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"backbone\.device: got 'cuda:99'"):
        load(folder, device="cuda:99")
    with pytest.raises(ConfigError, match=r"backbone\.device: got 'gpu'"):
        load(folder, device="gpu")


def test_a_prompt_over_the_limit_is_never_cut(folder: Path, prompts: list[Conversation]) -> None:
    backbone = load(folder, max_tokens=49)
    with pytest.raises(FedmllmError, match=r"a row has 5\d tokens, over max_tokens = 49; it is never cut.*small\.png"):
        backbone.encode(prompts[0], "yes")
    with pytest.raises(FedmllmError, match="over max_tokens = 49"):
        backbone.score(prompts[1:2], [("A", "B")])
    with pytest.raises(FedmllmError, match="over max_tokens = 49"):
        backbone.generate(prompts[1:2], 3)


def test_a_template_without_a_slot_for_pictures(folder: Path, prompts: list[Conversation]) -> None:
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<image>", ""))
    with pytest.raises(FedmllmError, match=r"llava cannot read this prompt, pictures .*small\.png"):
        load(folder).encode(prompts[0], "yes")


def test_a_picture_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.png is not there"):
        load(folder).encode(Conversation((Picture(tmp_path / "nothing.png"), "?")), "yes")


def test_an_empty_choice(folder: Path, prompts: list[Conversation]) -> None:
    with pytest.raises(FedmllmError, match="an empty choice has no likelihood"):
        load(folder).score(prompts[:1], [("A", "")])


def test_no_network_is_asked(folder: Path, prompts: list[Conversation], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while loading, not at the first pass, and not for a path that is not there, even if the hub has such a name."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    backbone = load(folder)
    backbone.score(prompts[:1], [("A", "B")])
    backbone.save(folder / "adapter")
    with pytest.raises(FedmllmError, match="is not a folder"):
        load(Path("openbmb/MiniCPM-V-2_6"))


def test_only_the_prefix_asks_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked = []

    def fetch(name: str, **_: object) -> str:
        asked.append(name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    backbone = load_folder(FromFolder(path="hub:owner/name"), seed=0)
    assert asked == ["owner/name"]
    assert backbone.model.peft_config["default"].base_model_name_or_path == "owner/name"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(FedmllmError, match="hub:owner/name cannot be fetched"):
        load_folder(FromFolder(path="hub:owner/name"), seed=0)


def test_four_bits_without_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedmllm\[nf4\]'"):
        load(folder, precision=Precision(base="nf4"))
