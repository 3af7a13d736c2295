"""This module finds and loads the compiled library, and declares the argument types of its functions."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from jamba_server.kernels.ops import KernelUnavailable

logger = logging.getLogger(__name__)

X86_LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
ARM_LEVELS = ("neon", "neon_dot", "neon_bf16")
LEVELS = (*X86_LEVELS, *ARM_LEVELS)
"""The instruction sets for which there is code, in ascending order: those of x86-64 and those of ARM.

The index of an instruction set is its number in the library's functions. A machine that has one of the instruction
sets can also run the code for all earlier ones of the same processors. `portable` is for all processors but ARM's.
"""

EMULATED, NEON_EMULATED = "amx-emulated", "neon_bf16-emulated"
"""The levels at which matrix products and attention of bfloat16 compute in other instructions what `amx` computes, and
matrix products what `neon_bf16` computes. They are for tests."""

ALL_LEVELS = (*LEVELS, EMULATED, NEON_EMULATED)
_NUMBERS = {level: number for number, level in enumerate(ALL_LEVELS)}
_AMX = (
    "this processor has no AMX",
    "in use",
    "the processor has AMX, but the operating system does not let this process use it",
    "the processor may have AMX, but the compiler that built the library did not know it",
)


MOST_THREADS = 1024
"""The largest number of threads. More are not started."""


def compiled_levels(machine: str) -> tuple[str, ...]:
    """Returns the levels that a library for the processors `machine` has, in ascending order. `machine` is what
    `platform.machine` returns."""
    if machine in ("aarch64", "arm64"):
        return ARM_LEVELS
    return X86_LEVELS if machine in ("x86_64", "AMD64") else X86_LEVELS[:1]


class _Dtypes(dict[torch.dtype, int]):
    def __missing__(self, dtype: torch.dtype) -> int:
        known = ", ".join(str(known).removeprefix("torch.") for known in self)
        raise ValueError(f"the cpu kernels compute in {known}, not in {str(dtype).removeprefix('torch.')}")


DTYPES = _Dtypes({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})
"""Maps a dtype to its number in the library's functions. A look-up of another dtype raises ValueError."""

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
"""The types of the arguments of the library's functions.

A tensor is passed as its address, and a missing tensor as None.
"""


