"""What the kernels share: launch options, and functions of elements in float32."""

# What the compiler knows of a kernel, the type checker does not.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from jamba_server.kernels.triton import interpreted

EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""Launch option of kernels whose bits must equal those of another kernel: only `tl.fma` fuses."""

_only_compiles: ContextVar[bool] = ContextVar("_only_compiles", default=False)


class Kernel(JITFunction[Any]):
    """Compiled when it is launched with arguments of new kinds; within `compile_launches` never launched."""

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return super().run(*args, grid=grid, warmup=warmup or _only_compiles.get(), **options)


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit` without its types, which have no place for the launch of a kernel and take every argument for a
    tensor."""
    if function is None:
        return partial(jit, **options)
    return triton.jit(function, **options) if interpreted() else Kernel(function, **options)


def compile_launches(launch: Callable[[], object], executor: Executor) -> int:
    """Compiles the kernels that `launch` launches, in `executor`, and loads them onto the device, but runs none of
    them: tensors may be on the device "meta". Returns how many. Raises the first error. Meanwhile no other thread may
    launch any."""
    token = _only_compiles.set(True)
    try:
        with triton.AsyncCompileMode(executor) as mode:
            launch()
    finally:
        _only_compiles.reset(token)
    # triton 3.6 compiles a launcher for each
    return sum(1 for _ in executor.map(lambda kernel: kernel.result().run, mode.future_kernels.values()))


INTERPRETED = tl.constexpr(interpreted())
LOG2_E = tl.constexpr(1.4426950408889634)


@cache
def capability() -> tuple[int, int]:
    """Of the GPU; (0, 0) in the interpreter. Tiles may depend on it: a device's bits stay its own."""
    return (0, 0) if interpreted() else torch.cuda.get_device_capability()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


@jit
def rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """x, float32, to the nearest of `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # it truncates
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@jit
def silu(x: tl.tensor) -> tl.tensor:
    """x * sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@jit
def softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + exp(x)), and x itself above 20, where float32 knows no difference."""
    e = tl.exp(tl.minimum(x, 20.0))
    # log1p (Kahan): the rounding of 1 + e is taken off again
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, log1p)


@jit
def dot(a: tl.tensor, b: tl.tensor, accumulator: tl.tensor) -> tl.tensor:
    """accumulator + a @ b, in float32: of float32 operands as three products of TF32, far quicker than without."""
    if INTERPRETED:
        # its own product takes the bits of a bfloat16 for an integer, and its order of sums depends on a row's place
        return accumulator + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
    return tl.dot(a, b, accumulator, input_precision="tf32x3")
