"""Features of pictures in a folder: the bits that were put there, or nothing, whatever happens to the files."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fedmllm.backbones.base import BackboneSpec, FromFolder, Precision
from fedmllm.backbones.cache import feature_folder
from fedmllm.backbones.cache import features as features_module
from fedmllm.backbones.cache.feature_folder import FeatureFolder
from fedmllm.backbones.hf import TransformersBackbone, load_folder
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError
from fedmllm.core.types import Example
from support.small_federation import federation, flat, stirred, together


def outputs(seed: int = 0) -> list[Any]:
    """The forms that towers of the tested families answer in, in four types; one tensor is not contiguous."""
    noise = torch.Generator().manual_seed(seed)
    wide = torch.randn(6, 4, generator=noise, dtype=torch.float64)
    return [
        wide.bfloat16(),
        BaseModelOutputWithPooling(pooler_output=[wide.float(), wide.half()], last_hidden_state=wide.T),
        {"image_embeds": (wide,), "deepstack_features": [[wide], [wide.float()]]},
    ]


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in (value.values() if isinstance(value, dict) else value) for t in tensors(v)]


@pytest.mark.parametrize("number", range(3))
def test_what_comes_back_is_what_was_put_there(number: int, tmp_path: Path) -> None:
    put = outputs()[number]
    FeatureFolder(tmp_path, 1).put("a", put)
    back = FeatureFolder(tmp_path, 1).get("a")
    assert type(back) is type(put)
    if isinstance(put, dict):
        assert list(back) == list(put)
    pairs = list(zip(tensors(put), tensors(back), strict=True))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    assert FeatureFolder(tmp_path, 1).get("b") is None


@pytest.mark.parametrize("damage", ["cut", "a bit", "another class", "empty"])
def test_a_damaged_file_is_not_there_and_is_written_anew(damage: str, tmp_path: Path) -> None:
    folder = FeatureFolder(tmp_path, 1)
    folder.put("a", outputs()[1])
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-1]
    elif damage == "a bit":
        data[-3] ^= 1
    elif damage == "another class":
        data = data.replace(b"BaseModelOutputWithPooling", b"BaseModelOutputWithNothing")
    else:
        data = bytearray()
    path.write_bytes(data)
    assert folder.get("a") is None
    folder.put("a", outputs()[1])
    assert len(tensors(folder.get("a"))) == 3


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    folder, size = FeatureFolder(tmp_path, 1), 100_000
    for i in range(9):
        folder.put(str(i), torch.full((size,), float(i), dtype=torch.float32).to(torch.uint8))
        os.utime(tmp_path / f"{i}.safetensors", (1000 + i, 1000 + i))
    assert folder.get("0") is not None  # which is now the last that was used
    for i in range(9, 14):
        folder.put(str(i), torch.zeros(size, dtype=torch.uint8))
    kept = {path.stem for path in tmp_path.iterdir()}
    assert kept >= {"0", "9", "13"}
    assert not kept & {"1", "2", "3"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1.1 * 2**20


def test_too_large_for_the_folder_is_not_kept_and_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    for name, age_s in (("old", 7200), ("new", 10)):
        path = tmp_path / f"{name}.99.partial"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age_s, time.time() - age_s))
    folder = FeatureFolder(tmp_path, 1)
    folder.put("a", torch.zeros(2**21, dtype=torch.uint8))
    assert folder.get("a") is None
    assert [path.name for path in tmp_path.iterdir()] == ["new.99.partial"]


def test_a_full_disk_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    folder = FeatureFolder(tmp_path, 1)
    monkeypatch.setattr(Path, "write_bytes", full)
    folder.put("a", torch.zeros(3))
    assert folder.get("a") is None
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"backbone\.image_features_folder: .*file/x: cannot be made: Not a directory"
    ):
        FeatureFolder(tmp_path / "file" / "x", 1)


def put_and_get(folder: str, failures: Any) -> None:
    shelf, right = FeatureFolder(Path(folder), 1), 0
    for turn in range(60):
        key = turn % 12
        value = torch.full((100_000,), key, dtype=torch.uint8)
        shelf.put(str(key), value)
        found = shelf.get(str(key))  # None where another process has just made room
        right += found is not None and torch.equal(found, value)
        if found is not None and not torch.equal(found, value):
            failures.put(key)
    failures.put(-right)


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Three write, read and evict the same keys at once, more than the folder may hold: no process reads what was not put."""
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    workers = [context.Process(target=put_and_get, args=(str(tmp_path), failures)) for _ in range(3)]
    for worker in workers:
        worker.start()
    answers = [failures.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert all(answer < 0 for answer in answers)
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_that_goes_between_two_looks_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors opens the file, and then torch does."""
    folder = FeatureFolder(tmp_path, 1)
    folder.put("a", torch.ones(3))
    assert folder.get("a") is not None

    def gone(*_: object, **__: object) -> object:
        return torch.UntypedStorage.from_file(str(tmp_path / "b"), False, 9)

    with pytest.raises(RuntimeError, match="unable to open file"):
        gone()
    monkeypatch.setattr(feature_folder, "safe_open", gone)
    assert folder.get("a") is None


# --- in a run


def backbone(folder: str, shelf: Path | None, **more: Any) -> TransformersBackbone:
    spec = FromFolder(path=folder, image_features_folder=str(shelf or ""), keep_image_features_mb=0, **more)
    return load_folder(spec, seed=0)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_round_is_the_same_to_the_bit_and_the_tower_does_not_run_twice(
    load, examples: list[Example], tmp_path: Path, family: str
) -> None:
    folder = load(family).spec.path
    plain, first, second = (backbone(folder, shelf) for shelf in (None, tmp_path, tmp_path))
    start = stirred(plain)
    expected = [flat(u.delta) for u in together(federation(plain, examples), start)]
    assert not list(tmp_path.iterdir())
    assert all(map(torch.equal, expected, (flat(u.delta) for u in together(federation(first, examples), start))))
    assert list(tmp_path.iterdir())
    second.features._tower = lambda **_: pytest.fail("the tower ran again")
    assert all(map(torch.equal, expected, (flat(u.delta) for u in together(federation(second, examples), start))))


def test_another_base_precision_thread_count_or_version_finds_nothing(
    load, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = load("llava").spec.path
    base = backbone(folder, tmp_path)
    row = federation(base, examples).store.row(0, frozenset({"image", "text"}))
    keys = {base.features._key(row), backbone(folder, tmp_path).features._key(row)}
    assert len(keys) == 1
    keys.add(backbone(folder, tmp_path, precision=Precision(base="float64")).features._key(row))
    keys.add(backbone(load("qwen2_vl").spec.path, tmp_path).features._key(row))
    monkeypatch.setattr(features_module, "_machine", lambda _: "x86_64 AVX2 3 threads")
    keys.add(base.features._key(row))
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.add(base.features._key(row))
    assert len(keys) == 5


def test_a_trained_tower_keeps_nothing(load, examples: list[Example], tmp_path: Path) -> None:
    lora = BackboneSpec.model_fields["lora"].default.model_copy(update={"train_extra": ("multi_modal_projector",)})
    trained = backbone(load("llava").spec.path, tmp_path, lora=lora)
    row = federation(trained, examples).store.row(0, frozenset({"image", "text"}))
    trained.loss(trained.collate([row]))
    assert not list(tmp_path.iterdir())


def test_where_features_are_kept_is_no_other_experiment(tmp_path: Path) -> None:
    def experiment(**backbone: Any) -> Experiment:
        return Experiment.parse({"data": "synthetic-irony", "backbone": {"name": "tiny", **backbone}})

    plain = experiment()
    kept = experiment(image_features_folder=str(tmp_path), image_features_folder_mb=7, device="cuda")
    assert kept.run_id() == plain.run_id()
    assert {*Experiment.execution_only()} >= {
        "engine",
        "backbone.device",
        "backbone.image_features_folder",
        "evaluate.batch_size",
    }
    assert experiment(max_tokens=7).run_id() != plain.run_id()
