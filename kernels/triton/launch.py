"""This module compiles and launches Triton kernels, and defines functions that several kernels call."""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, ParamSpec, TypeVar, cast

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import JITFunction

from jamba_server.kernels.triton import interpreted

P = ParamSpec("P")
T = TypeVar("T")

EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""This launch option is for kernels whose bits must equal those of another kernel. It lets only `tl.fma` fuse a
multiplication and an addition."""

DEPENDENT = False
"""Whether a kernel may be launched while the kernel before it still runs (programmatic dependent launch). Its programs
then take their places on the multiprocessors early, and wait in the function `follow`. GPUs below compute capability
9.0 cannot do this. It is off until a GPU has shown that it gives the same bits in less time."""

_only_compiles: ContextVar[bool] = ContextVar("_only_compiles", default=False)


class Kernel(JITFunction[Any]):
    """A Triton kernel, which is compiled at its first launch with each combination of argument types.

    Inside `compile_launches` a launch only compiles the kernel and does not run it. Every kernel begins with a call of
    `follow`, because with DEPENDENT it may start before the kernel that writes its inputs has ended.
    """

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if DEPENDENT and capability() >= (9, 0):
            options["launch_pdl"] = True
        return super().run(*args, grid=grid, warmup=warmup or _only_compiles.get(), **options)


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Turns a Python function into a Triton kernel, like the decorator `triton.jit`, but has the return type Any.

    The types of `triton.jit` do not describe the launch of a kernel and treat every argument as a tensor.
    """
    if function is None:
        return partial(jit, **options)
    return triton.jit(function, **options) if interpreted() else Kernel(function, **options)


def constant(function: Callable[P, T]) -> Callable[P, T]:
    """Turns a function of constants into a function that a kernel can call while it is compiled. The function can also
    be called outside kernels, and may call only built-in functions and other functions of this kind."""
    return cast("Callable[P, T]", triton.constexpr_function(function))


def compile_launches(launch: Callable[[], object], executor: Executor) -> int:
    """Calls the function `launch`. Compiles and loads each kernel that `launch` would start, but runs no kernel.

    The compilers run in `executor`. The tensors may be on the device "meta". Returns the number of kernels and raises
    the first error. No other thread may launch a kernel at the same time.
    """
    token = _only_compiles.set(True)
    try:
        with triton.AsyncCompileMode(executor) as mode:
            launch()
    finally:
        _only_compiles.reset(token)
    # Reading the property `run` loads the kernel onto the device. In triton 3.6, reading `run` also compiles a C
    # function that launches the kernel.
    return sum(1 for _ in executor.map(lambda kernel: kernel.result().run, mode.future_kernels.values()))


INTERPRETED = tl.constexpr(interpreted())
LOG2_E = tl.constexpr(1.4426950408889634)


@cache
def capability() -> tuple[int, int]:
    """Returns the GPU's compute capability as (major, minor), or (0, 0) if the kernels run in Triton's interpreter.

    Tiles may depend on the capability, because results need to be equal only on one kind of device.
    """
    return (0, 0) if interpreted() else torch.cuda.get_device_capability()


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up to an integer."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Returns the smallest power of two that is at least n. n must be at least 1."""
    return 1 << (n - 1).bit_length()


@jit
def follow() -> None:
    """Waits until the kernels that were launched before have ended and what they wrote can be read. Then allows the
    launch of the next kernel, which in turn waits for this one. At most two kernels therefore overlap.

    This is the first statement of every kernel. Where a kernel is not launched as a dependent, nothing is waited for.
    """
    if not INTERPRETED and tl.target_info.cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


@jit
def rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Converts a float32 tensor x to the type `dtype`. Rounds to the nearest number, ties to even."""
    # The conversion in Triton's interpreter drops the low bits instead of rounding.
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@jit
def silu(x: tl.tensor) -> tl.tensor:
    """Returns x * sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@jit
def softplus(x: tl.tensor) -> tl.tensor:
    """Returns log(1 + exp(x)) of float32 x. If x is above 20, the rounded result is x itself."""
    e = tl.exp(tl.minimum(x, 20.0))
    # This is Kahan's method for log1p(e). The variable u is 1 + e, rounded. The factor e / (u - 1) corrects the
    # rounding error of u.
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, log1p)


@jit
def dot(a: tl.tensor, b: tl.tensor, accumulator: tl.tensor) -> tl.tensor:
    """Returns accumulator + a @ b in float32.

    A product of float32 operands is computed as three TF32 products, because tensor cores do not multiply float32.
    """
    if INTERPRETED:
        # This code replaces the function `tl.dot` in Triton's interpreter. The interpreter's `tl.dot` reads the bits of
        # a bfloat16 number as an integer. Its order of summation also depends on a row's position in the tile.
        return accumulator + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
    return tl.dot(a, b, accumulator, input_precision="tf32x3")
