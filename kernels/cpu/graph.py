"""A graph on a CPU: the calls of the compiled library that some code makes, recorded once and repeated in one call.

What Python does between the kernels of a small model's step takes as long as some of them. It is the same in every step
of so many rows: only the numbers in a few input tensors differ.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jamba_server.kernels.cpu.library import FLOAT, INT, POINTER, library

_MOST_ARGUMENTS = 32
_ALLOCATIONS = ("new_empty",)
_VIEWS = ("__get__", "__getitem__", "__len__", "data_ptr", "dim", "stride", "element_size", "is_contiguous",
          "contiguous", "flatten", "unflatten", "split")  # fmt: skip


class _Call(ctypes.Structure):
    """`Call` of `src/replay.cpp`."""

    _fields_ = (
        ("function", POINTER),
        ("count", INT),
        ("arguments", INT * _MOST_ARGUMENTS),
        ("number", FLOAT),
        ("has_number", ctypes.c_int32),
    )


class Arena:
    """Memory for what is under way in graphs. As they are repeated one at a time, a block that one of them has done
    with belongs to all; a block is never given back while any of them may be repeated."""

    def __init__(self) -> None:
        self.library = library()
        self.replay = self.library.function("replay", POINTER, INT)
        self._blocks: list[Tensor] = []
        self._free: dict[int, list[int]] = {}  # addresses by size

    @property
    def num_bytes(self) -> int:
        """Of all blocks."""
        return sum(block.numel() for block in self._blocks)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Like `torch.empty`; its block is free again when the last view of it is gone."""
        wanted = max(1, math.prod(shape)) * dtype.itemsize
        size = 1 << (wanted - 1).bit_length()
        free = self._free.setdefault(size, [])
        if not free:
            self._blocks.append(torch.empty(size + 64, dtype=torch.uint8))
            free.append((self._blocks[-1].data_ptr() + 63) // 64 * 64)
        address = free.pop()
        return _at(address, shape, dtype, lambda: free.append(address))


def _at(address: int, shape: Sequence[int], dtype: torch.dtype, let_go: Callable[[], None] | None = None) -> Tensor:
    """A tensor over memory; `let_go` is called when its last view is gone."""
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    if let_go is not None:
        weakref.finalize(memory, let_go)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


class _Recorder(TorchFunctionMode):
    """Takes memory for new tensors from the arena, and lets nothing else of torch be computed: it would be missing
    when the calls are repeated."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, named = func.__name__, kwargs or {}
        if name in _ALLOCATIONS:
            return self._arena.empty(args[1:], named.get("dtype", args[0].dtype))
        if name not in _VIEWS:
            raise RuntimeError(f"{name} cannot be recorded")
        result = func(*args, **named)
        for view in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(view, Tensor) and _storage(view) != _storage(args[0]):
                raise RuntimeError(f"{name} would copy, and the copy would be gone when the calls are repeated")
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class NativeGraph:
    """See `engine.graphs.Graph`. Graphs of one arena share its memory, so only one of them may be repeated at a time.

    The inputs of what is recorded, weights and caches must stay where they are.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._calls: Any = None
        self._output: Tensor | None = None

    @property
    def num_calls(self) -> int:
        return len(self._calls)

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """Runs `run`, once, and records its calls. Returns what it returned, which is good while the arena lives."""
        with self._arena.library.recording() as recorded, _Recorder(self._arena):
            output = run()
        self._calls = (_Call * len(recorded))(*(_call(*call) for call in recorded))
        # The graph remembers where its result lies; the block is the arena's again once the caller has done with it.
        self._output = _at(output.data_ptr(), output.shape, output.dtype)
        return output

    def replay(self) -> Tensor:
        """Repeats them; what `run` returned, which a replay of any graph of the arena may overwrite."""
        if self._output is None:
            raise RuntimeError("nothing was captured that could be repeated")
        self._arena.replay(ctypes.addressof(self._calls), len(self._calls))
        return self._output


def _call(function: Any, arguments: tuple[Any, ...]) -> _Call:
    *whole, last = arguments
    has_number = function.argtypes[-1] is FLOAT
    if not has_number:
        whole.append(last)
    values = [0 if value is None else int(value) for value in whole]
    if FLOAT in function.argtypes[: len(values)] or function.restype is not None:
        raise TypeError("a call with a float that is not its last argument, or with a result, cannot be recorded")
    address = ctypes.cast(function, POINTER).value
    padded = (INT * _MOST_ARGUMENTS)(*values)
    return _Call(address, len(values), padded, last if has_number else 0.0, has_number)
