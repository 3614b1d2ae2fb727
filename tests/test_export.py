"""Export of a run: the adapter in its base's weights, and errors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmllm.backbones.base import FromFolder, Lora, Precision
from fedmllm.backbones.export import export
from fedmllm.backbones.hf import TransformersBackbone, load_folder
from fedmllm.core.errors import FedmllmError
from fedmllm.core.types import Conversation
from support.tiny_families import PORTS, stirred, write

FAMILIES = ["qwen2_vl", "gemma3", "minicpmv4_6", *PORTS]
PROMPT = Conversation(("Is it (A) or (B)?",))


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("bases")

    def base(family: str) -> Path:
        if family in PORTS:
            return Path(request.getfixturevalue("shared")) / "parity" / PORTS[family]
        return root / family if (root / family).is_dir() else write(family, root / family)

    return base


def run_of(folder: Path, spec: FromFolder) -> TransformersBackbone:
    """A folder as `fedmllm run` leaves it: heading and adapter."""
    backbone = stirred(load_folder(spec, seed=0))
    backbone.save(folder / "adapter")
    settings = {"backbone": spec.model_dump(mode="json")}
    head = {"event": "experiment", "settings": settings, "digests": {"base": backbone.digest}}
    (folder / "record.jsonl").write_text(json.dumps(head) + "\n")
    return backbone


def logits(backbone: TransformersBackbone) -> torch.Tensor:
    batch = backbone.collate([backbone.encode(PROMPT, "yes")])
    with torch.no_grad():
        return backbone.logits(batch, torch.arange(batch["input_ids"].numel()))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_equals_base_and_adapter(base_of: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    backbone = run_of(tmp_path / "run", FromFolder(path=str(base_of(family))))
    before = os.umask(0o022)
    merged = export(tmp_path / "run", tmp_path / "merged")
    os.umask(before)
    alone = load_folder(FromFolder(path=str(merged)), seed=9)  # its own B is zero: the merged weights alone speak
    torch.testing.assert_close(logits(alone), logits(backbone), rtol=1e-5, atol=1e-4)
    assert float((logits(alone) - logits(load_folder(FromFolder(path=str(base_of(family))), 0))).abs().max()) > 0.05
    assert {file.stat().st_mode & 0o777 for file in merged.iterdir()} == {0o644}  # of the usual umask
    for file in base_of(family).iterdir():
        if file.suffix != ".safetensors":
            assert (merged / file.name).read_bytes() == file.read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_type_of_the_checkpoint_is_kept(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    """And B A is added before rounding: to the nearest bfloat16 of the float32 sum."""
    base = Path(shutil.copytree(base_of("llava"), tmp_path / "base"))
    weights = {name: t.bfloat16() for name, t in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    lora = Lora(r=2, alpha=6.0)
    backbone = run_of(tmp_path / "run", FromFolder(path=str(base), lora=lora, precision=Precision(base="bfloat16")))
    merged = load_file(export(tmp_path / "run", tmp_path / "merged") / "model.safetensors")
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    name = next(name for name in weights if name.endswith("layers.1.self_attn.v_proj.weight") and "vision" not in name)
    adapter = backbone.lora()
    prefix = next(n for n in adapter if "layers.1.self_attn.v_proj.lora_A" in n).removesuffix("lora_A.weight")
    delta = adapter[prefix + "lora_B.weight"] @ adapter[prefix + "lora_A.weight"] * (6.0 / 2)
    assert torch.equal(merged[name], (weights[name].float() + delta).bfloat16())


def test_whole_modules_are_merged_too(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    spec = FromFolder(path=str(base_of("minicpmv2.6")), lora=Lora(train_extra=("embed_tokens", "resampler")))
    backbone = run_of(tmp_path / "run", spec)
    backbone.set_lora({n: t if ".lora_" in n else t + 0.01 for n, t in backbone.lora().items()})
    backbone.save(tmp_path / "run" / "adapter")
    merged = export(tmp_path / "run", tmp_path / "merged")
    alone = load_folder(FromFolder(path=str(merged)), seed=9)
    torch.testing.assert_close(logits(alone), logits(backbone), rtol=1e-5, atol=1e-4)


def test_what_is_no_run_or_has_no_adapter(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(FedmllmError, match=r"has no record\.jsonl"):
        export(tmp_path, tmp_path / "merged")
    (tmp_path / "record.jsonl").write_text("{}\n")
    with pytest.raises(FedmllmError, match=r"record\.jsonl:1: not the heading of a run"):
        export(tmp_path, tmp_path / "merged")
    run_of(tmp_path / "run", FromFolder(path=str(base_of("llava"))))
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(FedmllmError, match=r"no adapter_model\.safetensors; the run has not ended"):
        export(tmp_path / "run", tmp_path / "merged")


def test_another_base_is_refused_and_another_place_is_not(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(base_of("llava"), tmp_path / "base"))
    run_of(tmp_path / "run", FromFolder(path=str(base)))
    weights = load_file(base / "model.safetensors")
    save_file({name: t + 0.001 for name, t in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    for named in (None, base):
        with pytest.raises(FedmllmError, match=r"is not the model that .* was trained on"):
            export(tmp_path / "run", tmp_path / "merged", base=named)
    shutil.rmtree(base)
    with pytest.raises(FedmllmError, match="is not a folder"):
        export(tmp_path / "run", tmp_path / "merged")
    with pytest.raises(FedmllmError, match=r"is not the model that .* was trained on"):
        export(tmp_path / "run", tmp_path / "merged", base=base_of("qwen2_vl"))
    export(tmp_path / "run", tmp_path / "merged", base=base_of("llava"))
    with pytest.raises(FedmllmError, match="exists; name a folder that does not"):
        export(tmp_path / "run", tmp_path / "merged", base=base_of("llava"))


def test_an_adapter_of_another_shape_is_refused(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    run_of(tmp_path / "run", FromFolder(path=str(base_of("llava"))))
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    save_file({name: t[:, :-1].contiguous() for name, t in load_file(file).items()}, file)
    with pytest.raises(FedmllmError, match="does not fit its base"):
        export(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_that_cannot_be_written_is_named(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    run_of(tmp_path / "run", FromFolder(path=str(base_of("qwen2_vl"))))
    (tmp_path / "f").write_text("")
    for out in (tmp_path / "f" / "x", tmp_path / ("n" * 300)):
        with pytest.raises(FedmllmError, match=f"{out}: cannot be written: "):
            export(tmp_path / "run", out)
