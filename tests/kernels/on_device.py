"""Runs an op on another device with a test's CPU tensors. When the call returns, the CPU tensors also have what the op
has written in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jamba_server.kernels.ops import QuantizedWeight, StackedWeight, Weight


class OnDevice:
    """An op whose arguments are copied to `device` and back. Views keep their strides, and views that share memory on
    the CPU share memory on the device. So a kernel sees the layout that the test made, and the test notices if a kernel
    writes next to a view."""

    def __init__(self, op: Any, device: torch.device) -> None:
        self._op, self._device = op, device
        self.__module__ = op.__module__

    def pack(self, *weights: Weight) -> Any:
        return self._op.pack(*map(self._move, weights))

    def _move(self, weight: Weight) -> Weight:
        if isinstance(weight, StackedWeight):
            return StackedWeight(tuple(self._move_one(part) for part in weight.parts))
        return self._move_one(weight)

    def _move_one(self, weight: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
        if isinstance(weight, Tensor):
            return weight.to(self._device)
        return weight.each(lambda tensor: tensor.to(self._device))

    def rows(self, weight: Any, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self._op.rows(weight, ids.to(self._device), dtype).cpu()

    def sums(self, *args: Any) -> None:
        self._run(self._op.sums, *args)

    def gated(self, x: Tensor, weight: Any, activation: Any) -> Tensor:
        return self._run(self._op.gated, x, weight, activation._op if isinstance(activation, OnDevice) else activation)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._op, *args, **kwargs)

    def _run(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        # Maps the address and the dtype of the memory behind some views to this memory and to its copy on the device.
        memories: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                moved = [move(item) for item in value]
                return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
            if not isinstance(value, Tensor) or value.device.type != "cpu":
                return value
            if value.numel() == 0:
                return value.to(self._device)
            key = value.untyped_storage().data_ptr(), value.dtype
            if key not in memories:
                memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
                memories[key] = memory, memory.to(self._device, copy=True)
            return memories[key][1].as_strided(value.shape, value.stride(), value.storage_offset())

        result = op(*move(args), **{name: move(value) for name, value in kwargs.items()})
        for here, there in memories.values():
            here.copy_(there)
        return _to_cpu(result)


def _to_cpu(value: Any) -> Any:
    return tuple(map(_to_cpu, value)) if isinstance(value, tuple) else value if value is None else value.cpu()
