"""Checks every memory access of the Triton kernels that run under `guard`, in triton's interpreter. It looks for the
mistakes that compute-sanitizer finds on a GPU.

A launch of a kernel fails in these cases:
* A lane that is not masked off reads or writes outside the elements of the argument that its pointer was made from. A
  pointer carries the number of its argument in the bits above the address, which pointer arithmetic does not change.
* A program reads what another program of the launch writes, or two programs write different values to one address.
* A lane reads what another lane of the same program has written, or the other way round, without a barrier in between.
* An integer of 32 bits overflows.
* The grid is larger than CUDA allows, or empty.

Programs run in a random order. Elements that a masked load does not define are NaN or a huge number, and so is memory
that torch allocates without contents. Kernels that use them give wrong results, which the tests notice.

A lane is an element of a tile. The interpreter does not know which lanes belong to one thread. The guard assumes that
the same element of two tiles of equal shape belongs to the same thread.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from random import Random
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Order = Literal["forward", "reverse", "random"]
Grid = tuple[int, int, int]
Ints = NDArray[np.int64]

TAG_BITS = 48  # addresses of a process have at most this number of bits
ADDRESS = np.uint64((1 << TAG_BITS) - 1)
NOBODY, MANY = -1, -2
GRID_LIMITS: Grid = 2**31 - 1, 65535, 65535  # CUDA's


class MemoryFault(Exception):
    """A kernel has made one of the mistakes that the guard looks for. The message names the kernel, the place and the
    argument."""


@dataclass(frozen=True, slots=True)
class Argument:
    """A tensor that was passed to a kernel, which may access the elements of this tensor only. `dims` has (size,
    stride) for each dimension, the largest stride first. Dimensions that together are one contiguous run are merged."""

    name: str
    start: int
    item_bytes: int
    dims: tuple[tuple[int, int], ...]
    storage: int

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Argument:
        dims: list[tuple[int, int]] = []
        pairs = sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True)
        for stride, size in [(stride, size) for stride, size in pairs if size != 1 and stride != 0]:
            if dims and dims[-1][1] == size * stride:
                dims[-1] = dims[-1][0] * size, stride
            else:
                dims.append((size, stride))
        if not tensor.numel():
            dims = [(0, 1)]
        return cls(name, tensor.data_ptr(), tensor.element_size(), tuple(dims), tensor.untyped_storage().data_ptr())

    def outside(self, addresses: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Returns a mask of the addresses that are not the address of an element."""
        offsets = addresses.astype(np.int64) - self.start
        rest, odd = np.divmod(offsets, self.item_bytes)
        found = (odd != 0) | (rest < 0)
        for size, stride in self.dims:
            number, rest = np.divmod(rest, stride)
            found |= number >= size
        return found | (rest != 0)

    def contains(self, lowest: int, highest: int) -> bool:
        """Returns True if the tensor is contiguous and has all elements from the address `lowest` to `highest`, which
        must be aligned. This check is fast. False means that only the slower method `outside` can tell."""
        if len(self.dims) > 1 or (self.dims and self.dims[0][1] != 1):
            return False
        size = self.dims[0][0] if self.dims else 1
        return self.start <= lowest and highest <= self.start + (size - 1) * self.item_bytes

    def describe(self, address: int) -> str:
        return f"argument {self.name}, element {(address - self.start) / self.item_bytes:g}"


class Access(NamedTuple):
    """A load or store of a program: the pointers and the mask of its lanes, and the written values (None for a load).
    `barriers` is the number of barriers that the program had passed before."""

    program: int
    barriers: int
    pointers: NDArray[np.uint64]
    mask: NDArray[np.bool_]
    written: NDArray[Any] | None

    def lanes(self) -> Ints:
        return np.flatnonzero(self.mask)

    def addresses(self) -> NDArray[np.uint64]:
        return self.pointers[self.mask] & ADDRESS


