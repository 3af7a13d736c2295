"""What the kernel tests share: the implementations to run over, ragged batches, storage as the engine lays it out."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from jamba_server.kernels.cpu.library import EMULATED, NEON_EMULATED, compiled_levels
from jamba_server.kernels.ops import Segments, StateSaves
from jamba_server.kernels.table import Implementation, KernelUnavailable, implementations
from jamba_server.kernels.triton import interpreted
from tests.kernels.on_device import OnDevice
from tests.kernels.oracle import Array

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter is slow, so the tests of exactness run with one dtype there.
EXACT_DTYPES = (torch.bfloat16,) if interpreted() else (torch.float32, torch.bfloat16)

LEVELS = compiled_levels(platform.machine())  # the levels that the compiled library of this machine has
ALL_LEVELS = (*LEVELS, EMULATED, NEON_EMULATED)

# Half a unit in the last place of the result, for each rounding to dtype on its way; float32 sums add their own.
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def each_implementation(*ops: str, but: str = "") -> pytest.MarkDecorator:
    """Returns a mark that runs a test once with each implementation that has all of `ops`. The test gets the ops as
    arguments with the same names.

    These are the implementations for a CPU, and Triton's on a GPU if there is one. With TRITON_INTERPRET=1 these are
    Triton's only, in the interpreter. An implementation that cannot load on this machine is skipped, with the reason.
    The implementation named `but` is left out, because it does not promise what the test checks."""
    by_op = [{entry.name: entry for entry in _entries(op)} for op in ops]
    names = [name for name in by_op[0] if name != but and all(name in entries for entries in by_op)]
    return pytest.mark.parametrize(ops, [_param(name, [entries[name] for entries in by_op]) for name in names])


def _entries(op: str) -> list[Implementation]:
    on_gpu = [entry for entry in implementations(op, "cuda") if entry.name.startswith("triton")]
    if interpreted():
        return on_gpu
    if not torch.cuda.is_available():
        on_gpu.clear()
    gpu = torch.device("cuda")
    return [*implementations(op, "cpu"), *(replace(e, load=lambda e=e: OnDevice(e.load(), gpu)) for e in on_gpu)]


def _param(name: str, entries: list[Implementation]) -> object:
    try:
        return pytest.param(*(entry.load() for entry in entries), id=name)
    except (KernelUnavailable, ImportError, OSError) as error:
        reason = f"{name} cannot load: {error}"
        return pytest.param(*(None for _ in entries), id=name, marks=pytest.mark.skip(reason=reason))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def double(x: Tensor) -> Array:
    return x.double().numpy()


# How much larger the errors of float32 sums may be. A GPU's tensor cores multiply a float32 number as three TF32
# numbers, whose product lacks the lowest bits, and they cut off the lowest bits of sums.
FLOAT32_ERRORS = 4 if torch.cuda.is_available() else 1


def assert_close(actual: Tensor, expected: Array, *, roundings: int = 1, atol: float = 1e-5) -> None:
    """Checks that `actual` differs from `expected` by at most `roundings` roundings to its dtype and the error of its
    float32 sums."""
    rtol = 1e-5 + roundings * HALF_ULP[actual.dtype]
    if actual.dtype == torch.float32:
        rtol, atol = rtol * FLOAT32_ERRORS, atol * FLOAT32_ERRORS
    np.testing.assert_allclose(double(actual), expected, rtol=rtol, atol=atol)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Checks that two tensors have the same bits. NaN counts as equal to NaN."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def segments(
    lengths: Sequence[int],
    slots: Sequence[int],
    has_state: Sequence[bool],
    saves: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> Segments:
    """Returns the segments of a batch. `saves` has, for each sequence, pairs (number of tokens before the save, slot)
    in ascending order."""
    starts = [0, *accumulate(lengths)]
    saves = saves or [()] * len(lengths)
    rows = [start + done - 1 for start, pairs in zip(starts, saves, strict=False) for done, _ in pairs]
    return Segments(
        query_start=_int32(starts),
        max_query_len=max(lengths),
        state_ids=_int32(slots),
        has_state=torch.tensor(list(has_state), dtype=torch.bool),
        saves=StateSaves(
            start=_int32([0, *accumulate(len(pairs) for pairs in saves)]),
            rows=_int32(rows),
            slots=_int32([slot for pairs in saves for _, slot in pairs]),
        ),
    )


def layer_storage(slots: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Returns one layer's view [slots, *shape] of a storage of three layers. All its numbers are NaN, so that a result
    shows if an op reads what was never written."""
    return torch.full((slots, 3, *shape), torch.nan, dtype=dtype)[:, 1]


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)
