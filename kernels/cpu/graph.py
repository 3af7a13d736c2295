"""A CPU graph records the calls that one step makes to the compiled library. A single call can then repeat the step.

In a step of a small model, the Python code between two kernels takes as long as some kernels. This Python code makes
the same calls in every step with the same number of rows; only the contents of a few input tensors differ.
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
          "chunk", "contiguous", "flatten", "unflatten", "split")  # fmt: skip


class _Call(ctypes.Structure):
    """Contains one recorded call to the library, with the layout of the C++ struct `Call` in `src/replay.cpp`."""

    _fields_ = (
        ("function", POINTER),
        ("count", INT),
        ("arguments", INT * _MOST_ARGUMENTS),
        ("number", FLOAT),
        ("has_number", ctypes.c_int32),
    )


class Arena:
    """Allocates memory for the intermediate tensors of the steps that graphs record.

    The memory consists of blocks. Only one graph runs at a time, so two graphs can use the same block. Blocks are not
    returned to the operating system while the arena lives, because a graph might be repeated at any time.
    """

    def __init__(self) -> None:
        self.library = library()
        self.replay = self.library.function("replay", POINTER, INT)
        self._blocks: list[Tensor] = []
        self._free: dict[int, list[int]] = {}  # maps a size in bytes to the addresses of the free blocks of that size

    @property
    def num_bytes(self) -> int:
        """Returns the total size of all blocks in bytes."""
        return sum(block.numel() for block in self._blocks)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns an uninitialised tensor.

        The tensor's memory is reused after this tensor and all its views are deleted.
        """
        wanted = max(1, math.prod(shape)) * dtype.itemsize
        size = 1 << (wanted - 1).bit_length()
        free = self._free.setdefault(size, [])
        if not free:
            self._blocks.append(torch.empty(size + 64, dtype=torch.uint8))
            free.append((self._blocks[-1].data_ptr() + 63) // 64 * 64)
        address = free.pop()
        return _at(address, shape, dtype, lambda: free.append(address))


def _at(address: int, shape: Sequence[int], dtype: torch.dtype, let_go: Callable[[], None] | None = None) -> Tensor:
    """Returns a tensor whose elements are stored at the memory address `address`.

    The function `let_go` is called when the tensor and its views are deleted.
    """
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    if let_go is not None:
        weakref.finalize(memory, let_go)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


class _Recorder(TorchFunctionMode):
    """Allocates new tensors in the arena, and makes all computation by torch raise RuntimeError, during a recording.

    A graph records only calls to the compiled library. When the graph is repeated, a computation by torch would be
    missing.
    """

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
    """Implements the protocol `engine.graphs.Graph`.

    Graphs of one arena share memory, so only one of these graphs may run at a time.

    The input tensors of the recorded calls, the weights and the caches must keep their addresses.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._calls: Any = None
        self._output: Tensor | None = None

    @property
    def num_calls(self) -> int:
        return len(self._calls)

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """Calls `run` once, records the library calls that `run` makes, and returns the result of `run`.

        The memory of the result is valid while the arena lives.
        """
        with self._arena.library.recording() as recorded, _Recorder(self._arena):
            output = run()
        self._calls = (_Call * len(recorded))(*(_call(*call) for call in recorded))
        # The graph keeps the address of the tensor `output` but does not keep the tensor alive. After the caller
        # deletes the tensor, other graphs may use its memory.
        self._output = _at(output.data_ptr(), output.shape, output.dtype)
        return output

    def replay(self) -> Tensor:
        """Repeats the recorded calls and returns the result of the repeated step.

        A later replay of any graph of the arena may overwrite the result.
        """
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
