"""The loaders of docs/serving.md, as they stand on the page, on tiny models: the adapter changes the logits as in training."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fedmllm.backbones.base import FromFolder
from fedmllm.backbones.hf import load_folder
from fedmllm.core.types import Example
from fedmllm.data.prompts import Plain
from support.tiny_families import PORTS, stirred, write

PAGE = (Path(__file__).parents[1] / "docs/serving.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("family", "block"), [("gemma3", 0), ("minicpmv2.6", 1)])
def test_the_page_loads_an_adapter_without_this_package_s_backbone(
    family: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    code = BLOCKS[block]
    named = re.search(r'^base = "(.+)"$', code, re.MULTILINE)
    assert named
    base = tmp_path / named[1]
    if family in PORTS:
        shutil.copytree(
            request.getfixturevalue("shared") / "parity" / PORTS[family], base, copy_function=shutil.copyfile
        )
    else:
        write(family, base)
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "scan.png")
    trained = stirred(load_folder(FromFolder(path=str(base)), seed=0))
    trained.save(tmp_path / "runs/mine/adapter")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    model, inputs = names["model"], names["inputs"]
    with torch.no_grad():
        theirs = model(**inputs).logits
        ours = trained.base(**inputs).logits
        model.disable_adapter_layers()
        without = model(**inputs).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert float((without - ours).abs().max()) > 1e-3


def test_the_wording_on_the_page_is_that_of_training(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "scan.png")
    content: dict[str, Any] = {"image": (tmp_path / "scan.png",), "text": "no acute findings"}
    example = Example("1", content, "Is there a fracture?", ("no", "yes"), "no", "rows.csv:2", {})
    _, text = Plain().render(example, frozenset(content)).parts
    assert f"```text\n{text}\n```" in PAGE
    assert f"the answer that was trained is `{Plain().target(example)}`" in PAGE
