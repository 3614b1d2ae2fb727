"""The digest of a base model: everything that changes what it reads or computes, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmllm.backbones.base import FromFolder
from fedmllm.backbones.folder import folder_digest, is_digest_of
from fedmllm.backbones.hf import load_folder
from fedmllm.core.types import Conversation


@pytest.fixture
def folder(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder_of("internvl"), tmp_path / "model"))


READ = {
    "preprocessor_config.json": lambda text: json.dumps(json.loads(text) | {"max_patches": 2}),
    "processor_config.json": lambda text: json.dumps(json.loads(text) | {"image_seq_length": 16}),
    "chat_template.jinja": lambda text: text + "!",
    "tokenizer.json": lambda text: text.replace("<|im_end|>", "<|im_stop|>"),
    "tokenizer_config.json": lambda text: text.replace("<pad>", "<bos>"),
    "generation_config.json": lambda _: '{"eos_token_id": 7}',
    "config.json": lambda text: text + " ",
    "model.safetensors": None,
    "merges.txt": lambda _: "a b",
    "tokenizer.model": lambda _: "a b",
    "qwen.tiktoken": lambda _: "a b",
    "vocab.bpe": lambda _: "a b",
    "tekken.json": lambda _: "{}",
    "chat_template.json": lambda _: "{}",
    "special_tokens_map.json": lambda _: "{}",
    "model-00002-of-00002.safetensors": lambda _: "x",
    "added_tokens.json": lambda _: "{}",
    "additional_chat_templates/tool_use.jinja": lambda _: "x",
}


@pytest.mark.parametrize("name", READ)
def test_a_change_of_what_the_model_reads_changes_the_digest(folder: Path, name: str) -> None:
    before, file, change = folder_digest(folder), folder / name, READ[name]
    file.parent.mkdir(exist_ok=True)
    if change is None:
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    else:
        file.write_text(change(file.read_text() if file.is_file() else ""))
    assert folder_digest(folder) != before


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE", ".gitattributes", "video_preprocessor_config.json", "trainer_state.json", "a.png"]
)
def test_other_files_do_not(folder: Path, name: str) -> None:
    before = folder_digest(folder)
    (folder / name).write_text("something")
    assert folder_digest(folder) == before


def test_a_name_counts_as_well_as_a_content(folder: Path) -> None:
    before = folder_digest(folder)
    (folder / "chat_template.jinja").rename(folder / "chat_template_2.jinja")
    assert folder_digest(folder) != before


def test_a_copy_has_the_same_digest(folder: Path, tmp_path: Path) -> None:
    assert folder_digest(Path(shutil.copytree(folder, tmp_path / "copy"))) == folder_digest(folder)


def test_a_digest_of_an_earlier_version_is_compared_as_it_was_made(folder: Path) -> None:
    """sha256 over "NAME SHA256" lines of config.json and the weights."""
    lines = [
        f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}"
        for name in ("config.json", "model.safetensors")
    ]
    old = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert folder_digest(folder).startswith("v2:")
    assert folder_digest(folder) != old
    assert is_digest_of(old, folder)
    assert is_digest_of(folder_digest(folder), folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert not is_digest_of(old, folder)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("crop", [True, False])
def test_the_image_settings_of_a_folder_win_over_the_family_s_defaults(
    folder: Path, prompts: list[Conversation], name: str, crop: bool
) -> None:
    """InternVL's class turns tiles on: a picture of 50 x 90 is two tiles and a thumbnail of four tokens each."""
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {"crop_to_patches": crop}
    if name == "preprocessor_config.json":
        (folder / name).write_text(json.dumps(settings))
    else:
        processor = json.loads((folder / name).read_text()) | {"image_processor": settings}
        (folder / name).write_text(json.dumps(processor))
        (folder / "preprocessor_config.json").unlink()
    backbone = load_folder(FromFolder(path=str(folder)), seed=0)
    row = backbone.encoder.prompt(Conversation((prompts[1].pictures[0], "What is it?")))
    slot = backbone.encoder.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    tiles = int((row.input_ids == slot).sum()) // 4
    assert tiles == len(row.images["pixel_values"])
    assert tiles == (3 if crop else 1)
    assert backbone.replaced_defaults == ({} if crop else {"crop_to_patches": (True, False)})
