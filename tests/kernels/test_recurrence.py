"""Convolution and scan side by side: the same bits however a sequence is cut and whoever shares its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from jamba_server.kernels.ops import (
    CausalConv1d,
    CausalConv1dUpdate,
    ScanInputs,
    ScanWeights,
    Segments,
    SelectiveScan,
    SelectiveStateUpdate,
)
from tests.kernels.cases import EXACT_DTYPES, assert_same, each_implementation, layer_storage, random, segments

TOKENS = 90  # of each sequence: more than an implementation is likely to take at a time
CHANNELS, STATES, WIDTH = 37, 16, 4
SLOTS = 12


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """An op and its variant for one token, over the tokens of two sequences with the numbers 0 to 2 * TOKENS."""

    prefill: Callable[[Tensor, Tensor, Segments], Tensor]  # (token numbers, state, segments)
    update: Callable[[Tensor, Tensor, Tensor], Tensor]  # (token numbers, state, state_ids)
    new_state: Callable[[], Tensor]

    def chunk(self, state: Tensor, slot: int, start: int, end: int, saves: Sequence[tuple[int, int]] = ()) -> Tensor:
        """Computes the tokens [start, end) of the first sequence alone."""
        return self.prefill(torch.arange(start, end), state, segments([end - start], [slot], [start > 0], [saves]))


def convolution(prefill: CausalConv1d, update: CausalConv1dUpdate, dtype: torch.dtype) -> Recurrence:
    x = random(2 * TOKENS, 2 * CHANNELS, dtype=dtype)[:, :CHANNELS]  # half of a wider row, as in the model
    weight, bias = random(WIDTH, CHANNELS, dtype=dtype, seed=1), random(CHANNELS, dtype=dtype, seed=2)
    return Recurrence(
        prefill=lambda tokens, state, segments: prefill(x[tokens], weight, bias, state, segments),
        update=lambda tokens, state, ids: update(x[tokens], weight, bias, state, ids),
        new_state=lambda: layer_storage(SLOTS, WIDTH - 1, CHANNELS, dtype=dtype),
    )


def scan(prefill: SelectiveScan, update: SelectiveStateUpdate, dtype: torch.dtype) -> Recurrence:
    sizes = (CHANNELS, CHANNELS, STATES, STATES, CHANNELS)
    inputs = [random(2 * TOKENS, size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)]
    weights = ScanWeights(
        a=-torch.exp(random(CHANNELS, STATES, seed=7)), d=random(CHANNELS, seed=8), dt_bias=random(CHANNELS, seed=9)
    )

    def rows(tokens: Tensor) -> ScanInputs:
        return ScanInputs(*(tensor[tokens] for tensor in inputs))

    return Recurrence(
        prefill=lambda tokens, state, segments: prefill(rows(tokens), weights, state, segments),
        update=lambda tokens, state, ids: update(rows(tokens), weights, state, ids),
        new_state=lambda: layer_storage(SLOTS, CHANNELS, STATES, dtype=torch.float32),
    )


def check_chunks(recurrence: Recurrence) -> None:
    whole_state, state = recurrence.new_state(), recurrence.new_state()
    whole = recurrence.chunk(whole_state, 3, 0, TOKENS)
    for cuts in ([0, 1, 2, 3, TOKENS], [0, 5, 6, 40, 72, TOKENS], [0, 31, 32, 64, 65, TOKENS - 1, TOKENS]):
        parts = [recurrence.chunk(state, 3, start, end) for start, end in pairwise(cuts)]
        assert_same(torch.cat(parts), whole)
        assert_same(state, whole_state)


def check_single_tokens(recurrence: Recurrence) -> None:
    whole_state, state = recurrence.new_state(), recurrence.new_state()
    whole = recurrence.chunk(whole_state, 3, 0, TOKENS)
    parts = [recurrence.chunk(state, 3, 0, 1)]
    ids = torch.tensor([3], dtype=torch.int32)
    parts += [recurrence.update(torch.tensor([t]), state, ids) for t in range(1, TOKENS)]
    assert_same(torch.cat(parts), whole)
    assert_same(state, whole_state)


def check_batch_mates(recurrence: Recurrence) -> None:
    """The first sequence is cut three times; the second runs beside it in other cuts, with or without a state."""
    alone_state, state = recurrence.new_state(), recurrence.new_state()
    alone = recurrence.chunk(alone_state, 3, 0, TOKENS)
    parts: list[Tensor] = []
    for (start, end), (mate_start, mate_end) in zip(
        [(0, 4), (4, 50), (50, TOKENS)], [(0, 66), (66, 67), (67, TOKENS)], strict=True
    ):
        mate, own = torch.arange(TOKENS + mate_start, TOKENS + mate_end), torch.arange(start, end)
        lengths = [len(mate), len(own), len(mate)]
        known = segments(lengths, [7, 3, 9], [mate_start > 0, start > 0, False])
        out = recurrence.prefill(torch.cat([mate, own, mate]), state, known)
        parts.append(out[len(mate) : len(mate) + len(own)])
    assert_same(torch.cat(parts), alone)
    assert_same(state[3], alone_state[3])
    # and one token for several sequences at once
    more = recurrence.new_state()
    more[:] = state
    ids = torch.tensor([9, 3, 7], dtype=torch.int32)
    together = recurrence.update(torch.tensor([5, TOKENS + 5, 6]), more, ids)
    single = recurrence.update(torch.tensor([TOKENS + 5]), state, ids[1:2])
    assert_same(together[1:2], single)
    assert_same(more[3], state[3])


def check_saves(recurrence: Recurrence) -> None:
    """States written at interior positions, the last row included, are those of runs that stop there."""
    state = recurrence.new_state()
    recurrence.chunk(state, 3, 0, 10)
    saves = [[(1, 4), (2, 8), (35, 2), (80, 11)], [(1, 5), (TOKENS, 6)]]
    tokens = torch.cat([torch.arange(10, TOKENS), torch.arange(TOKENS, 2 * TOKENS)])
    out = recurrence.prefill(tokens, state, segments([TOKENS - 10, TOKENS], [3, 7], [True, False], saves))
    stopped = recurrence.new_state()
    assert_same(out[: TOKENS - 10], recurrence.chunk(stopped, 1, 0, TOKENS)[10:])
    for done, slot in saves[0]:
        stopped = recurrence.new_state()
        recurrence.chunk(stopped, 1, 0, 10 + done)
        assert_same(state[slot], stopped[1])
    for done, slot in saves[1]:
        mate = recurrence.new_state()
        recurrence.prefill(torch.arange(TOKENS, TOKENS + done), mate, segments([done], [1], [False]))
        assert_same(state[slot], mate[1])
    assert_same(state[7], state[6])
    assert state[[0, 1, 9, 10]].isnan().all()


def check_dirty_slots(recurrence: Recurrence) -> None:
    dirty, clean = recurrence.new_state(), recurrence.new_state()
    clean[:] = 0
    assert_same(recurrence.chunk(dirty, 3, 0, 20), recurrence.chunk(clean, 3, 0, 20))
    assert_same(dirty[3], clean[3])


CHECKS = [check_chunks, check_single_tokens, check_batch_mates, check_saves, check_dirty_slots]


@each_implementation("causal_conv1d", "causal_conv1d_update")
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("check", CHECKS)
def test_convolution(
    causal_conv1d: CausalConv1d,
    causal_conv1d_update: CausalConv1dUpdate,
    dtype: torch.dtype,
    check: Callable[[Recurrence], None],
) -> None:
    check(convolution(causal_conv1d, causal_conv1d_update, dtype))


@each_implementation("selective_scan", "selective_state_update")
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("check", CHECKS)
def test_scan(
    selective_scan: SelectiveScan,
    selective_state_update: SelectiveStateUpdate,
    dtype: torch.dtype,
    check: Callable[[Recurrence], None],
) -> None:
    check(scan(selective_scan, selective_state_update, dtype))


@each_implementation("selective_scan", "selective_state_update")
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("spoilt", ["u", "b"])
def test_an_input_of_the_scan_that_is_not_finite(
    selective_scan: SelectiveScan, selective_state_update: SelectiveStateUpdate, spoilt: str, bad: float
) -> None:
    """It makes the same elements of the state infinite or NaN, whether the chunk ends with it or later."""
    u, dt, b, c, z = (random(8, size, seed=seed) for seed, size in enumerate((CHANNELS, CHANNELS, 16, 16, CHANNELS)))
    {"u": u, "b": b}[spoilt][4, 5] = bad
    weights = ScanWeights(-torch.exp(random(CHANNELS, 16, seed=7)), torch.ones(CHANNELS), torch.zeros(CHANNELS))
    inputs = ScanInputs(u, dt, b, c, z)
    with np.errstate(invalid="ignore"):
        for length in range(5, 9):
            state, single = (torch.zeros(2, CHANNELS, 16) for _ in range(2))
            rows = ScanInputs(*(tensor[:length] for tensor in inputs))
            out = selective_scan(rows, weights, state, segments([length], [1], [False]))
            ids = torch.tensor([1], dtype=torch.int32)
            one_by_one = [ScanInputs(*(tensor[t : t + 1] for tensor in inputs)) for t in range(length)]
            parts = [selective_state_update(row, weights, single, ids) for row in one_by_one]
            assert_same(torch.cat(parts), out)
            assert_same(state, single)
            assert not state.isfinite().all() and out[:4].isfinite().all()
