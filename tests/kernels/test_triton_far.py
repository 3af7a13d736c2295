"""Elements beyond number 2^31 of their tensor, which an index of 32 bits does not reach, in triton's interpreter.

The tensors are virtual: tens of gigabytes that take memory only where they are touched. Of grids as large only the
last programs run, and `tests/kernels/interpreter_guard.py` sees that they touch what is there.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from jamba_server.kernels.ops import Kernels, Pages, SampleInputs, ScanInputs, ScanWeights
from jamba_server.kernels.table import select
from jamba_server.kernels.triton import interpreted
from tests.kernels.cases import assert_same, random, segments
from tests.kernels.interpreter_guard import guard
from tests.kernels.test_mamba import make_weights as make_mamba_weights
from tests.kernels.test_mamba import pack as pack_mamba_weights

if not interpreted():
    pytest.skip("it is for triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which allows mappings that are larger than the memory
BEYOND = 2**31
DTYPE = torch.bfloat16
STATES, SLOT_STRIDE = 16, 26 * 5120 * 16  # SSM state entries per channel, and numbers of a 3B model's state
SLOTS = BEYOND // SLOT_STRIDE + 8
ROW_STRIDE = 32768  # the width of in_proj's output in models larger than Mini


@pytest.fixture(scope="module")
def ops() -> Kernels:
    return select("cuda", {"all": "triton"})


@pytest.fixture(autouse=True)
def corner(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs only the last 16 programs of each axis of a grid. Memory that ops allocate is virtual, too."""
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *shape, dtype=None: virtual(*shape, dtype=dtype or x.dtype))
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: virtual(*x.shape, dtype=x.dtype))
    with guard(corner=16):
        yield


