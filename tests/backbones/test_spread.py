"""Layers over several devices: which goes where, and the numbers of one device.

Two fake devices on the CPU stand for cards: operations that mix their tensors raise (`support.fake_devices`). The test
with two cards is marked `gpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import checkpoint

from fedmllm.backbones.base import FromFolder, Lora, Precision, Tiny
from fedmllm.backbones.frozen import frozen_adapter
from fedmllm.backbones.hf import TransformersBackbone, load_folder
from fedmllm.backbones.spread import balanced, devices_of
from fedmllm.core.errors import ConfigError
from fedmllm.core.types import Conversation
from support.fake_devices import FakeDevices
from support.tiny_families import FAMILIES, PORTS, stirred

TWO, THREE = ("cpu:0", "cpu:1"), ("cpu:0", "cpu:1", "cpu:2")
FolderOf = Callable[[str], Path]


def numbers(backbone: TransformersBackbone, prompts: list[Conversation]) -> dict[str, Any]:
    """Loss, gradients, scores and answers."""
    rows = [backbone.encode(prompt, "yes, it is") for prompt in prompts]
    nll_B, _ = backbone.loss(backbone.collate(rows), range(len(rows)))
    live = backbone.trainable()
    gradients = torch.autograd.grad(nll_B.sum(), list(live.values()))
    return {
        "loss": nll_B.detach(),
        **{f"gradient of {name}": gradient for name, gradient in zip(live, gradients, strict=True)},
        "scores": torch.tensor(backbone.score(prompts, [("A", "no, never")] * len(prompts))),
        "answers": backbone.generate(prompts, 3),
    }


def assert_same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        equal = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert equal, name


@pytest.mark.parametrize("family", [*FAMILIES, *PORTS])
def test_a_family_over_two_devices_has_the_bits_of_one(
    folder_of: FolderOf, prompts: list[Conversation], family: str
) -> None:
    spec = FromFolder(path=str(folder_of(family)), keep_image_features_mb=0)
    one = stirred(load_folder(spec, seed=0))
    for (
        weight
    ) in one.base.parameters():  # copies, as the others are: in the file they lie at odd addresses, which change bits
        weight.data = weight.data.clone()
    whole = numbers(one, prompts)
    with FakeDevices() as devices:
        parted = stirred(load_folder(spec.model_copy(update={"device_map": TWO}), seed=0))
        assert parted.devices == TWO
        of_layer = {parted.layer_of(name): devices.of(weight) for name, weight in parted.trainable().items()}
        assert of_layer[max(of_layer)] == 1  # type: ignore[type-var]
        assert_same_bits(numbers(parted, prompts), whole)
    assert devices.copies[0, 1]
    assert devices.copies[1, 0]
    assert min(devices.operations[0], devices.operations[1]) > 100


CASES: dict[str, dict[str, Any]] = {
    "three devices": {"device_map": THREE},
    "layers computed again": {"precision": Precision(gradient_checkpointing=True)},
    "bfloat16": {"precision": Precision(base="bfloat16")},
    "modality gate": {"lora": Lora(modality_gate=True)},
    "modules trained whole": {"lora": Lora(train_extra=("resampler", "llm.model.norm"))},
    "a part of a layer trained whole, bfloat16": {
        "lora": Lora(train_extra=("llm.model.layers.3.mlp.up_proj",)),
        "precision": Precision(base="bfloat16"),
    },
    "all linear layers": {"lora": Lora(targets=r"llm\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj")},
    "principal directions": {"lora": Lora(init="principal")},
    "no feature cache": {"keep_image_features_mb": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_the_embedded_model_over_several_devices_has_the_bits_of_one(
    prompts: list[Conversation], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # where autograd saves a tensor, its fake device cannot be read; that it is right there is still checked
    seen = checkpoint._allowed_determinism_checks_to_fns
    monkeypatch.setitem(seen, "default", lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype})
    changed = {"device_map": TWO, **CASES[case]}
    whole = numbers(Tiny.model_validate({k: v for k, v in changed.items() if k != "device_map"}).load(0), prompts)  # type: ignore[arg-type]
    with FakeDevices() as devices:
        parted = Tiny.model_validate(changed).load(0)
        assert_same_bits(numbers(parted, prompts), whole)  # type: ignore[arg-type]
    assert set(devices.operations) == {-1, *range(len(changed["device_map"]))}


def test_tensors_of_the_adapter_are_with_their_layers_and_come_and_go_as_on_one_device() -> None:
    whole = Tiny().load(0)
    with FakeDevices() as devices:
        parted = Tiny(device_map=TWO).load(0)
        own = parted.lora()
        places = {name: devices.of(weight) for name, weight in parted.trainable().items()}
        assert places == {name: int((parted.layer_of(name) or 0) > 0) for name in places}  # one layer next to the tower
        parted.set_lora({name: tensor + 1 for name, tensor in own.items()})
        moved = parted.lora()
        assert {devices.of(tensor) for tensor in [*own.values(), *moved.values()]} == {-1}
        assert {name: devices.of(weight) for name, weight in parted.trainable().items()} == places
    assert own.keys() == whole.lora().keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in whole.lora().items())
    assert all(torch.equal(tensor, own[name] + 1) for name, tensor in moved.items())


def test_a_frozen_adapter_is_with_its_layers(prompts: list[Conversation]) -> None:
    whole = Tiny().load(0)
    more = {name: torch.full_like(tensor, 0.02) for name, tensor in whole.lora().items()}
    with frozen_adapter(whole, more):
        expected = numbers(whole, prompts)  # type: ignore[arg-type]
    with FakeDevices():
        parted = Tiny(device_map=TWO).load(0)
        with frozen_adapter(parted, more):
            assert_same_bits(numbers(parted, prompts), expected)  # type: ignore[arg-type]
    assert not torch.equal(expected["loss"], numbers(whole, prompts)["loss"])  # type: ignore[arg-type]


def test_fake_devices_refuse_what_cards_refuse() -> None:
    with FakeDevices() as devices:
        first, second = torch.ones(3).to("cpu:0"), torch.ones(3).to("cpu:1")
        assert (str(first.device), str(second.device), devices.of(second[1:])) == ("cpu:0", "cpu:1", 1)
        for mixed in (lambda: first + second, lambda: torch.cat([first, second]), lambda: second.mul_(first)):
            with pytest.raises(AssertionError, match=r"tensors of devices \[0, 1\]"):
                mixed()
        weight = torch.nn.Parameter(second)
        (first * weight.to("cpu:0")).sum().backward()
        assert weight.grad is not None
        assert devices.of(weight.grad) == 1


@pytest.mark.parametrize(
    ("layers", "rest", "num_devices", "expected"),
    [
        ([1] * 4, 0, 2, (2, 2)),
        ([1] * 4, 2, 2, (1, 3)),
        ([1] * 4, 99, 2, (0, 4)),
        ([1] * 4, 0, 4, (1, 1, 1, 1)),
        ([1] * 3, 0, 4, (0, 1, 1, 1)),
        ([5, 1, 1, 1, 5], 0, 3, (1, 3, 1)),
        ([1] * 80, 4, 3, (24, 28, 28)),
        ([3, 1], 0, 1, (2,)),
    ],
)
def test_the_fullest_device_holds_as_little_as_possible(
    layers: list[int], rest: int, num_devices: int, expected: tuple[int, ...]
) -> None:
    counts = balanced(layers, rest, num_devices)
    assert counts == expected

    def fullest(cuts: tuple[int, ...]) -> int:
        ends = [0, *cuts, len(layers)]
        parts = [sum(layers[a:b]) for a, b in pairwise(ends)]
        return max(rest + parts[0], *parts[1:], 0)

    ends = [sum(counts[: n + 1]) for n in range(num_devices - 1)]
    if len(layers) <= 5:
        choices = combinations(range(len(layers)), num_devices - 1)
        assert fullest(tuple(ends)) == min(map(fullest, choices))


def test_too_many_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"device_map: 6 devices for a model of 4 layers; name at most 5$"):
        Tiny(device_map=tuple(f"cpu:{n}" for n in range(6))).load(0)


def test_the_devices_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of(("auto",)) == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices_of(("cuda:2", "cpu")) == ["cuda:2", "cpu:0"]
    with pytest.raises(ConfigError, match=r"^backbone.device_map: got 'cuda:3', but this machine has 3 CUDA devices$"):
        devices_of(("cuda:0", "cuda:3"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r'^backbone.device_map: got "auto", but this machine has 1 CUDA devices; '):
        Tiny(device_map=("auto",)).load(0)


def test_a_server_cannot_make_a_spread_model_load_in_four_bits() -> None:
    spec = Tiny(device_map=TWO).model_copy(update={"precision": Precision(base="nf4")})
    with pytest.raises(ConfigError, match=r"^backbone.device_map: weights in nf4 are not spread"):
        spec.load(0)


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="fewer than two CUDA devices: layers over cards were NOT tested"
)
@pytest.mark.parametrize("family", [*FAMILIES, *PORTS])
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_two_cards_have_the_numbers_of_one(
    folder_of: FolderOf, prompts: list[Conversation], family: str, base: str
) -> None:
    precision = Precision.model_validate({"base": base})
    where = ({"device": "cuda:0"}, {"device_map": ("cuda:0", "cuda:1")})
    one, two = (
        stirred(
            load_folder(FromFolder.model_validate({"path": str(folder_of(family)), "precision": precision, **w}), 0)
        )
        for w in where
    )
    assert {str(weight.device) for weight in two.trainable().values()} <= {"cuda:0", "cuda:1"}
    expected, found = numbers(one, prompts), numbers(two, prompts)
    assert found.pop("answers") == expected.pop("answers")
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value.cpu(), rtol=1e-4, atol=1e-5, msg=name)