class Library:
    """Loads one shared library (a .so file), looks up its functions and records calls to these functions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nodes = 1  # the number of memory nodes
        self._library = ctypes.CDLL(str(path))
        self._functions: list[Any] = []
        self._recorder = threading.Lock()
        self._recorded = threading.local()
        # The method `_record` is the hook that ctypes runs after a call. This reference to the hook is never deleted,
        # because another thread might be about to call the hook.
        self._hook = self._record

    def function(self, name: str, *arguments: Any, result: Any = None) -> Callable[..., Any]:
        """Returns the library's function `name`, declared with the given argument types and result type.

        Raises KernelUnavailable if the library does not have the function.
        """
        try:
            # ctypes returns a new function object for each look-up of `name`. The types that are declared below
            # therefore do not change the function objects that earlier look-ups returned.
            found = self._library[name]
        except AttributeError as error:
            raise KernelUnavailable(f"the compiled library is older than its sources: {error}") from error
        found.argtypes, found.restype = list(arguments), result
        self._functions.append(found)
        return found

    @contextmanager
    def recording(self) -> Generator[list[tuple[Any, tuple[Any, ...]]]]:
        """Records the calls to the library that this thread makes inside the `with` block.

        The list contains (function, arguments) for each call.
        """
        calls: list[tuple[Any, tuple[Any, ...]]] = []
        with self._recorder:
            try:
                self._recorded.calls = calls
                for function in self._functions:
                    # ctypes runs the hook after each call of the function. The hook is set only during a recording.
                    function.errcheck = self._hook
                yield calls
            finally:
                self._recorded.calls = None
                for function in self._functions:
                    del function.errcheck

    def _record(self, result: Any, function: Any, arguments: tuple[Any, ...]) -> Any:
        if (calls := getattr(self._recorded, "calls", None)) is not None:
            calls.append((function, arguments))
        return result

    def level(self) -> str:
        """Returns the name of the instruction set that the library uses."""
        return ALL_LEVELS[self.function("machine_level", result=INT)()]

    def set_level(self, level: str) -> None:
        """Makes the library use the instruction set `level`, for tests. Raises ValueError if the CPU lacks `level`.

        With an emulated level, kernels other than matrix products and attention use the machine's highest instruction
        set.
        """
        wanted = self.number(level)
        self.function("set_level", INT, result=INT)(wanted)

    def number(self, level: str) -> int:
        """Returns the number of an instruction set. Raises ValueError if it is unknown or if the CPU lacks it."""
        if level not in _NUMBERS:
            raise ValueError(f"there is no level {level!r}; there are {', '.join(_NUMBERS)}")
        if not self.function("has_level", INT, result=INT)(_NUMBERS[level]):
            raise ValueError(f"this machine has no {level}")
        return _NUMBERS[level]

    def levels(self) -> tuple[str, ...]:
        """Returns the instruction sets that this machine has and for which the library has code, in ascending order."""
        has_level = self.function("has_level", INT, result=INT)
        return tuple(level for level in LEVELS if has_level(_NUMBERS[level]))

    def amx(self) -> str:
        """Returns in words whether the library can use the processor extension AMX, or why it cannot."""
        return _AMX[self.function("amx_availability", result=INT)()]

    def set_threads(self, threads: int) -> None:
        """Sets the largest number of threads that a kernel uses. The calling thread is one of these threads.

        Raises OSError if the system does not start so many threads.
        """
        started = self.function("set_threads", INT, result=INT)(threads)
        if started < min(threads, MOST_THREADS):
            raise OSError(f"the CPU kernels need {threads} threads; the system started {started - 1} beside the caller")

    def set_nodes(self, nodes: Sequence[Sequence[int]]) -> int:
        """Sets the processors of each memory node on which threads shall run. With more than one node, the threads are
        divided among the nodes and bound to the processors of their node.

        Returns the number of threads that the system did not let be bound. Raises ValueError for a node without a
        processor, for more than 64 nodes, and for a processor with a number above 8191.
        """
        pairs = [(number, node) for node, numbers in enumerate(nodes) for number in numbers]
        array = ctypes.c_int64 * len(pairs)
        processors, node_of = array(*(number for number, _ in pairs)), array(*(node for _, node in pairs))
        set_nodes = self.function("set_nodes", POINTER, POINTER, INT, INT, result=INT)
        unbound: int = set_nodes(ctypes.addressof(processors), ctypes.addressof(node_of), len(pairs), len(nodes))
        if unbound < 0:
            raise ValueError(f"the memory nodes must have processors with numbers below 8192, not {list(nodes)}")
        self.nodes = len(nodes)
        return unbound

    def set_together(self, together: bool) -> None:
        """For tests: makes every thread that a kernel needs take a part of the kernel's work, however small."""
        self.function("set_together", INT)(together)

    def pieces_taken(self, threads: int) -> list[int]:
        """Returns how many ranges of pieces of work each thread has taken since their number was set.

        The first of the `threads` numbers is that of the threads that call kernels.
        """
        counts = (ctypes.c_int64 * threads)()
        self.function("pieces_taken", POINTER, INT)(ctypes.addressof(counts), threads)
        return list(counts)

    def jobs_run(self) -> int:
        """Returns how many times several threads have shared the work of a kernel, since the library was loaded."""
        return self.function("jobs_run", result=INT)()

    def meeting_seconds(self, times: int = 10_000) -> float:
        """Measures how long a kernel takes in which every thread waits for all others.

        There must not be more threads than processors, because the waiting threads do not let others run.
        """
        meet = self.function("meet", INT)
        meet(times)
        start = time.perf_counter()
        meet(times)
        return (time.perf_counter() - start) / times


def level_number(level: str | None) -> int:
    """Returns the number of the instruction set that an op was asked to use, or -1, for the library's, if it is None.

    Raises KernelUnavailable if there is no such instruction set or if the CPU lacks it.
    """
    native = library()
    try:
        return -1 if level is None else native.number(level)
    except ValueError as error:
        raise KernelUnavailable(str(error)) from error


PREFETCH_DISTANCES = (0, 512, 1024, 2048, 4096, 8192, 16384)
"""The distances in bytes between the memory in use and the memory that is prefetched, for measurements."""


def read_bandwidth(native: Library, memory: torch.Tensor, seconds: float) -> float:
    """Measures how many bytes of `memory` the library reads per second, with the best of `PREFETCH_DISTANCES`.

    Each distance is measured at least once, and all of them as often as `seconds` allows. A measurement of the machine
    needs `memory` that is larger than the processor's caches.
    """
    run = native.function("read_memory", POINTER, INT, INT, result=INT)
    size = memory.numel() * memory.element_size() // (1 << 20) << 20
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        for distance in PREFETCH_DISTANCES:
            start = time.perf_counter()
            run(memory.data_ptr(), size, distance)
            best = min(best, time.perf_counter() - start)
    return size / best


def library() -> Library:
    """Returns the compiled library, set to use as many threads as torch uses.

    Raises KernelUnavailable if the library is missing or cannot be loaded.
    """
    found = open_library(Path(__file__).parent)
    found.set_threads(torch.get_num_threads())
    return found


@cache
def open_library(folder: Path) -> Library:
    """Returns the compiled library in `folder`. Only the first call with this folder loads the library.

    Raises KernelUnavailable if `folder` has no library or the library cannot be loaded.
    """
    built = sorted(folder.glob("_native*.so"))
    if not built:
        raise KernelUnavailable("it was built without a C++ compiler; install one (g++) and reinstall jamba-server")
    try:
        found = Library(built[0])
    except OSError as error:
        raise KernelUnavailable(f"{built[0].name} cannot be loaded: {error}") from error
    logger.info("kernels: %s runs %s; this machine has %s", built[0].name, found.level(), ", ".join(found.levels()))
    return found
