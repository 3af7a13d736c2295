"""The compiled kernels but the products with weights, at every level that this machine has and with several threads.

The other tests of this folder run them at the machine's own level; sizes here are those that only they know: splits of
long contexts, pieces of channels, vectors of more than one width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jamba_server.kernels.cpu.attention import AttentionDecode, AttentionPrefill
from jamba_server.kernels.cpu.conv import CausalConv1d, CausalConv1dUpdate
from jamba_server.kernels.cpu.library import EMULATED, Library
from jamba_server.kernels.cpu.norm import RmsNorm
from jamba_server.kernels.cpu.route import RouteExperts
from jamba_server.kernels.cpu.sample import Sample
from jamba_server.kernels.cpu.scan import SelectiveScan, SelectiveStateUpdate
from jamba_server.kernels.ops import Pages, ScanInputs, ScanWeights
from tests.kernels import test_attention, test_conv, test_moe, test_norm, test_recurrence, test_sample, test_scan
from tests.kernels.cases import (
    DTYPES,
    EXACT_DTYPES,
    LEVELS,
    assert_close,
    assert_same,
    double,
    layer_storage,
    random,
    segments,
)
from tests.kernels.oracle import Array
from tests.nightly import each_pair

TESTED = (*LEVELS, EMULATED)
every_level = pytest.mark.parametrize("native", TESTED, indirect=True)
THREADS = (1, 2, 3)
SCALE = 0.3


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_equals_the_formulas(native: Library, dtype: torch.dtype) -> None:
    assert native.level()
    test_norm.test_equals_the_formula(RmsNorm(), 161, dtype)
    test_norm.test_residual_is_added_and_rounded_first(RmsNorm(), dtype)
    test_conv.test_prefill_equals_the_formula(CausalConv1d(), 35, 4, True, dtype)
    test_conv.test_update_equals_the_formula(CausalConv1dUpdate(), 3, dtype)
    for states in (1, 16, 40):
        test_scan.test_prefill_equals_the_formula(SelectiveScan(), (1, 9, 2, 3, 1), 19, states, dtype)
        test_scan.test_update_equals_the_formula(SelectiveStateUpdate(), states, dtype)
    for heads, kv_heads in test_attention.HEADS:
        test_attention.test_prefill_equals_the_formula(AttentionPrefill(), 21, heads, kv_heads, 4, dtype)
        test_attention.test_decode_equals_the_formula(AttentionDecode(), heads, kv_heads, 16, dtype)
    test_moe.test_route_equals_the_formula(RouteExperts(), 16, 2, dtype)


@each_pair({"native": TESTED, "check": test_recurrence.CHECKS, "dtype": DTYPES}, indirect=["native"])
def test_every_level_is_exact(
    native: Library, check: Callable[[test_recurrence.Recurrence], None], dtype: torch.dtype
) -> None:
    assert native.level()
    check(test_recurrence.convolution(CausalConv1d(), CausalConv1dUpdate(), dtype))
    check(test_recurrence.scan(SelectiveScan(), SelectiveStateUpdate(), dtype))


def attention_formula(q: Array, k: Array, v: Array) -> Array:
    """`oracle.attention` of the last rows of a sequence, without its loops."""
    length, heads, _ = q.shape
    group = heads // k.shape[1]
    scores = np.einsum("thz,jhz->htj", q, k.repeat(group, axis=1)) * SCALE
    visible = len(k) - length + np.arange(length)[:, None] + 1
    scores = np.where(np.arange(len(k)) < visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("htj,jhz->thz", weights / weights.sum(axis=-1, keepdims=True), v.repeat(group, axis=1))


def long_pages(sequences: Sequence[tuple[Tensor, Tensor]], seed: int) -> Pages:
    """`test_attention.paged`, a page at a time."""
    blocks = [-(-len(k) // 16) for k, _ in sequences]
    kv_heads, size = sequences[0][0].shape[1:]
    storage = torch.full((sum(blocks) + 1, 2, 16, kv_heads, size), torch.nan, dtype=sequences[0][0].dtype)
    free = 1 + torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(seed))
    tables = torch.zeros(len(sequences), max(blocks), dtype=torch.int32)
    for i, (own, rows) in enumerate(zip(free.split(blocks), sequences, strict=True)):
        tables[i, : len(own)] = own
        for part, tensor in enumerate(rows):
            padded = torch.cat([tensor, tensor.new_full((len(own) * 16 - len(tensor), kv_heads, size), torch.nan)])
            storage[own, part] = padded.view(len(own), 16, kv_heads, size)
    lens = [len(k) for k, _ in sequences]
    return Pages(storage[:, 0], storage[:, 1], tables, torch.tensor(lens, dtype=torch.int32), max(lens))


@each_pair(
    {"native": TESTED, "heads, kv_heads": [(4, 1), (12, 1), (3, 3), (8, 4)], "dtype": EXACT_DTYPES}, indirect=["native"]
)
def test_long_contexts_have_the_same_bits_however_they_come(
    native: Library, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    """1300 keys are three splits, which threads share in decode and which a tile walks in prefill."""
    context, size = 1300, 24
    k, v = test_attention.keys_and_values(context, kv_heads, size, dtype)
    q = random(context, heads, size, dtype=dtype, seed=9)
    prefill, decode = AttentionPrefill(), AttentionDecode()

    def chunk(start: int, end: int) -> Tensor:
        pages = long_pages([(k[:end], v[:end])], end)
        return prefill(q[start:end], pages, test_attention.query_start([end - start]), end - start, SCALE)

    whole = chunk(0, context)
    slack = test_attention.slack(prefill, dtype) + (0.0 if dtype == torch.float32 else 1e-3)
    assert_close(whole[-40:], attention_formula(double(q[-40:]), double(k), double(v)), atol=slack)
    for cuts in ([0, 500, 513, 1024, context], [0, 7, 1025, 1026, context]):
        assert_same(torch.cat([chunk(start, end) for start, end in pairwise(cuts)]), whole)
    ends = [1, 64, 65, 512, 513, 1024, 1025, context]
    alone = {end: long_pages([(k[:end], v[:end])], end) for end in ends}
    together = long_pages([(k[:end], v[:end]) for end in ends], 3)
    for threads in THREADS:
        native.set_threads(threads)
        for end, pages in alone.items():
            assert_same(decode(q[end - 1 : end], pages, SCALE), whole[end - 1 : end])
        assert_same(decode(q[[end - 1 for end in ends]], together, SCALE), whole[[end - 1 for end in ends]])


@every_level
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_reaches_no_earlier_token(native: Library, bad: float, dtype: torch.dtype) -> None:
    assert native.level()
    k, v = test_attention.keys_and_values(200, 2, 40, dtype)
    q = random(200, 6, 40, dtype=dtype, seed=9)

    def attend(v: Tensor) -> Tensor:
        return AttentionPrefill()(q, long_pages([(k, v)], 0), test_attention.query_start([200]), 200, SCALE)

    spoilt = v.clone()
    spoilt[150, 1, 7] = bad
    assert_same(attend(spoilt)[:150], attend(v)[:150])
    assert not attend(spoilt)[150:].isfinite().all()


def same_with_any_threads(native: Library, run: Callable[[], Sequence[Tensor]]) -> None:
    native.set_threads(THREADS[0])
    alone = run()
    for threads in THREADS[1:]:
        native.set_threads(threads)
        for actual, expected in zip(run(), alone, strict=True):
            assert_same(actual, expected)


@each_pair({"native": TESTED, "channels": (100, 613), "dtype": EXACT_DTYPES}, indirect=["native"])
def test_the_number_of_threads_changes_no_recurrence(native: Library, channels: int, dtype: torch.dtype) -> None:
    lengths, states = (40, 1, 90), 16
    rows = sum(lengths)
    known = segments(lengths, (3, 1, 5), (True, False, True), [[(7, 0)], [], [(1, 2), (64, 6)]])
    sizes = (channels, channels, states, states, channels)
    inputs = ScanInputs(*(random(rows, size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)))
    weights = ScanWeights(
        -torch.exp(random(channels, states, seed=7)), random(channels, seed=8), random(channels, seed=9)
    )
    conv_weight, conv_bias = random(4, channels, dtype=dtype, seed=10), random(channels, dtype=dtype, seed=11)

    def run() -> Sequence[Tensor]:
        ssm = layer_storage(8, channels, states, dtype=torch.float32)
        conv = layer_storage(8, 3, channels, dtype=dtype)
        for slot in (3, 5):
            ssm[slot], conv[slot] = random(channels, states, seed=slot), random(3, channels, dtype=dtype, seed=slot)
        scanned = SelectiveScan()(inputs, weights, ssm, known)
        return scanned, ssm, CausalConv1d()(inputs.u, conv_weight, conv_bias, conv, known), conv

    same_with_any_threads(native, run)


@every_level
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_the_number_of_threads_changes_no_row(native: Library, dtype: torch.dtype) -> None:
    x, residual = (random(90, 400, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = random(400, dtype=dtype, seed=2)
    known = [test_attention.keys_and_values(length, 2, 16, dtype, length) for length in (700, 30, 90)]
    q, starts = random(150, 6, 16, dtype=dtype, seed=3), test_attention.query_start([110, 30, 10])
    pages = long_pages(known, 0)
    calls: list[Callable[[], Any]] = [
        lambda: RmsNorm()(x, weight, 1e-6, residual),
        lambda: RouteExperts()(x[:, :40], 3),
        lambda: (AttentionPrefill()(q, pages, starts, 110, SCALE),),
    ]
    for call in calls:
        same_with_any_threads(native, call)


@every_level
def test_sampling(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.level()
    monkeypatch.setattr(test_sample, "sample", Sample())
    for size in (1, 2, 37, 1500, 5000):
        test_sample.test_equals_the_oracle(size)
    test_sample.test_equals_the_oracle_with_ties()
    for size, scale in ((300, 4.0), (3000, 1.0), (9001, 8.0)):
        test_sample.test_equals_the_oracle_with_ties_and_masks(size, scale)
    for filters in ((0, 1.0, 0.0), (0, 1.0, 0.35), (6, 0.7, 0.2)):
        test_sample.test_draws_exactly_what_the_filters_leave(*filters)
    test_sample.test_a_row_does_not_depend_on_its_batch(4001)
    test_sample.test_greedy_takes_the_first_of_the_best_whatever_the_filters()
    test_sample.test_top_k_1_and_tiny_top_p_are_greedy()
    test_sample.test_min_p_1_leaves_all_that_tie_for_the_best()
    test_sample.test_top_p_stops_where_the_mass_is_reached()
    test_sample.test_top_p_is_a_share_of_what_top_k_leaves_also_beyond_the_candidates()
    test_sample.test_filters_see_the_tempered_distribution()
    for temperature in (1e-30, 1e-38, 2.0):
        test_sample.test_extreme_logits_overflow_nothing(temperature)
    test_sample.test_banned_tokens_are_never_drawn()
    test_sample.test_a_row_without_any_token_left_gives_a_valid_id()
