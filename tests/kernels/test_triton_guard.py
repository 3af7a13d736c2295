"""The guard of triton's interpreter finds what it is for, in kernels that do it; and the kernels of the table give the
same bits in whatever order their programs run."""

# The type checker cannot infer the types inside kernels. Compile-time constants have capital letters.
# ruff: noqa: N803
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jamba_server.kernels.triton import interpreted

if not interpreted():
    pytest.skip("it is for triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl

from jamba_server.kernels.triton.launch import jit
from tests.kernels.interpreter_guard import MemoryFault, Order, guard

ORDERS: tuple[Order, ...] = ("forward", "reverse", "random")


@jit
def copy(x: tl.tensor, out: tl.tensor, size: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr) -> None:
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(out + row * BLOCK + i, tl.load(x + row * stride + i, mask=i < size, other=0.0), mask=i < size)


@jit
def copy_all_lanes(x: tl.tensor, out: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < size))


@jit
def put(out: tl.tensor, at: tl.tensor, BLOCK: tl.constexpr) -> None:
    tl.store(out + at + tl.arange(0, BLOCK), 1.0)


@jit
def put_number(out: tl.tensor, DIVISOR: tl.constexpr) -> None:
    tl.store(out, (tl.program_id(0) // DIVISOR).to(tl.float32))


@jit
def shift(x: tl.tensor, PER_PROGRAM: tl.constexpr) -> None:
    """Copies each number to the place before it."""
    i = tl.program_id(0) * PER_PROGRAM + 1 + tl.arange(0, PER_PROGRAM)
    found = tl.load(x + i)
    tl.debug_barrier()
    tl.store(x + i - 1, found)


@jit
def turn(x: tl.tensor, scratch: tl.tensor, out: tl.tensor, BLOCK: tl.constexpr, BARRIER: tl.constexpr) -> None:
    i = tl.arange(0, BLOCK)
    tl.store(scratch + i, tl.load(x + i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + i, tl.load(scratch + (BLOCK - 1 - i)))


@jit
def shift_in_place(x: tl.tensor, BLOCK: tl.constexpr, BARRIER: tl.constexpr) -> None:
    i = tl.arange(0, BLOCK)
    found = tl.load(x + 1 + i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + i, found)


@jit
def collide(out: tl.tensor, BLOCK: tl.constexpr) -> None:
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, i.to(tl.float32))


@jit
def write_and_read(out: tl.tensor, BLOCK: tl.constexpr) -> None:
    i = tl.arange(0, BLOCK)
    tl.store(out + i, i.to(tl.float32))
    tl.store(out + BLOCK + i, tl.load(out + i))


@jit
def multiply(out: tl.tensor, row: tl.tensor, stride: tl.tensor) -> None:
    tl.store(out + row * stride * 0, 1.0)


def numbers(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32)


def test_what_is_allowed_passes() -> None:
    x, out = numbers(12).view(3, 4), torch.empty(3, 4)
    copy[(3,)](x[:, :3], out, 3, 4, BLOCK=4)
    assert out[:, :3].tolist() == x[:, :3].tolist()
    assert out[:, 3].isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: copy[(3,)](numbers(12).view(3, 4)[:, :3], torch.empty(12), 4, 4, BLOCK=4), "argument x, element .: 1"),
        (lambda: copy[(3,)](numbers(8).view(2, 4), torch.empty(12), 4, 4, BLOCK=4), "argument x, element 8: 4 lanes"),
        (lambda: copy[(1,)](numbers(8)[4:], torch.empty(4), 4, -4, BLOCK=4), None),
        (lambda: copy[(2,)](numbers(8)[4:], torch.empty(8), 4, -4, BLOCK=4), "argument x, element -4: 4 lanes"),
        (lambda: put[(1,)](torch.empty(8), 6, BLOCK=4), r"writes outside argument out, element 8: 2 lanes"),
        (lambda: put[(1,)](torch.empty(0), 0, BLOCK=1), "writes outside argument out"),
        (lambda: put[(1,)](torch.empty(8, 2)[:, 0], 0, BLOCK=2), "writes outside argument out, element 1: 1 lanes"),
    ],
)
def test_only_elements_of_an_argument_may_be_touched(call: Callable[[], object], message: str | None) -> None:
    if message is None:
        call()
        return
    with pytest.raises(MemoryFault, match=message):
        call()


@pytest.mark.parametrize("order", ORDERS)
def test_programs_may_write_equal_values_only(order: Order) -> None:
    with guard(order):
        put_number[(3,)](torch.empty(1), DIVISOR=4)
        with pytest.raises(MemoryFault, match=r"put_number, program .*writes another value than another program"):
            put_number[(3,)](torch.empty(1), DIVISOR=2)


@pytest.mark.parametrize("order", ORDERS)
def test_a_program_may_not_read_what_another_writes(order: Order) -> None:
    with guard(order):
        shift[(1,)](numbers(9), PER_PROGRAM=8)
        with pytest.raises(MemoryFault, match=r"(reads what another program writes|writes what another program reads)"):
            shift[(2,)](numbers(9), PER_PROGRAM=4)


def test_lanes_need_a_barrier_between_them() -> None:
    out = torch.empty(4)
    turn[(1,)](numbers(4), torch.empty(4), out, BLOCK=4, BARRIER=True)
    assert out.tolist() == [3, 2, 1, 0]
    with pytest.raises(MemoryFault, match=r"reads without a barrier what another lane wrote: argument scratch"):
        turn[(1,)](numbers(4), torch.empty(4), out, BLOCK=4, BARRIER=False)
    shift_in_place[(1,)](numbers(5), BLOCK=4, BARRIER=True)
    with pytest.raises(MemoryFault, match=r"writes without a barrier what another lane read: argument x"):
        shift_in_place[(1,)](numbers(5), BLOCK=4, BARRIER=False)


def test_a_small_tile_is_read_by_threads_that_did_not_write_it() -> None:
    write_and_read[(1,)](torch.empty(256), BLOCK=128)
    write_and_read[(1,)](torch.empty(64), BLOCK=32, num_warps=1)
    for block, warps in ((1, 1), (64, 4), (128, 8)):
        with pytest.raises(MemoryFault, match=r"reads without a barrier what another lane wrote: argument out"):
            write_and_read[(1,)](torch.empty(2 * block), BLOCK=block, num_warps=warps)


def test_lanes_may_not_write_two_values_to_one_address() -> None:
    with pytest.raises(MemoryFault, match=r"writes two values to one address: argument out, element 0"):
        collide[(1,)](torch.empty(2), BLOCK=4)


def test_what_nobody_wrote_and_what_a_mask_leaves_open_shows() -> None:
    out = torch.empty(4)
    assert out.isnan().all()
    copy_all_lanes[(1,)](numbers(4), out, 3, BLOCK=4)
    assert out[:3].tolist() == [0, 1, 2]
    assert out[3].isnan()


def test_integers_of_32_bits_may_not_overflow() -> None:
    multiply[(1,)](torch.empty(1), 2**15, 2**15)
    with pytest.raises(AssertionError, match="int32 overflow detected for operation mul"):
        multiply[(1,)](torch.empty(1), 2**16, 2**15)
