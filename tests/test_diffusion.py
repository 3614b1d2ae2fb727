"""Pictures that a diffusion pipeline draws from texts: a real pipeline of random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedmllm.backbones.base import Tiny
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.types import Example
from fedmllm.runs.run import run
from fedmllm.scenarios.modalities import diffusion
from fedmllm.scenarios.modalities.completion import Completer, Completion, CompletionSite
from fedmllm.testing import check_completion, examples
from support.runs import experiment
from support.tiny_pipeline import write_pipeline

pytest.importorskip("diffusers")
TEXT_ONLY = frozenset({"text"})


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield write_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")
    diffusion._load.cache_clear()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    return examples(tmp_path_factory.mktemp("pictures"))[:6]


def settings(pipeline: Path, **changes: Any) -> dict[str, Any]:
    return {"name": "diffusion", "path": str(pipeline), "steps": 1, **changes}


def completer(table: dict[str, Any], folder: Path, seed: int = 0) -> Completer:
    site = CompletionSite(model=None, public=(), modalities=("image", "text"), seed=seed, folder=folder)  # type: ignore[arg-type]
    return Completer(Completion.pick(table, "completion"), site)


def picture(completer: Completer, row: Example) -> bytes:
    filled, present = completer(row, TEXT_ONLY, False)
    assert present == {"image", "text"}
    (path,) = filled.fields["image"]
    return Image.open(path).tobytes()


def test_it_keeps_the_rules_of_completions(pipeline: Path, rows: list[Example]):
    check_completion(Completion.pick(settings(pipeline), "completion"), Tiny().load(seed=0), rows)


def test_a_picture_depends_on_the_text_the_prompt_and_the_seed_alone(
    pipeline: Path, rows: list[Example], tmp_path: Path
):
    first, second = rows[:2]
    made = picture(completer(settings(pipeline), tmp_path / "a"), first)
    again = completer(settings(pipeline), tmp_path / "b")
    assert picture(again, second) != made
    assert picture(again, first) == made  # whatever was drawn before
    assert picture(completer(settings(pipeline), tmp_path / "a", seed=1), first) != made
    assert picture(completer(settings(pipeline, prompt="a photo: {text}"), tmp_path / "a"), first) != made
    assert picture(completer(settings(pipeline, steps=2), tmp_path / "a"), first) != made
    filled, _ = completer(settings(pipeline, size=32), tmp_path / "a")(first, TEXT_ONLY, True)
    assert Image.open(filled.fields["image"][0]).size == (32, 32)


def test_rows_with_a_picture_or_without_a_text_stay_as_they_are(pipeline: Path, rows: list[Example], tmp_path: Path):
    complete = completer(settings(pipeline), tmp_path)
    row, visible = complete(rows[0], frozenset({"image"}), True)
    assert (row, visible) == (rows[0], {"image"})
    assert not list(tmp_path.glob("*.png"))


def test_a_kept_picture_is_not_drawn_again_and_another_pipeline_draws_another(
    pipeline: Path, rows: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept = settings(pipeline, folder=str(tmp_path / "kept"))
    made = picture(completer(kept, tmp_path), rows[0])
    _, digest = diffusion._load(str(pipeline), "cpu")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("drawn again")

    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "_load", lambda *_: (refuse, digest))
        assert picture(completer(kept, tmp_path), rows[0]) == made
        with pytest.raises(AssertionError, match="drawn again"):
            picture(completer(kept, tmp_path), rows[1])
    other = write_pipeline(tmp_path / "other", seed=1)
    assert picture(completer({**kept, "path": str(other)}, tmp_path), rows[0]) != made


@pytest.mark.timeout(120)
def test_a_run_draws_what_is_missing_and_records_the_pipeline(pipeline: Path, tmp_path: Path):
    table = {"num_rounds": 1, "scenario": {"name": "missing", "rate": 0.5}}
    without, with_ = (
        experiment(**table),
        experiment(**table, completion=settings(pipeline, folder=str(tmp_path / "kept"))),
    )
    assert without.run_id() != with_.run_id()
    moved = experiment(**table, completion=settings(pipeline, folder=str(tmp_path / "other")))
    assert moved.run_id() == with_.run_id()
    run(without, tmp_path / "without")
    run(with_, tmp_path / "with")
    head = json.loads((tmp_path / "with" / "record.jsonl").read_text().splitlines()[0])
    assert any(f"diffusion pipeline {pipeline}, digest " in note for note in head["notes"])
    assert list((tmp_path / "kept").glob("*.png"))
    file = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "with" / file).read_bytes() != (tmp_path / "without" / file).read_bytes()


def test_bad_settings_are_refused_before_anything_is_loaded(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(**changes: Any) -> str:
        table = {"data": {"name": "synthetic-irony"}, "completion": settings(pipeline, **changes)}
        with pytest.raises(ConfigError) as error:
            Experiment.parse(table)
        return str(error.value)

    assert "completion.path: missing" in refused(path="")
    assert f"completion.path: got '{tmp_path}'; no folder of a pipeline" in refused(path=str(tmp_path))
    assert "completion.prompt: got 'a cat'; it must contain {text}" in refused(prompt="a cat")
    assert "completion.of: got 'sound'; the rows have image, text" in refused(of="sound")
    assert "completion.to: got 'text', which is also `of`" in refused(to="text")
    monkeypatch.setattr(diffusion.importlib.util, "find_spec", lambda _: None)
    assert "pip install 'fedmllm[diffusion]'" in refused()


def test_a_damaged_pipeline_is_named(pipeline: Path, tmp_path: Path, rows: list[Example]):
    broken = write_pipeline(tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(FedmllmError, match=r"completion\.path: the pipeline .*broken cannot be loaded"):
        completer(settings(broken), tmp_path)(rows[0], TEXT_ONLY, True)
