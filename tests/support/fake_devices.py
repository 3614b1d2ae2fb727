"""Devices that exist by name alone: "cpu:0" and "cpu:1" have one memory, but no operation may mix their tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeDevices(TorchDispatchMode):
    """In this block a tensor that was moved to "cpu:N", and all that is computed from it, is on the device N.

    torch itself drops N. Here it is kept for each storage, and an operation on tensors of two devices raises, as on
    cards. A tensor that was never moved is the host's and goes with all.

    Attributes:
        copies: (from, to) -> number of copies between devices; -1 is the host.
        operations: Device -> number of operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[tuple[int, int]] = Counter()
        self.operations: Counter[int] = Counter()
        self._places: dict[
            int, tuple[StorageWeakRef, int]
        ] = {}  # the reference keeps the address from being used again
        self._own_device = OwnDevice(self)
        self._backward = torch.autograd._engine_run_backward

    def __enter__(self) -> FakeDevices:
        self._backward, torch.autograd._engine_run_backward = torch.autograd._engine_run_backward, self._run_backward
        self._own_device.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._own_device.__exit__(*error)
        torch.autograd._engine_run_backward = self._backward

    def _run_backward(self, *args: Any, **kwargs: Any) -> Any:
        # torch leaves the mode for `backward`, in which layers may be computed again
        with nullcontext() if _get_current_function_mode() else self._own_device:
            return self._backward(*args, **kwargs)

    def of(self, tensor: torch.Tensor) -> int:
        """The device of a tensor; -1 = the host."""
        return self._places.get(tensor.untyped_storage()._cdata, (None, -1))[1]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        if "_foreach_" in str(op):  # torch groups tensors by device before; to it, all of these are on one
            lists = [tensors for tensors in args if isinstance(tensors, list | tuple)]
            for number, given in enumerate(zip(*lists, strict=False)):
                self._computed(op, given, result[number] if result is not None else None, kwargs)
        else:
            self._computed(op, tree_leaves((args, kwargs)), result, kwargs)
        return result

    def _computed(self, op: Any, given: Iterable[Any], result: Any, kwargs: Mapping[str, Any]) -> None:
        tensors = [t for t in given if isinstance(t, torch.Tensor)]
        found = sorted({self.of(t) for t in tensors} - {-1})
        there = found[0] if found else -1
        if (asked := kwargs.get("device")) is not None:
            there = -1 if asked.index is None else asked.index
            if found and there != found[0]:
                self.copies[found[0], there] += 1
        elif op is torch.ops.aten.copy_.default:
            there = self.of(tensors[0])
        elif len(found) > 1:
            raise AssertionError(f"{op}: tensors of devices {found}: {[tuple(t.shape) for t in tensors]}")
        self.operations[there] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.put(tensor, there)

    def moved(self, tensor: torch.Tensor, number: int) -> torch.Tensor:
        """A copy on a device, or the tensor if it is there already."""
        if self.of(tensor) == number:
            return tensor
        with torch._C.DisableTorchFunction():
            return tensor.to(torch.device("cpu", number) if number >= 0 else "cpu", copy=True)

    def put(self, tensor: torch.Tensor, device: int) -> None:
        """Note the device of a new tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._places or self._places[storage._cdata][1] == -1:
            self._places[storage._cdata] = (StorageWeakRef(storage), device)
        if len(self._places) > 200_000:
            self._places = {key: value for key, value in self._places.items() if not value[0].expired()}


class OwnDevice(TorchFunctionMode):
    """`tensor.device` has the number of the fake device, and gradients go back to where a tensor was moved from."""

    def __init__(self, devices: FakeDevices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(t, torch.Tensor) and torch._C._functorch.is_batchedtensor(t) for t in args):
            return function(*args, **kwargs)  # inside vmap; the operations that come of it are seen
        if function == torch.Tensor.device.__get__ and (number := self._devices.of(args[0])) >= 0:
            return torch.device("cpu", number)
        if function is torch.Tensor.cpu:
            return Move.apply(args[0], self._devices, -1)
        if function is torch.Tensor.to:
            asked = [kwargs.get("device"), kwargs.get("dtype"), *args[1:]]
            like = [t for t in asked if isinstance(t, torch.Tensor)]
            named = [torch.device(d) for d in asked if isinstance(d, str | torch.device)]
            numbers = [self._devices.of(t) for t in like] + [-1 if d.index is None else d.index for d in named]
            dtypes = [d for d in asked if isinstance(d, torch.dtype)] + [t.dtype for t in like]
            tensor = Move.apply(args[0], self._devices, numbers[0]) if numbers else args[0]
            tensor = tensor.to(*dtypes[:1]) if dtypes else tensor
            return tensor.clone() if kwargs.get("copy") and tensor is args[0] else tensor
        result = function(*args, **kwargs)
        if kwargs.get("device") is not None and isinstance(result, torch.Tensor):
            number = torch.device(kwargs["device"]).index
            self._devices.put(
                result, -1 if number is None else number
            )  # torch.tensor does not pass it to the dispatcher
        return result


class Move(torch.autograd.Function):
    """A copy on another device; its gradient returns."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, devices: FakeDevices, number: int) -> torch.Tensor:
        ctx.devices, ctx.back = devices, devices.of(tensor)
        return devices.moved(tensor, number)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.devices.moved(gradient, ctx.back), None, None
