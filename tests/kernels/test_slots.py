from __future__ import annotations

import pytest
import torch

from kernels.ops import CopySlots, WriteKv
from tests.kernels.cases import DTYPES, assert_same, each_implementation, layer_storage, random


@each_implementation("write_kv")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [4, 16])
def test_write_kv_puts_every_row_in_its_place(write_kv: WriteKv, block_size: int, dtype: torch.dtype) -> None:
    k, v = random(3, 2, 5, dtype=dtype), random(3, 2, 5, dtype=dtype, seed=1)
    storage = torch.full((6, 3, 2, block_size, 2, 5), torch.nan, dtype=dtype)
    expected = storage.clone()
    places = [(5, 0), (2, block_size - 1), (2, 1)]
    for t, (page, offset) in enumerate(places):
        expected[page, 1, 0, offset], expected[page, 1, 1, offset] = k[t], v[t]
    kv_slots = torch.tensor([page * block_size + offset for page, offset in places])
    write_kv(k, v, storage[:, 1, 0], storage[:, 1, 1], kv_slots)
    assert_same(storage, expected)


@each_implementation("write_kv", but="cpu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_rounds_to_fp8(write_kv: WriteKv, dtype: torch.dtype) -> None:
    """To the nearest of all numbers that float8_e4m3fn has, ties to the even one; beyond 448 to that."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = codes[codes.isfinite()].unique()
    halves = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat([torch.tensor([449.0, 1e4, -470.0, -6e4]), numbers, halves, halves * 1.01, halves * 0.99])
    values = values[: len(values) // 8 * 8].to(dtype).view(-1, 2, 4)
    pages = torch.zeros(2, len(values), 2, 4, dtype=torch.float8_e4m3fn)
    write_kv(values, values, pages[:1], pages[1:], torch.arange(len(values)))
    distance = (values.flatten().double()[:, None] - numbers.double()).abs()
    even = torch.arange(len(numbers)) % 2 == len(numbers) // 2 % 2  # 0 is even
    nearest = numbers[(distance - 1e-9 * even).argmin(dim=1)]
    for stored in pages:
        assert torch.equal(stored.float().flatten(), nearest)


@each_implementation("copy_slots")
def test_copy_slots_copies_whole_units_of_every_tensor(copy_slots: CopySlots) -> None:
    tensors = (random(6, 2, 3), random(6, 5, dtype=torch.bfloat16), layer_storage(6, 4, dtype=torch.float32))
    tensors[2][:] = random(6, 4)
    expected = [tensor.clone() for tensor in tensors]
    pairs = [(1, 4), (1, 5), (3, 0)]  # one source may serve several
    for source, destination in pairs:
        for tensor in expected:
            tensor[destination] = tensor[source]
    sources, destinations = torch.tensor(pairs).unbind(1)
    copy_slots(tensors, sources, destinations)
    for tensor, wanted in zip(tensors, expected, strict=True):
        assert_same(tensor, wanted)
