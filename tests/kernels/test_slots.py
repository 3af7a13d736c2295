from __future__ import annotations

import numpy as np
import pytest
import torch

from jamba_server.kernels.ops import CompressedStates, CompressStates, CopySlots, RestoreStates, WriteKv
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


PAIRS = [(1, 4), (2, 0), (1, 3)]  # one source may serve several


def some_states(size: int) -> torch.Tensor:
    """Six slots of two layers of 150 channels: of all magnitudes, zeros, next to nothing, and ties between values."""
    states = random(6, 2, 150, size) * 10.0 ** (torch.arange(150) % 9 - 4)[:, None]
    states[:, :, 1] = 0.0
    states[:, 1, 2] = 1e-38
    states[:, :, 3, 1:] = torch.arange(size - 1) - size // 2 + 0.5
    states[:, :, 3, 0] = 127.0
    return states


def no_states(size: int) -> CompressedStates:
    return CompressedStates(torch.full((6, 2, 150, size), 99, dtype=torch.int8), torch.full((6, 2, 150), torch.nan))


@each_implementation("compress_states")
@pytest.mark.parametrize("size", [5, 16])
def test_compressed_states_are_the_nearest_of_255(compress_states: CompressStates, size: int) -> None:
    states, compressed = some_states(size), no_states(size)
    compress_states(states, compressed, *torch.tensor(PAIRS).unbind(1))
    for source, destination in PAIRS:
        x = states[source].numpy()
        largest = np.abs(x).max(-1, keepdims=True)
        largest[largest < 2.0**-100] = 0
        with np.errstate(divide="ignore"):
            steps = np.where(largest == 0, np.float32(0), np.float32(127) / largest)
        np.testing.assert_array_equal(compressed.values[destination].numpy(), np.rint(x * steps))
        np.testing.assert_array_equal(compressed.scales[destination].numpy(), (largest * np.float32(1 / 127))[..., 0])
    untouched, expected = [1, 2, 5], no_states(size)
    assert_same(compressed.values[untouched], expected.values[untouched])
    assert_same(compressed.scales[untouched], expected.scales[untouched])


@each_implementation("compress_states", "restore_states")
@pytest.mark.parametrize("size", [5, 16])
def test_a_restored_state_is_half_a_step_away_at_most(
    compress_states: CompressStates, restore_states: RestoreStates, size: int
) -> None:
    states, compressed = some_states(size), no_states(size)
    compress_states(states, compressed, *torch.tensor(PAIRS).unbind(1))
    back, expected = states.clone(), states.clone()
    places = torch.tensor([(4, 5), (0, 2), (4, 1)])
    for source, destination in places.tolist():
        expected[destination] = compressed.values[source] * compressed.scales[source][..., None]
    restore_states(compressed, back, *places.unbind(1))
    assert_same(back, expected)
    error = (back[5] - states[1]).abs()
    assert bool((error <= states[1].abs().amax(-1, keepdim=True) / 254 * (1 + 1e-5) + 1e-30).all())
    again = no_states(size)  # which loses no more
    compress_states(back, again, torch.tensor([5]), torch.tensor([0]))
    assert_same(again.values[0], compressed.values[4])
