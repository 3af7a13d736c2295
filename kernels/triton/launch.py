"""What the kernels share: launch options, and functions of elements in float32."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kernels.triton import interpreted

EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""Launch option of kernels whose bits must equal those of another kernel: only `tl.fma` fuses."""

INTERPRETED = tl.constexpr(interpreted())
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def rounded(x: Any, dtype: tl.constexpr) -> Any:
    """x, float32, to the nearest of `dtype`, ties to even."""
    if INTERPRETED:  # it truncates to bfloat16
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def silu(x: Any) -> Any:
    """x * sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x: Any) -> Any:
    """log(1 + exp(x)), and x itself above 20, where float32 knows no difference."""
    e = tl.exp(tl.minimum(x, 20.0))
    # log1p (Kahan): the rounding of 1 + e is taken off again
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, log1p)


@triton.jit
def dot(a: Any, b: Any, accumulator: Any) -> Any:
    """accumulator + a @ b, in float32."""
    if INTERPRETED:
        # Its own product takes the bits of a bfloat16 for an integer, and the order of its sums depends on a row's place.
        return accumulator + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
    return tl.dot(a, b, accumulator, input_precision="ieee")
