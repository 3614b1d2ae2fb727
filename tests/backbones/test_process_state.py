"""Backbones leave the process of the user as it was: modules, loggers, warnings, file permissions."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedmllm.backbones.base import Tiny
from fedmllm.backbones.hf import TransformersBackbone
from fedmllm.backbones.hub_kernels import without_hub_kernels
from fedmllm.backbones.kv_cache import cache_argument
from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import write_tensors
from fedmllm.core.types import Conversation
from support.tiny_families import write

IMPORTS = """
import importlib, json, logging, pkgutil, sys

def state():
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    root = logging.getLogger()
    return [sys.modules.get("kernels", "absent") is None, levels, len(root.handlers)]

LOGGERS = ["", "bitsandbytes", "bitsandbytes.backends.cpu.ops", "transformers", "peft", "PIL"]
import torch, transformers, peft, matplotlib  # their own doing at import
before = state()
import fedmllm
skipped = []
for module in pkgutil.walk_packages(fedmllm.__path__, "fedmllm."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        skipped.append([module.name, str(error.name)])
after = state()
print(json.dumps({"same": before == after, "before": before, "after": after, "skipped": skipped}))
"""

FAKE_KERNELS = '''
"""Stands for the package `kernels`: any fetch is an error that the test sees."""
class _Any:
    def __init__(self, *a, **k): pass
    def __call__(self, f, *a, **k): return f
CUDAProperties = Device = LayerRepository = LocalLayerRepository = ROCMProperties = _Any
class KernelizeFallback: ALL = None
class Mode: INFERENCE = TRAINING = None
def _fetch(*a, **k):
    print("FETCHED", a, k, flush=True)
    raise FileNotFoundError
register_kernel_mapping = replace_kernel_forward_from_hub = use_kernel_mapping = lambda *a, **k: None
get_kernel = kernelize = _fetch
use_kernel_forward_from_hub = use_kernelized_func = lambda *a, **k: (lambda c: c)
'''

FETCHES = """
import sys
import kernels
from fedmllm.backbones.base import FromFolder
from fedmllm.core.types import Conversation
from transformers.integrations import hub_kernels
assert hub_kernels.is_kernels_available()
kernel = next(iter(hub_kernels._HUB_KERNEL_MAPPING))
hub_kernels.lazy_load_kernel(kernel)
print("control above", flush=True)
hub_kernels._KERNEL_MODULE_MAPPING.clear()
from fedmllm.backbones.hub_kernels import without_hub_kernels
with without_hub_kernels():
    hub_kernels.lazy_load_kernel(kernel)
hub_kernels._KERNEL_MODULE_MAPPING.clear()
backbone = FromFolder(path=sys.argv[1]).load(0)
backbone.loss(backbone.collate([backbone.encode(Conversation(("a",)), "b")]))
backbone.generate([Conversation(("a",))], 2)
assert sys.modules["kernels"] is kernels
print("done", flush=True)
"""


def python(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_every_module_changes_nothing_in_the_process() -> None:
    seen = json.loads(python(IMPORTS).splitlines()[-1])
    assert seen["same"], seen
    assert not [name for name, missing in seen["skipped"] if missing.startswith("fedmllm")]


def test_a_block_without_kernels_ends_as_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import hub_kernels

    enabled = hub_kernels._kernels_enabled  # the switch that lazy_load_kernel reads
    with without_hub_kernels():
        assert sys.modules["kernels"] is None
        assert not hub_kernels._kernels_enabled
    assert "kernels" not in sys.modules
    monkeypatch.setitem(sys.modules, "kernels", sys)
    with pytest.raises(KeyError), without_hub_kernels():
        raise KeyError
    assert sys.modules["kernels"] is sys
    assert hub_kernels._kernels_enabled == enabled


def test_a_block_without_kernels_keeps_what_loggers_have_cached() -> None:
    logger = logging.getLogger("fedmllm.test.cached")
    logger.isEnabledFor(logging.INFO)
    with without_hub_kernels():
        assert logger._cache  # type: ignore[attr-defined]  # setLevel empties it for all loggers: a tenth of predict
        noisy = logging.getLogger("bitsandbytes.backends.cpu.ops")
        assert not noisy.filter(logging.LogRecord("x", logging.WARNING, "", 1, "", None, None))
        assert noisy.filter(logging.LogRecord("x", logging.ERROR, "", 1, "", None, None))
    assert noisy.filters == []


def test_no_kernel_is_fetched_though_the_package_is_there(tmp_path: Path) -> None:
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(FAKE_KERNELS)
    about = site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    folder = write("qwen3_5", tmp_path / "qwen3_5")  # linear attention: transformers looks for two kernels
    path = os.pathsep.join([str(site), *sys.path])
    before, after = python(FETCHES, str(folder), PYTHONPATH=path).split("control above")
    assert "FETCHED" in before
    assert "FETCHED" not in after
    assert "done" in after


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_forward_pass_warns_of_nothing(loaded: Callable[[str], TransformersBackbone]) -> None:
    """transformers 5.24 renamed `past_key_values` to `cache` and warned at every pass."""
    prompts = [Conversation(("Is it?",))]
    for backbone in (Tiny().load(0), loaded("llava"), loaded("qwen3_5")):
        backbone.score(prompts, [["yes it is", "no"]])
        backbone.generate(prompts, 3)


@pytest.mark.parametrize(
    ("parameters", "name"), [("cache, use_cache", "cache"), ("past_key_values", "past_key_values")]
)
def test_the_cache_has_the_name_of_the_model_s_own_argument(parameters: str, name: str) -> None:
    scope: dict[str, type[torch.nn.Module]] = {"nn": torch.nn}  # type: ignore[dict-item]
    exec(f"class Model(nn.Module):\n    def forward(self, {parameters}): ...", scope)
    assert cache_argument(scope["Model"]()) == name


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_saved_weights_have_the_permissions_of_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    with umask(mask):
        Tiny().load(0).save(tmp_path / "adapter")
    assert {f.name: f.stat().st_mode & 0o777 for f in (tmp_path / "adapter").iterdir()} == {
        "adapter_model.safetensors": mode,
        "adapter_config.json": mode,
    }


def test_written_tensors_are_read_back_and_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    read = load_file(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], t) and read[name].dtype == t.dtype for name, t in tensors.items())
    with pytest.raises(FedmllmError, match=r"none/t\.safetensors: cannot be written: No such file"):
        write_tensors(tmp_path / "none" / "t.safetensors", tensors)


@pytest.mark.parametrize("name", ["mps", "xpu", "gpu", "cuda:99", ""])
def test_a_device_that_is_not_supported_is_refused_with_the_allowed_ones(name: str) -> None:
    with pytest.raises(FedmllmError, match=r"backbone\.device: got '.*'.*'cpu'"):
        Tiny(device=name).load(0)


def test_the_automatic_device_is_a_cuda_device_if_there_is_one() -> None:
    backbone = Tiny(device="auto").load(0)
    assert backbone.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert Tiny(device="auto").identity() == Tiny().identity()