def virtual(*shape: Any, dtype: torch.dtype = DTYPE) -> Tensor:
    """Returns a tensor of zeros, which takes memory only where it is written."""
    shape = tuple(shape[0]) if isinstance(shape[0], tuple) else shape
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def far_rows(rows: int, columns: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns a tensor [rows, columns] with a wide stride, whose last `count` rows have random numbers, and a copy of
    these rows."""
    x = virtual(rows, max(columns, ROW_STRIDE))[:, :columns]
    assert (rows - count) * x.stride(0) > BEYOND
    x[-count:] = random(count, columns, dtype=DTYPE, seed=seed)
    return x, x[-count:].clone()


def far_slots(*shape: int, dtype: torch.dtype, slots: list[int]) -> tuple[Tensor, Tensor]:
    """One layer of a storage of so many layers that the last slots are beyond; and a small one. Both have the same in
    `slots`, numbers from 0 that count from the end of the large one."""
    layers = SLOT_STRIDE // math.prod(shape)
    large, small = virtual(SLOTS, layers, *shape, dtype=dtype)[:, -1], torch.zeros(8, *shape, dtype=dtype)
    for slot in slots:
        small[slot] = random(*shape, dtype=dtype, seed=slot)
        large[SLOTS - 8 + slot] = small[slot]
    return large, small


def assert_same_slots(large: Tensor, small: Tensor) -> None:
    assert_same(large[-8:].clone(), small)
    assert large.data_ptr() + (SLOTS - 8) * large.stride(0) * large.element_size() == large[-8].data_ptr()
    assert (SLOTS - 8) * large.stride(0) > 0.99 * BEYOND


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


FAR = SLOTS - 8
assert FAR * SLOT_STRIDE < BEYOND < (FAR + 1) * SLOT_STRIDE
LENGTHS, STARTS, HAS_STATE, SAVES = (5, 1), (6, 7), (True, True), ([(2, 4)], [])


def test_states_of_the_convolution(ops: Kernels) -> None:
    channels = 16
    x, weight, bias = (
        random(*shape, dtype=DTYPE, seed=i) for i, shape in enumerate(((6, channels), (4, channels), (channels,)))
    )
    large, small = far_slots(3, channels, dtype=DTYPE, slots=[6, 7])
    outs: list[Tensor] = []
    for state, first in ((large, FAR), (small, 0)):
        saves = [[(done, first + slot) for done, slot in pairs] for pairs in SAVES]
        known = segments(LENGTHS, [first + slot for slot in STARTS], HAS_STATE, saves)
        outs.append(ops.causal_conv1d(x, weight, bias, state, known))
        outs.append(ops.causal_conv1d_update(x[:2], weight, bias, state, ids(first + 7, first + 6)))
    assert_same_slots(large, small)
    assert_same(torch.cat(outs[:2]), torch.cat(outs[2:]))


def scan_inputs(rows: int, channels: int) -> tuple[ScanInputs, ScanWeights]:
    u, dt, z = (random(rows, channels, dtype=DTYPE, seed=seed) for seed in range(3))
    b, c = (random(rows, STATES, dtype=DTYPE, seed=seed) for seed in (3, 4))
    a, d, bias = -random(channels, STATES, seed=5).exp(), random(channels, seed=6), random(channels, seed=7)
    return ScanInputs(u, dt, b, c, z), ScanWeights(a, d, bias)


@pytest.mark.parametrize("chunked", [False, True])
def test_states_of_the_scan(ops: Kernels, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from jamba_server.kernels.triton import scan_chunked

    monkeypatch.setattr(scan_chunked, "CHUNK", 4)
    monkeypatch.setattr(scan_chunked, "pays", lambda rows, longest, channels: True)
    inputs, weights = scan_inputs(6, 8)
    large, small = far_slots(8, STATES, dtype=torch.float32, slots=[6, 7])
    outs: list[Tensor] = []
    for state, first in ((large, FAR), (small, 0)):
        saves = [[(done, first + slot) for done, slot in pairs] for pairs in SAVES]
        known = segments(LENGTHS, [first + slot for slot in STARTS], HAS_STATE, saves)
        scan: Any = scan_chunked.selective_scan if chunked else ops.selective_scan
        outs.append(scan(inputs, weights, state, known))
        two = ScanInputs(*(rows[:2] for rows in inputs))
        outs.append(ops.selective_state_update(two, weights, state, ids(first + 7, first + 6)))
    assert_same_slots(large, small)
    assert_same(torch.cat(outs[:2]), torch.cat(outs[2:]))


def test_states_of_a_layers_decode(ops: Kernels) -> None:
    channels = 16
    weights = ops.mamba_decode.pack(pack_mamba_weights(ops, make_mamba_weights(channels, STATES, 4, DTYPE)))
    xz = random(2, 2 * channels, dtype=DTYPE)
    conv, small_conv = far_slots(3, channels, dtype=DTYPE, slots=[6, 7])
    ssm, small_ssm = far_slots(channels, STATES, dtype=torch.float32, slots=[6, 7])
    out = ops.mamba_decode(xz, weights, conv, ssm, ids(FAR + 6, FAR + 7))
    assert_same(out, ops.mamba_decode(xz, weights, small_conv, small_ssm, ids(6, 7)))
    assert_same_slots(conv, small_conv)
    assert_same_slots(ssm, small_ssm)


def test_slots_are_copied(ops: Kernels) -> None:
    large, small = far_slots(8, STATES, dtype=torch.float32, slots=[6, 7])
    near = random(8, STATES, seed=1)
    large[0] = near
    ops.copy_slots((large,), torch.tensor([0, SLOTS - 1]), torch.tensor([SLOTS - 2, 1]))
    assert_same(large[-2].clone(), near)
    assert_same(large[1].clone(), small[7])


PAGE_SHAPE = (4, 2, 16, 1, 128)  # the 3B model with twice its attention layers
PAGES = BEYOND // math.prod(PAGE_SHAPE) + 8


@pytest.mark.parametrize("dtype", [DTYPE, torch.float8_e4m3fn])
def test_pages(ops: Kernels, dtype: torch.dtype) -> None:
    storage = virtual(PAGES, *PAGE_SHAPE, dtype=dtype)
    small = torch.zeros(8, *PAGE_SHAPE, dtype=dtype)
    k, v = (random(20, 1, 128, dtype=DTYPE, seed=seed) for seed in (1, 2))
    q = random(20, 16, 128, dtype=DTYPE)
    outs: list[Tensor] = []
    for pages, first in ((storage, PAGES - 8), (small, 0)):
        k_pages, v_pages = pages[:, 3, 0], pages[:, 3, 1]
        places = [*range(16 * (first + 7), 16 * (first + 8)), *range(16 * (first + 3), 16 * (first + 3) + 4)]
        ops.write_kv(k, v, k_pages, v_pages, torch.tensor(places))
        tables = torch.tensor([[first + 7, first + 3]], dtype=torch.int32)
        known = Pages(k_pages, v_pages, tables, ids(20), 20)
        outs.append(ops.attention_prefill(q, known, ids(0, 20), 20, 0.1))
        outs.append(ops.attention_decode(q[19:], known, 0.1))
    assert_same(storage[-8:].float(), small.float())
    assert (PAGES - 1) * storage.stride(0) > BEYOND
    assert_same(torch.cat(outs[:2]), torch.cat(outs[2:]))


def test_rows_of_the_norm(ops: Kernels) -> None:
    rows, size = BEYOND // ROW_STRIDE + 9, ROW_STRIDE
    x, some = far_rows(rows, size, 2)
    residual, added = far_rows(rows, size, 2, seed=1)
    weight = random(size, dtype=DTYPE, seed=2)
    for far, near in zip(ops.rms_norm(x, weight, 1e-5, residual), ops.rms_norm(some, weight, 1e-5, added), strict=True):
        assert_same(far[-2:], near)


def test_rows_of_the_activation(ops: Kernels) -> None:
    x, some = far_rows(2 * BEYOND // ROW_STRIDE + 9, ROW_STRIDE, 2)  # twice: the output is half as wide
    assert_same(ops.silu_and_mul(x)[-2:], ops.silu_and_mul(some))


@pytest.mark.parametrize(("inputs", "outputs"), [(64, ROW_STRIDE), (520, 65)])
def test_rows_of_products(ops: Kernels, inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second weight is narrow. With one tile of rows in a group, the last programs have the last rows."""
    sections = pytest.importorskip("jamba_server.kernels.triton.sections", reason="the package triton is missing")
    monkeypatch.setattr(sections, "GROUP", 1)
    rows = BEYOND // ROW_STRIDE + 200
    x, some = far_rows(rows, inputs, 3)
    weight = ops.linear.pack(random(outputs, inputs, dtype=DTYPE, seed=1))
    with guard(corner=2):
        far = ops.linear(x, weight)
    assert_same(far[-3:, -32:], ops.linear(some, weight)[:, -32:])


def test_rows_of_a_weight(ops: Kernels) -> None:
    weight, some = far_rows(BEYOND // ROW_STRIDE + 200, ROW_STRIDE, 32)
    x = torch.zeros(1, ROW_STRIDE, dtype=DTYPE)
    x[:, -128:] = random(1, 128, dtype=DTYPE)
    with guard(corner=2):
        far = ops.linear(x, weight)
    assert_same(far[:, -32:], ops.linear(x[:, -128:], some[:, -128:].contiguous()))


def test_rows_of_one_long_prompt(ops: Kernels) -> None:
    rows, channels = 2 * BEYOND // ROW_STRIDE + 7, ROW_STRIDE // 2
    x, some = (part[:, :channels] for part in far_rows(rows, ROW_STRIDE, 40))
    weight, state = random(4, channels, dtype=DTYPE), torch.zeros(2, 3, channels, dtype=DTYPE)
    with guard(corner=2):
        outs = [ops.causal_conv1d(part, weight, None, state, segments([len(part)], [1], [False])) for part in (x, some)]
    assert_same(outs[0][-8:, -8:], outs[1][-8:, -8:])


@pytest.mark.parametrize("conv", [True, False])
def test_rows_of_a_mamba_layer(ops: Kernels, conv: bool) -> None:
    rows, channels = 2 * BEYOND // ROW_STRIDE + 9, ROW_STRIDE // 2
    wide, some = far_rows(rows, ROW_STRIDE, 3)
    far, near = segments([3], [1], [False]), segments([3], [1], [False])
    far = far._replace(query_start=far.query_start + rows - 3)
    x, z = wide.chunk(2, dim=1)
    with guard(corner=2):
        if conv:
            weight, state = random(4, channels, dtype=DTYPE), torch.zeros(2, 3, channels, dtype=DTYPE)
            outs = [
                ops.causal_conv1d(part, weight, None, state, at) for part, at in ((x, far), (some[:, :channels], near))
            ]
        else:
            b, state = random(3, STATES, dtype=DTYPE, seed=3), torch.zeros(2, channels, STATES)
            weights = ScanWeights(-torch.ones(channels, STATES), torch.ones(channels), torch.zeros(channels))
            far_b = virtual(rows, ROW_STRIDE)[:, :STATES]
            far_b[-3:] = b
            near_inputs = ScanInputs(some[:, :channels], some[:, channels:], b, b, some[:, channels:])
            outs = [ops.selective_scan(ScanInputs(x, z, far_b, far_b, z), weights, state, far)]
            outs.append(ops.selective_scan(near_inputs, weights, state, near))
    assert_same(outs[0][-3:, -8:], outs[1][:, -8:])


def test_rows_of_queries(ops: Kernels) -> None:
    heads, size, stride = 32, 128, 6144
    rows = BEYOND // (heads * size) + 9
    wide = virtual(rows, stride)
    wide[-3:] = random(3, stride, dtype=DTYPE)
    q, k = wide[:, : heads * size].unflatten(1, (heads, size)), random(4, 16, 8, size, dtype=DTYPE, seed=1)
    pages = Pages(k, k, torch.tensor([[2]], dtype=torch.int32), ids(11), 11)
    far = ops.attention_prefill(q, pages, ids(rows - 3, rows), 3, 0.1)
    assert_same(far[-3:], ops.attention_prefill(q[-3:], pages, ids(0, 3), 3, 0.1))


def test_partial_results_of_long_contexts(ops: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """In groups of as many sequences as 256 MiB have room for, here 31. Only the last split is computed, for its
    addresses' sake."""
    attention = pytest.importorskip("jamba_server.kernels.triton.attention", reason="the package triton is missing")
    monkeypatch.setattr(attention, "DECODE_PROGRAMS", 1 << 30)
    sequences, context, heads, size = 33, 262144, 32, 128
    k = random(1, 16, 8, size, dtype=DTYPE)
    tables = torch.zeros(sequences, context // 16, dtype=torch.int32)
    pages = Pages(k, k, tables, torch.full((sequences,), context, dtype=torch.int32), context)
    with guard(corner=1) as guarded:
        ops.attention_decode(random(sequences, heads, size, dtype=DTYPE), pages, 0.1)
    assert guarded.launches == ["decode_kernel", "merge_kernel"] * 2


def test_rows_of_logits(ops: Kernels) -> None:
    vocabulary = 65536
    rows = BEYOND // vocabulary + 17
    logits, some = virtual(rows, vocabulary, dtype=torch.float32), random(16, vocabulary, scale=2)
    logits[-16:] = some
    number = torch.arange(rows) % 16
    inputs = SampleInputs(
        temperature=torch.where(number == 3, 0.0, 0.9),
        top_p=torch.where(number % 8 == 0, 0.8, 1.0),
        min_p=torch.zeros(rows),
        top_k=torch.where(number % 8 == 4, 50, 0).int(),
        keys=number * 0x2545F4914F6CDD1D,
    )
    far = ops.sample(logits, inputs)
    assert_same(far[-16:], ops.sample(some, SampleInputs(*(field[-16:] for field in inputs))))


def test_experts_of_the_largest_models(ops: Kernels) -> None:
    """Only that the last expert's addresses are right: they are checked, its output is not whole."""
    hidden, intermediate, experts = 8192, 24576, 16
    packed = ops.run_experts.pack(virtual(experts, 2 * intermediate, hidden), virtual(experts, hidden, intermediate))
    x, weights = random(1, hidden, dtype=DTYPE), torch.ones(1, 1)
    with guard(corner=1, whole=("group_kernel",)) as guarded:
        ops.run_experts(x, packed, weights, ids(15)[None])
    assert guarded.launches == ["group_kernel", "gate_up_kernel", "down_kernel", "sum_kernel"]


@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 14336), (16384, 64)])
def test_rows_of_experts(ops: Kernels, hidden: int, intermediate: int) -> None:
    tokens = BEYOND // ROW_STRIDE + 9
    x, _ = far_rows(tokens, hidden, 3)
    packed = ops.run_experts.pack(
        *(random(1, *shape, dtype=DTYPE, scale=0.01) for shape in ((2 * intermediate, hidden), (hidden, intermediate)))
    )
    choices = torch.zeros(tokens, 3, dtype=torch.int32)
    with guard(corner=1, whole=("group_kernel",)):
        ops.run_experts(x, packed, torch.ones(tokens, 3), choices)
    assert tokens * 3 * max(hidden, intermediate) > BEYOND