@dataclass
class Launch:
    """One launch of a kernel, with all accesses of its programs to memory, by the storage of the tensor."""

    kernel: str
    grid: Grid
    arguments: list[Argument] = field(default_factory=list[Argument])
    accesses: dict[int, list[Access]] = field(default_factory=lambda: defaultdict(list))
    threads: int = 128
    program: int = 0
    barriers: int = 0

    def __post_init__(self) -> None:
        if any(not 0 < size <= limit for size, limit in zip(self.grid, GRID_LIMITS, strict=True)):
            raise MemoryFault(f"{self.kernel}: the grid {self.grid} has an axis beyond {GRID_LIMITS}")

    def index(self, program: int) -> Grid:
        x, y, z = map(int, np.unravel_index(program, self.grid))
        return x, y, z

    def pointer(self, name: str, tensor: Tensor) -> int:
        """Returns the pointer that the kernel gets for a tensor, with the number of the argument in its upper bits."""
        self.arguments.append(Argument.of(name, tensor))
        return tensor.data_ptr() | len(self.arguments) << TAG_BITS

    def touch(self, pointers: NDArray[np.uint64], mask: NDArray[np.bool_], written: NDArray[Any] | None) -> None:
        """Must be called before an access: raises MemoryFault if the access is not allowed, and records it for the
        method `check`."""
        some = pointers[mask]
        if not some.size:
            return
        lowest, highest = int(some.min()), int(some.max())
        number = lowest >> TAG_BITS
        if number != highest >> TAG_BITS or not 0 < number <= len(self.arguments):
            self.fail(f"uses a pointer that is no argument's or several arguments': {lowest:#x} to {highest:#x}")
        argument, addresses = self.arguments[number - 1], some & ADDRESS
        aligned = not ((addresses - np.uint64(argument.start)) % np.uint64(argument.item_bytes)).any()
        if not aligned or not argument.contains(int(addresses.min()), int(addresses.max())):
            outside = argument.outside(addresses)
            if outside.any():
                where = argument.describe(int(addresses[outside][0]))
                self.fail(f"{'reads' if written is None else 'writes'} outside {where}: {outside.sum()} lanes")
        access = Access(self.program, self.barriers, pointers, np.broadcast_to(mask, pointers.shape), written)
        self.accesses[argument.storage].append(access)

    def fail(self, what: str, program: int | None = None) -> None:
        program = self.program if program is None else program
        raise MemoryFault(f"{self.kernel}, program {self.index(program)} of {self.grid}, {what}")

    def where(self, access: Access, lane: int) -> str:
        pointer = int(np.broadcast_to(access.pointers, access.mask.shape).reshape(-1)[lane])
        return self.arguments[(pointer >> TAG_BITS) - 1].describe(pointer & int(ADDRESS))

    def check(self) -> None:
        """Raises MemoryFault if the result depends on the order in which programs, or the lanes of a program between
        two barriers, run."""
        for accesses in self.accesses.values():
            writes = [access for access in accesses if access.written is not None]
            if writes:
                Replay(self, np.unique(np.concatenate([access.addresses() for access in writes]))).run(accesses)


