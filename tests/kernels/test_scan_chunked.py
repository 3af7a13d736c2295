"""The scan in two levels against float64, where sequences end before, at and behind a chunk; and its blocks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from jamba_server.kernels.ops import SelectiveScan
from jamba_server.kernels.triton import interpreted
from tests.kernels.cases import DTYPES, assert_close, assert_same, layer_storage, random, segments
from tests.kernels.on_device import OnDevice
from tests.kernels.test_scan import make_inputs, make_weights, run_oracle

CHUNK = 8
# the last sequence takes the last place that there is for a chunk
LENGTHS, SLOTS = (50, 1, 16, 8, 33), (4, 1, 16, 9, 13)
HAS_STATE = (True, True, False, True, False)
# (tokens done, slot): in the first chunk and at its end, twice in one chunk, at a sequence's end
SAVES = ([(3, 0), (8, 2), (19, 3), (22, 5), (50, 6)], [], [(16, 7)], [(1, 11)], [(32, 8), (33, 10)])


@pytest.fixture
def module() -> ModuleType:
    pytest.importorskip("triton", reason="the package triton is not installed")
    if not (interpreted() or torch.cuda.is_available()):
        pytest.skip("neither triton's interpreter nor a GPU")
    from jamba_server.kernels.triton import scan_chunked

    return scan_chunked


def on_device(scan: SelectiveScan) -> Any:
    return scan if interpreted() else OnDevice(scan, torch.device("cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [3, 16])
def test_triton_equals_the_formula(
    module: ModuleType, states: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", CHUNK)
    monkeypatch.setattr(module, "pays", lambda rows, longest, channels: True)
    channels = 19
    inputs, weights = make_inputs(sum(LENGTHS), channels, states, dtype), make_weights(channels, states)
    state = layer_storage(17, channels, states, dtype=torch.float32)
    for slot, known in zip(SLOTS, HAS_STATE, strict=True):
        if known:
            state[slot] = random(channels, states, seed=slot)
    before = state.clone()
    out = on_device(module.selective_scan)(inputs, weights, state, segments(LENGTHS, SLOTS, HAS_STATE, SAVES))
    assert out.dtype == dtype
    start = 0
    for length, slot, known, saves in zip(LENGTHS, SLOTS, HAS_STATE, SAVES, strict=True):
        initial = before[slot] if known else torch.zeros_like(before[slot])
        expected, final = run_oracle(inputs, weights, slice(start, start + length), initial)
        assert_close(out[start : start + length], expected)
        assert_close(state[slot], final)
        for done, target in saves:
            _, final = run_oracle(inputs, weights, slice(start, start + done), initial)
            assert_close(state[target], final)
        start += length
    untouched = [
        slot for slot in range(17) if slot not in (*SLOTS, *(target for saves in SAVES for _, target in saves))
    ]
    assert_same(state[untouched], before[untouched])


def test_triton_cuts_few_long_prompts_only(module: ModuleType) -> None:
    pays, d = module.pays, 5120
    assert pays(2048, 2048, d)
    assert pays(131072, 131072, d)
    assert pays(8192, 8000, d), "short ones beside a long one"
    assert not pays(1023, 1023, d), "too short to be worth it"
    assert not pays(4096, 2048, d), "two of them fill the GPU as they are"
    assert not pays(64, 1, d)
    assert not pays(8192, 8192, 16384), "so many channels that one prompt is enough work"


def test_triton_keeps_the_sequential_bits_where_nothing_is_cut(module: ModuleType) -> None:
    inputs, weights = make_inputs(20, 5, 4, torch.bfloat16), make_weights(5, 4)
    outputs: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    for scan in (module.selective_scan, module.scan.selective_scan):
        states.append(layer_storage(2, 5, 4, dtype=torch.float32))
        outputs.append(on_device(scan)(inputs, weights, states[-1], segments([20], [1], [False])))
    assert_same(outputs[0], outputs[1])
    assert_same(states[0], states[1])


def test_triton_gives_the_same_bits_in_wide_and_in_narrow_blocks(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, weights = make_inputs(23, 37, 16, torch.bfloat16), make_weights(37, 16)
    outputs: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    for schedulers in (528, 0):
        monkeypatch.setattr(module.scan, "SCHEDULERS", schedulers)
        states.append(layer_storage(3, 37, 16, dtype=torch.float32))
        known = segments([5, 18], [1, 2], [False, False])
        outputs.append(on_device(module.scan.selective_scan)(inputs, weights, states[-1], known))
    assert module.scan.block_channels(37, 16, sequences=2) == 16
    assert_same(outputs[0], outputs[1])
    assert_same(states[0], states[1])
