"""Layers of a frozen model over several devices, one after another.

The layers of the language model are divided in their order; all else is on the first device: tower, embeddings, last norm
and head. So inputs, picture features and logits are on the first device, as on a single one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from fedmllm.backbones.lora import decoder_name
from fedmllm.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHES = ["past_key_values", "cache"]  # each layer's keys and values stay on its device


def devices_of(names: Sequence[str], exist: bool = True) -> list[str]:
    """The devices of `backbone.device_map`, in the order of the layers.

    Args:
        names: "auto", or names of devices, as settings check them.
        exist: False for an estimate, which needs no devices unless it is asked for all of them.

    Returns:
        "cuda:N" or "cpu:N".

    Raises:
        ConfigError: This machine has no such device, or too few for "auto".
    """
    count = torch.cuda.device_count()
    if tuple(names) == ("auto",):
        if count < 2:
            raise ConfigError(
                f'backbone.device_map: got "auto", but this machine has {count} CUDA devices; name the devices, or use '
                "backbone.device"
            )
        return [f"cuda:{number}" for number in range(count)]
    for name in names:
        kind, _, number = name.partition(":")
        if exist and kind == "cuda" and int(number) >= count:
            raise ConfigError(f"backbone.device_map: got {name!r}, but this machine has {count} CUDA devices")
    return ["cpu:0" if name == "cpu" else name for name in names]


def balanced(layer_bytes: Sequence[int], rest_bytes: int, num_devices: int) -> tuple[int, ...]:
    """Divide layers so that the fullest device holds as little as possible.

    Args:
        layer_bytes: Of each layer.
        rest_bytes: Of all else, which is on the first device.
        num_devices: At least one.

    Returns:
        Number of layers of each device, at least one except on the first.

    Raises:
        ConfigError: There are too few layers.
    """
    if len(layer_bytes) < num_devices - 1:
        raise ConfigError(
            f"backbone.device_map: {num_devices} devices for a model of {len(layer_bytes)} layers; name at most "
            f"{len(layer_bytes) + 1}"
        )
    ends = [0, *accumulate(layer_bytes)]
    # best[k]: (bytes of the fullest device, layers of each) if the devices so far hold the first k layers
    best: dict[int, tuple[int, tuple[int, ...]]] = {k: (rest_bytes + end, (k,)) for k, end in enumerate(ends)}
    for _ in range(1, num_devices):
        best = {
            k: min((max(most, ends[k] - ends[j]), (*counts, k - j)) for j, (most, counts) in best.items() if j < k)
            for k in range(min(best) + 1, len(ends))
        }
    return best[len(layer_bytes)][1]


@dataclass(frozen=True)
class DevicePart:
    """Part of the frozen model on one device."""

    device: str
    num_layers: int
    num_bytes: int


def device_parts(model: nn.Module, decoder: str, devices: Sequence[str]) -> list[DevicePart]:
    """Return the part of each device.

    Args:
        model: An image-text-to-text model without an adapter, or its shapes alone.
        decoder: Name of its language model.
        devices: In the order of the layers; the first has all else too.

    Raises:
        ConfigError: The model cannot be divided over so many devices.
    """
    sizes = [_num_bytes(layer) for layer in layers_of(model, decoder)]
    rest = _num_bytes(model) - sum(sizes)
    counts = balanced(sizes, rest, len(devices))
    ends = list(accumulate(counts))
    held = [sum(sizes[end - count : end]) for end, count in zip(ends, counts, strict=True)]
    held[0] += rest
    return [DevicePart(*part) for part in zip(devices, counts, held, strict=True)]


def layers_of(model: nn.Module, decoder: str) -> nn.ModuleList:
    """The layers of the language model, in the order of the pass.

    Args:
        model: An image-text-to-text model.
        decoder: Name of its language model.

    Raises:
        ConfigError: It is not a list of layers.
    """
    layers = getattr(model.get_submodule(decoder), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"backbone.device_map: {type(model).__name__} has no list of layers; use backbone.device")
    return layers


def _num_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers; shared ones count once."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def spread(model: PreTrainedModel, devices: Sequence[str]) -> PreTrainedModel:
    """`model` with its layers on `devices`; inputs of each layer follow to its device.

    Args:
        model: On the CPU, without an adapter; changed in place.
        devices: By `devices_of`.

    Raises:
        ConfigError: The model cannot be divided over so many devices.
    """
    decoder = decoder_name(model)
    parts = device_parts(model, decoder, devices)
    owners = [part.device for part in parts for _ in range(part.num_layers)]
    places = dict.fromkeys(_outside(model, f"{decoder}.layers"), devices[0])
    places |= {f"{decoder}.layers.{number}": device for number, device in enumerate(owners)}
    for tensor in _loose(model, f"{decoder}.layers"):
        tensor.data = tensor.data.to(devices[0])
    for name, device in places.items():
        module = model.get_submodule(name).to(device)
        module.register_forward_pre_hook(partial(_follow, device), with_kwargs=True)
    model.hf_device_map = places
    return model


def _follow(device: str, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=CACHES)


def spread_over(model: nn.Module) -> tuple[str, ...]:
    """The devices of a model that `spread` has divided, in the order of its layers; empty for any other model."""
    found = tuple(dict.fromkeys(getattr(model, "hf_device_map", {}).values()))
    return found if len(found) > 1 else ()


def _outside(model: nn.Module, layers: str) -> Iterator[str]:
    """The largest modules that do not hold the layers."""
    for name, _ in model.named_modules():
        outer = name.rpartition(".")[0]
        if name and name != layers and not _holds(name, layers) and (not outer or _holds(outer, layers)):
            yield name


def _loose(model: nn.Module, layers: str) -> Iterator[Tensor]:
    """Parameters and buffers that belong directly to a module around the layers."""
    for name, module in model.named_modules():
        if not name or _holds(name, layers):
            yield from (*module.parameters(recurse=False), *module.buffers(recurse=False))


def _holds(name: str, layers: str) -> bool:
    return layers.startswith(f"{name}.")