class Replay:
    """Follows all accesses to those addresses that the launch writes, in the order in which they happened."""

    def __init__(self, launch: Launch, addresses: NDArray[np.uint64]) -> None:
        self._launch, self._addresses = launch, addresses
        # For every address: the program that wrote it last and the one that read it last, the number of barriers before
        # that, and a number for the lane and the shape of the tile (`_positions`).
        self._writer, self._reader = (np.full(len(addresses), NOBODY) for _ in range(2))
        self._written_at, self._read_at = (np.zeros(len(addresses), np.int64) for _ in range(2))
        self._write_lane, self._read_lane = (np.zeros(len(addresses), np.int64) for _ in range(2))
        self._values = np.zeros(len(addresses), np.uint64)

    def run(self, accesses: list[Access]) -> None:
        for access in accesses:
            addresses, lanes = access.addresses(), access.lanes()
            places = np.searchsorted(self._addresses, addresses)
            if access.written is not None:
                self._write(access, places, lanes)
                continue
            places[places == len(self._addresses)] = 0
            hit = self._addresses[places] == addresses
            if hit.any():
                self._read(access, places[hit], lanes[hit])

    def _read(self, access: Access, places: Ints, lanes: Ints) -> None:
        writer, positions = self._writer[places], self._positions(access, lanes)
        foreign = (writer != NOBODY) & (writer != access.program)
        self._refuse(foreign, access, lanes, "reads what another program writes")
        own = writer == access.program
        # If a tile has fewer elements than the program has threads, several threads read an element and one writes it.
        replicated = access.pointers.size < self._launch.threads
        now = own & (self._written_at[places] == access.barriers)
        raced = now & ((self._write_lane[places] != positions) | replicated)
        self._refuse(raced, access, lanes, "reads without a barrier what another lane wrote")
        places, positions = places[~own], positions[~own]
        reader = self._reader[places]
        again = (reader == access.program) & (self._read_at[places] == access.barriers)
        several = again & (self._read_lane[places] != positions)
        self._reader[places] = np.where((reader == NOBODY) | (reader == access.program), access.program, MANY)
        self._read_at[places] = access.barriers
        self._read_lane[places] = positions
        several |= self._read_lane[places] != positions
        self._read_lane[places[several]] = MANY

    def _write(self, access: Access, places: Ints, lanes: Ints) -> None:
        writer, reader, positions = self._writer[places], self._reader[places], self._positions(access, lanes)
        values = self._bits(access)
        another = (writer != NOBODY) & (writer != access.program)
        differs = another & (self._values[places] != values)
        self._refuse(differs, access, lanes, "writes another value than another program")
        foreign = (reader != NOBODY) & (reader != access.program)
        self._refuse(foreign, access, lanes, "writes what another program reads")
        now = (reader == access.program) & (self._read_at[places] == access.barriers)
        raced = now & (self._read_lane[places] != positions)
        self._refuse(raced, access, lanes, "writes without a barrier what another lane read")
        now = (writer == access.program) & (self._written_at[places] == access.barriers)
        raced = now & (self._write_lane[places] != positions) & (self._values[places] != values)
        self._refuse(raced, access, lanes, "writes without a barrier another value than another lane")
        self._writer[places], self._written_at[places] = access.program, access.barriers
        self._write_lane[places], self._values[places] = positions, values
        self._refuse(self._values[places] != values, access, lanes, "writes two values to one address")
        self._write_lane[places[self._write_lane[places] != positions]] = MANY

    @staticmethod
    def _positions(access: Access, lanes: Ints) -> Ints:
        """Returns a number for each lane that depends on the shape of the tile, too. Axes of length 1 do not count."""
        shape = tuple(size for size in access.pointers.shape if size != 1)
        return lanes + (hash(shape) & 0x7FFFFFFF) * (1 << 31)

    @staticmethod
    def _bits(access: Access) -> NDArray[np.uint64]:
        assert access.written is not None
        values = np.broadcast_to(access.written, access.pointers.shape)[access.mask]
        return values.view(f"u{values.itemsize}").astype(np.uint64)

    def _refuse(self, found: NDArray[np.bool_], access: Access, lanes: Ints, what: str) -> None:
        if found.any():
            where = self._launch.where(access, int(lanes[found][0]))
            self._launch.fail(f"{what}: {where}, {found.sum()} lanes", access.program)


class Guard:
    """Replaces the functions of the interpreter that launch kernels and access memory."""

    def __init__(self, order: Order, seed: int, corner: int | None, whole: Collection[str]) -> None:
        self._order, self._random, self._corner, self._whole = order, Random(seed), corner, whole
        self._launch: Launch | None = None
        self.launches: list[str] = []

    @property
    def launch(self) -> Launch:
        assert self._launch is not None, "no kernel runs"
        return self._launch

    def run(self, executor: Any, *args: Any, **kwargs: Any) -> None:
        """Launches a kernel on the tensors themselves. The interpreter's own function would copy the tensors."""
        import triton.language as tl
        from triton.runtime import interpreter

        signature = inspect.signature(executor.fn)
        options = set(kwargs) - set(signature.parameters)  # the options of the launch, such as num_warps
        bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name not in options})
        x, y, z = (*executor.grid, 1, 1)[:3]
        launch = self._launch = Launch(executor.fn.__name__, (x, y, z), threads=32 * kwargs.get("num_warps", 4))
        self.launches.append(launch.kernel)
        values = {
            name: value if name in executor.constexprs else self._value(name, value)
            for name, value in bound.arguments.items()
        }
        builder: Any = interpreter.interpreter_builder
        # The functions whose global `tl` must be replaced: the kernel, and those functions of `tl` that call others.
        functions: tuple[Any, ...] = (executor.fn, tl.sum.fn)
        scopes = [interpreter._patch_lang(function) for function in functions]  # pyright: ignore[reportPrivateUsage]
        try:
            builder.set_grid_dim(x, y, z)
            for program in self._programs(launch.kernel, launch.grid):
                launch.program, launch.barriers = program, 0
                builder.set_grid_idx(*launch.index(program))
                executor.fn(**values)
        finally:
            for scope in reversed(scopes):
                scope.restore()
            self._launch = None
        launch.check()

    def _value(self, name: str, value: Any) -> Any:
        from triton.runtime import interpreter

        converted: Any = interpreter._implicit_cvt(value)  # pyright: ignore[reportPrivateUsage]
        if isinstance(value, Tensor):
            assert value.device.type == "cpu", f"{name} is on {value.device}"
            converted.handle.data[0] = self.launch.pointer(name, value)
        return converted

    def _programs(self, kernel: str, grid: Grid) -> list[int]:
        corner = None if kernel in self._whole else self._corner
        axes = [range(size if corner is None else min(size, corner)) for size in grid]
        last = [size - 1 for size in grid]
        programs = [int(np.ravel_multi_index(np.subtract(last, back), grid)) for back in product(*axes)][::-1]
        if self._order == "random":
            self._random.shuffle(programs)
        return programs[::-1] if self._order == "reverse" else programs

    def load(self, builder: Any, ptrs: Any, mask: Any, other: Any, *_: object) -> Any:
        from triton.runtime import interpreter

        element = ptrs.get_element_ty()
        dtype = interpreter._get_np_dtype(element)  # pyright: ignore[reportPrivateUsage]
        self.launch.touch(ptrs.data, lanes_of(mask), None)
        if other is None:
            # Triton drops the argument `other` of a scalar load if it is zero, so zero may have been given for a
            # scalar.
            otherwise = np.full(ptrs.data.shape, poison(element, dtype) if ptrs.data.size > 1 else 0, dtype)
        else:
            otherwise = other.data
        found = interpreter._interpreter.load(ptrs.data & ADDRESS, mask.data, otherwise, dtype)  # pyright: ignore
        return interpreter.TensorHandle(found, element)

    def store(self, builder: Any, ptrs: Any, value: Any, mask: Any, *_: object) -> Any:
        from triton.runtime import interpreter

        self.launch.touch(ptrs.data, lanes_of(mask), value.data)
        return interpreter._interpreter.store(ptrs.data & ADDRESS, value.data, mask.data)  # pyright: ignore

    def barrier(self, builder: Any) -> None:
        self.launch.barriers += 1

    def atomic(self, builder: Any, *_: object) -> None:
        self.launch.fail("uses an atomic operation, which the guard does not know")


