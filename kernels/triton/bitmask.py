"""This kernel applies masks of allowed tokens: it sets the logits of all other tokens to minus infinity."""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.triton.launch import cdiv, follow, jit

BLOCK = 4096  # The number of logits that one program of the Triton grid handles.


def apply_bitmask(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """Implements the protocol `ApplyBitmask`, which is documented in the module `kernels.ops`."""
    size = logits.shape[1]
    require(logits.stride(1) == 1, "logits", logits, "have contiguous rows")
    require(masks.stride(1) == 1, "masks", masks, "have contiguous rows")
    mask_kernel[(len(rows), cdiv(size, BLOCK))](
        logits, masks, rows, size, logits.stride(0), masks.stride(0), BLOCK=BLOCK
    )


@jit
def mask_kernel(
    logits: tl.tensor,
    masks: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    row_stride: tl.tensor,
    mask_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Sets the logits of forbidden tokens to minus infinity in one block of one row. The grid is (number of masks,
    blocks of a row)."""
    follow()
    n, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + n)
    words = tl.load(masks + n * mask_stride + i // 32, mask=i < size, other=-1)
    forbidden = ((words >> (i % 32)) & 1) == 0
    tl.store(logits + row * row_stride + i, float("-inf"), mask=forbidden & (i < size))
