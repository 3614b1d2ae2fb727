"""What the frozen vision tower says about a row's pictures, and the memory and the folder that keep it.

The tower sees one row's pictures at a time, always. So a row's features do not depend on the batch to the bit, and a
feature that was kept is the one that would be computed again.
"""

from __future__ import annotations

import hashlib
import inspect
import platform
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from fedmllm.backbones.base import Row
from fedmllm.backbones.cache.feature_folder import FeatureFolder
from fedmllm.core.errors import FedmllmError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def feature_argument(model: PreTrainedModel) -> str:
    """The argument of the forward pass that takes the tower's output in place of pixels.

    Raises FedmllmError where the family has none: then batches of rows with several pictures could not be put together.
    """
    arguments = inspect.signature(model.forward).parameters
    if hasattr(model.base_model, "get_image_features"):
        for name in ("mm_encoder_outputs", "image_features"):
            if name in arguments:
                return name
    raise FedmllmError(
        f"{model.config.model_type}: its forward pass takes no precomputed image features (mm_encoder_outputs), which "
        "this package needs; families that do are in results/families.md"
    )


class Kept(dict[str, Any]):
    """Digest of a row's pixels -> the tower's output, on the CPU."""

    num_bytes = 0


_KEPT: dict[str, Kept] = {}  # by scope; one for the process


class ImageFeatures:
    """The tower of one model, up to the vectors that stand in the text.

    Args:
        model: Its forward pass takes features in place of pixels, as `mm_encoder_outputs` or `image_features`.
        keep_mb: Memory for features of rows seen before; the first that fit stay, so epochs over more rows than fit
            still find those. 0 = none are kept.
        frozen: False where the tower, resampler or projector is trained: gradients flow and nothing is kept.
        scope: What the features depend on besides pixels: the base's digest, how and where it is held. Backbones of one
            scope share what is kept, so that the experiments of a suite in one process do.
        folder: Where it is kept besides, for other processes and later runs on machines of this kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        keep_mb: int,
        frozen: bool,
        scope: Callable[[], str] | None = None,
        folder: FeatureFolder | None = None,
    ) -> None:
        self._argument = feature_argument(model)
        self._tower = model.base_model.get_image_features
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._device = model.device
        self._keep_bytes = keep_mb * 2**20 if frozen else 0
        self._frozen = frozen
        self._folder = folder if frozen and scope else None
        self._scope_of = scope or (lambda: f"model {id(self)}")

    @cached_property
    def _scope(self) -> str:
        return f"{self._scope_of()} {self._dtype} {self._device}"

    @cached_property
    def _kept(self) -> Kept:
        if not self._keep_bytes:
            return Kept()  # a backbone that keeps nothing does not find what others keep
        return _KEPT.setdefault(self._scope, Kept())

    def _key(self, row: Row) -> str:
        """Under which the folder has the row's features: other machines, threads and versions may give other bits."""
        words = (self._scope, row.image_key, _machine(self._device), torch.__version__, transformers.__version__)
        return hashlib.sha256("\x1f".join(words).encode()).hexdigest()

    def arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The argument of the forward pass that stands for the pictures of all rows; {} without pictures."""
        found = [self._features(row) for row in rows if row.image_key]
        if not found:
            return {}
        merged = _merge(found)
        return {self._argument: {"image": merged} if self._argument == "mm_encoder_outputs" else merged}

    def has(self, row: Row) -> bool:
        """Whether the row's pictures are not needed any more: it has none, or what the tower said is kept."""
        return not row.image_key or row.image_key in self._kept

    def _features(self, row: Row) -> Any:
        if row.image_key in self._kept:
            return _map(self._kept[row.image_key], lambda t: t.to(self._device))
        output = self._folder.get(self._key(row)) if self._folder else None
        if output is None:
            output = self._computed(row)
            if self._folder:
                self._folder.put(self._key(row), output)
        size = sum(t.numel() * t.element_size() for t in _tensors(output))
        if size + self._kept.num_bytes <= self._keep_bytes:
            self._kept.num_bytes += size
            self._kept[row.image_key] = _map(output, lambda t: t.to("cpu", copy=True))
        return _map(output, lambda t: t.to(self._device))

    def _computed(self, row: Row) -> Any:
        inputs = {name: self._place(tensor) for name, tensor in row.images.items()}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
            return _needed(self._tower(**inputs))

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)


def _machine(device: torch.device) -> str:
    """What of a machine decides the last bits of a matrix product."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"


def _needed(output: Any) -> Any:
    """Of a tower's output, what the language model reads: not its hidden states, which are many times larger."""
    if isinstance(output, Tensor):
        return output
    return type(output)(
        **{k: v for k, v in output.items() if k not in ("hidden_states", "attentions", "last_hidden_state")}
    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in (value.values() if isinstance(value, dict) else value) for t in _tensors(v)]


def _map(value: Any, f: Any) -> Any:
    """`f` on every tensor of a tensor, list or ModelOutput."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, dict):
        return type(value)(**{k: _map(v, f) for k, v in value.items()})
    return type(value)(_map(v, f) for v in value)


def _merge(outputs: list[Any]) -> Any:
    """Rows behind each other: tensors along dim 0, lists of pictures as one list, one tensor a layer (deepstack) each."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    return type(first)(**{k: _merge_field(k, [o[k] for o in outputs]) for k in first})


def _merge_field(name: str, values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if name == "deepstack_features":  # a list of layers, each of which is a tensor or a list of pictures
        return [_merge_field("", list(layer)) for layer in zip(*values, strict=True)]
    return [picture for value in values for picture in value]