def lanes_of(mask: Any) -> NDArray[np.bool_]:
    """Returns a mask as booleans. If the interpreter broadcasts a comparison of two scalars to a tile, the tile has the
    dtype of the scalars, such as int32. NumPy would take such numbers for the indices of elements."""
    return mask.data.astype(np.bool_, copy=False)


def poison(element: Any, dtype: np.dtype[Any]) -> Any:
    """Returns a value of a triton type that makes a result wrong wherever it is used: NaN, or the largest integer."""
    if element.is_floating():
        bits: Any = np.array(-1).astype(f"i{dtype.itemsize}")  # a number whose bits are all 1 is NaN in every format
        return bits.view(dtype)
    return True if dtype == np.bool_ else np.iinfo(dtype).max


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a jit function from another one. The launch has put the interpreter's `tl` in place already."""
    return function.rewrite()(*args, **kwargs)


@contextmanager
def guard(
    order: Order = "random", seed: int = 0, corner: int | None = None, whole: Collection[str] = ()
) -> Generator[Guard]:
    """Context manager: kernels that are launched in the block run under the guard, in triton's interpreter.

    With a `corner`, only that number of programs at the end of each axis of the grid run, except for the kernels named
    in `whole`. Memory that torch allocates without contents is then not filled, because it may be huge."""
    from triton.runtime import interpreter

    guarded, builder = Guard(order, seed, corner, whole), interpreter.InterpreterBuilder
    methods = {
        "create_masked_load": guarded.load,
        "create_masked_store": guarded.store,
        "create_barrier": guarded.barrier,
        "create_atomic_cas": guarded.atomic,
        "create_atomic_rmw": guarded.atomic,
    }
    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=True)
    deterministic = torch.are_deterministic_algorithms_enabled()
    with (
        mock.patch.multiple(builder, **{name: _bound(method) for name, method in methods.items()}),
        mock.patch.object(interpreter.GridExecutor, "__call__", _bound(guarded.run)),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", call),
        mock.patch.object(interpreter.interpreter_builder, "options", options),
    ):
        # With deterministic algorithms, torch fills memory that it allocates without contents
        # (torch.utils.deterministic.fill_uninitialized_memory).
        torch.use_deterministic_algorithms(corner is None)
        try:
            yield guarded
        finally:
            torch.use_deterministic_algorithms(deterministic)


def _bound(method: Any) -> Any:
    """Returns a function that has the same arguments and becomes a method when it is an attribute of a class."""
    return lambda *args, **kwargs: method(*args, **kwargs)
