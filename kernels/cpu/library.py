"""The compiled library: finding it, and its functions with their types."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from jamba_server.kernels.ops import KernelUnavailable

logger = logging.getLogger(__name__)

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")
"""What the library has code for, by the number it uses; each machine runs all up to its own."""


class _Dtypes(dict[torch.dtype, int]):
    def __missing__(self, dtype: torch.dtype) -> int:
        known = ", ".join(str(known).removeprefix("torch.") for known in self)
        raise ValueError(f"the cpu kernels compute in {known}, not in {str(dtype).removeprefix('torch.')}")


DTYPES = _Dtypes({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})
"""The library's numbers for dtypes. ValueError for any other."""

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
"""Types of arguments. A tensor goes as its `data_ptr()`; a missing one as None."""


class Library:
    """The functions of one shared library."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._functions: list[Any] = []
        self._recorder = threading.Lock()
        self._recorded = threading.local()
        self._hook = self._record  # one object for ever: a call under way on another thread may be about to use it

    def function(self, name: str, *arguments: Any, result: Any = None) -> Callable[..., Any]:
        """A function by its name, the types of its arguments and of its result."""
        try:
            found = self._library[name]  # an object of its own each time, so that its types are ours alone
        except AttributeError as error:
            raise KernelUnavailable(f"the compiled library is older than its sources: {error}") from error
        found.argtypes, found.restype = list(arguments), result
        self._functions.append(found)
        return found

    @contextmanager
    def recording(self) -> Generator[list[tuple[Any, tuple[Any, ...]]]]:
        """All calls of this thread from here to the end, each a function with its arguments."""
        calls: list[tuple[Any, tuple[Any, ...]]] = []
        with self._recorder:
            try:
                self._recorded.calls = calls
                for function in self._functions:
                    function.errcheck = self._hook  # ctypes' own: calls that nobody records do not pay for it
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
        """The instructions in use."""
        return LEVELS[self.function("machine_level", result=INT)()]

    def set_level(self, level: str) -> None:
        """For tests: uses the code of a lower level. ValueError if the machine cannot run it."""
        if self.function("set_level", INT, result=INT)(LEVELS.index(level)) != LEVELS.index(level):
            raise ValueError(f"this machine has no {level}")

    def set_threads(self, threads: int) -> None:
        """How many threads a kernel may use, the caller's included."""
        self.function("set_threads", INT)(threads)


def library() -> Library:
    """The library, with as many threads as torch has now. KernelUnavailable if it was not built."""
    found = open_library(Path(__file__).parent)
    found.set_threads(torch.get_num_threads())
    return found


@cache
def open_library(folder: Path) -> Library:
    """The library in `folder`, loaded once. KernelUnavailable with the reason if there is none, or a broken one."""
    built = sorted(folder.glob("_native*.so"))
    if not built:
        raise KernelUnavailable("it was built without a C++ compiler; install one (g++) and reinstall jamba-server")
    try:
        found = Library(built[0])
    except OSError as error:
        raise KernelUnavailable(f"{built[0].name} cannot be loaded: {error}") from error
    logger.info("kernels: %s holds code for %s; this machine runs %s", built[0].name, ", ".join(LEVELS), found.level())
    return found
