"""Outputs of the frozen vision tower, cached in memory and on disk.

The tower computes one row's pictures at a time, always. So a row's features do not depend on the batch to the bit, and a
cached feature equals one that is computed again.
"""

from __future__ import annotations

import hashlib
import inspect
import platform
from collections.abc import Callable, Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from fedmllm.backbones.base import Row
from fedmllm.backbones.cache.feature_folder import FeatureFolder
from fedmllm.backbones.hub_kernels import without_hub_kernels
from fedmllm.core.errors import FedmllmError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def feature_argument(model: PreTrainedModel) -> str:
    """The argument of the forward pass that takes the tower's output in place of pixels.

    Raises:
        FedmllmError: The family has none: then batches of rows with several pictures could not be put together.
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


class FeatureCache(dict[str, Any]):
    """Digest of a row's pixels -> the tower's output, on the CPU."""

    num_bytes = 0


_CACHES: dict[str, FeatureCache] = {}  # by scope; one for the process
_COUNTING = Lock()  # models of several devices are used by a thread each


class ImageFeatures:
    """The tower of one model, up to the vectors that take the places of image tokens.

    Args:
        model: Its forward pass takes features in place of pixels, as `mm_encoder_outputs` or `image_features`.
        keep_mb: Memory in MiB for features of earlier rows; the first that fit stay, so epochs over more rows than fit
            still find those. 0 = no cache.
        frozen: False if the tower, resampler or projector is trained: gradients flow and nothing is cached.
        scope: Everything except pixels that features depend on: the base's digest, its precision. Backbones of one scope
            share a cache, so that the experiments of a suite in one process do.
        folder: A cache for other processes and later runs on machines of this kind.

    Raises:
        FedmllmError: The model's forward pass takes no precomputed image features.
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
    def _cache(self) -> FeatureCache:
        if not self._keep_bytes:
            return FeatureCache()  # a backbone without a cache does not read that of others
        return _CACHES.setdefault(self._scope, FeatureCache())

    def _key(self, row: Row) -> str:
        """Name of the row's features in the folder: other processors, threads and versions may give other bits."""
        words = (self._scope, row.image_key, _machine(self._device), torch.__version__, transformers.__version__)
        return hashlib.sha256("\x1f".join(words).encode()).hexdigest()

    def arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The argument of the forward pass with the features of all rows; {} without pictures."""
        found = [self._features(row) for row in rows if row.image_key]
        if not found:
            return {}
        merged = _merge(found)
        return {self._argument: {"image": merged} if self._argument == "mm_encoder_outputs" else merged}

    def has(self, row: Row) -> bool:
        """True if the row's pixels are not needed: it has none, or its features are cached."""
        return not row.image_key or row.image_key in self._cache

    def vectors(self, row: Row) -> Tensor:
        """All vectors of a row's pictures behind each other [Q, D], float32, CPU."""
        main = _main(self._features(row))
        return torch.cat([t.detach().float().cpu().flatten(0, -2) for t in _tensors(main)])

    def _features(self, row: Row) -> Any:
        if row.image_key in self._cache:
            return _map(self._cache[row.image_key], lambda t: t.to(self._device))
        output = self._folder.get(self._key(row)) if self._folder else None
        if output is None:
            output = self._computed(row)
            if self._folder:
                self._folder.put(self._key(row), output)
        size = sum(t.numel() * t.element_size() for t in _tensors(output))
        with _COUNTING:
            if row.image_key not in self._cache and size + self._cache.num_bytes <= self._keep_bytes:
                self._cache.num_bytes += size
                self._cache[row.image_key] = _map(output, lambda t: t.to("cpu", copy=True))
        return _map(output, lambda t: t.to(self._device))

    def _computed(self, row: Row) -> Any:
        inputs = {name: self._place(tensor) for name, tensor in row.images.items()}
        with without_hub_kernels(), torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
            output = _without_hidden_states(self._tower(**inputs))
        return _replaced(output, row.imagined) if row.imagined else output

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)


def _machine(device: torch.device) -> str:
    """Processor and threads, on which the last bits of a matrix product depend.

    Threads: the merger of Qwen's towers, 6 rows of 128 values, gives other bits with 2 threads than with 1 or 4.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"


def _without_hidden_states(output: Any) -> Any:
    """A tower's output without its hidden states, which the language model does not read and which are much larger."""
    if isinstance(output, Tensor):
        return output
    return type(output)(
        **{k: v for k, v in output.items() if k not in ("hidden_states", "attentions", "last_hidden_state")}
    )


def _main(output: Any) -> Any:
    """The part of a tower's output that takes the places of image tokens."""
    return output if isinstance(output, Tensor) else next(iter(output.values()), output)


def _replaced(output: Any, imagined: Sequence[Tensor | int]) -> Any:
    """A tower's output with imagined vectors in the place of its own; other fields stay those of the blank pictures."""
    if isinstance(output, dict):
        first = next(iter(output))
        return type(output)(**{k: _replaced(v, imagined) if k == first else v for k, v in output.items()})
    sizes = [t.shape[:-1].numel() for t in _tensors(output)]
    counts = [part if isinstance(part, int) else len(part) for part in imagined]
    if sum(sizes) != sum(counts):
        raise FedmllmError(
            f"imagined features: the pictures have {counts} vectors each by itself, and {sum(sizes)} together; this family's "
            "features depend on the number of pictures, so one of several cannot be imagined"
        )
    own = torch.split(torch.cat([t.flatten(0, -2) for t in _tensors(output)]), counts)
    pieces = [t if isinstance(part, int) else part.to(t) for t, part in zip(own, imagined, strict=True)]
    left = iter(torch.split(torch.cat(pieces), sizes))
    return _map(output, lambda t: next(left).view(t.shape))


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
