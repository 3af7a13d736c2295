"""Fills Triton's cache on disk with the kernels that the part `tune` of the GPU check will run. The kernels are
compiled in processes that use no GPU.

Ops are called with `meta` tensors, which have shapes but no data, and a launch only compiles the kernel. So the keys in
the cache are the same as those of the real call on the GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from types import TracebackType
from typing import Any
from unittest import mock

import torch

import jamba_server.kernels.triton.launch
from benchmarks.gpu.targets import Target, targets_of
from benchmarks.gpu.variants import AS_IT_IS, Variant, applied

WARP = 32  # number of threads in a warp
MOST_PROCESSES = 16


class Elsewhere:
    """Replaces Triton's driver in a process that compiles kernels for a GPU but does not use the GPU."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, WARP)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_only(capability: int) -> Generator[None]:
    """While this context is active, each kernel launch compiles the kernel for a GPU of compute capability `capability`
    / 10, but does not run the kernel."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run: Any = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> Any:
        return run(kernel, *args, grid=grid, warmup=True, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        stack.enter_context(mock.patch.object(driver, "_active", Elsewhere(capability)))
        stack.enter_context(mock.patch("jamba_server.kernels.table.ensure_available"))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(capability, 10)))
        # The kernels choose tile sizes by the compute capability, and cache the compute capability of this machine. The
        # cached compute capability is removed, so that the kernels use `capability`.
        known = getattr(jamba_server.kernels.triton.launch, "capability", None)
        for forget in (known.cache_clear,) if known is not None else ():
            forget()
            stack.callback(forget)
        yield


@cache
def shapes_alone(shape: str) -> tuple[Target, ...]:
    """Returns all kernel calls to tune for a model shape. The arguments of the calls are tensors on torch's device
    `meta`, so the arguments have no data."""
    return tuple(target for group in targets_of(shape, "meta").groups() for target in group)


def compile_one(shape: str, capability: int, index: int, variant: Variant) -> str:
    """Compiles the Triton kernels that one kernel call launches, with the tile sizes and other settings of `variant`.
    `index` is the number of the call in the result of `shapes_alone`. Runs in a worker process. Returns an error
    message, or "" if the compilation succeeds."""
    torch.set_num_threads(1)
    target = shapes_alone(shape)[index]
    try:
        with compiling_only(capability), applied(variant):
            target.case.called(target.kernels())(*target.case.prepare(target.kernels()))
    except Exception as error:  # noqa: BLE001 - the same error occurs on the GPU and is recorded there
        return f"{type(error).__name__}: {error}"
    return ""


class Compiler:
    """Compiles the kernels of all calls to tune, in worker processes. During the compilation, the main process times
    the calls whose kernels are already compiled.

    If `capability` is None, kernels are interpreted, and nothing is compiled.
    """

    def __init__(self, shape: str, capability: int | None) -> None:
        self._shape, self._capability = shape, capability
        self._pool: ProcessPoolExecutor | None = None
        self._of_target: dict[int, list[Future[str]]] = {}
        self._by_key: dict[object, Future[str]] = {}

    def __enter__(self) -> Compiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, indices: Iterable[int]) -> None:
        """Starts to compile the kernels of tuned calls, in the order of `indices`. Each index is the position of a call
        in the list of all tuned calls.

        A variant that several tuned calls share is compiled once.
        """
        if self._capability is None:
            return
        processes = max(1, min(MOST_PROCESSES, os.cpu_count() or 1) - 1)
        # CUDA does not work in a process forked from a process that has initialised CUDA, so the workers are spawned.
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
        for index in indices:
            target = shapes_alone(self._shape)[index]
            for variant in (AS_IT_IS, *target.variants):
                shared = (target.case.op, target.case.quantization) if variant.whole_tile else target.label
                key = (shared, repr(variant.changes))
                if key not in self._by_key:
                    call = (self._shape, self._capability, index, variant)
                    self._by_key[key] = self._pool.submit(compile_one, *call)
                self._of_target.setdefault(index, []).append(self._by_key[key])

    def wait(self, index: int) -> None:
        """Waits until each kernel of one tuned call is compiled or has failed to compile. The argument `index` is the
        position of the call in the list of all tuned calls."""
        for future in self._of_target.get(index, ()):
            if (error := future.exception()) is not None:
                print(f"compiling ahead: {error}", file=sys.stderr, flush=True)

    @property
    def counts(self) -> dict[str, int]:
        """Returns the number of compilations that have ended, and how many of these compilations failed."""
        done = [future for future in self._by_key.values() if future.done() and future.exception() is None]
        return {"compiled": len(done), "of_them_failed": sum(bool(future.result()) for future in done)}
