from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from jamba_server.kernels.cpu.library import EMULATED, library
from jamba_server.kernels.ops import AttentionDecode, AttentionPrefill, Pages
from jamba_server.kernels.triton import interpreted
from tests.kernels import oracle
from tests.kernels.cases import (
    DTYPES,
    EXACT_DTYPES,
    HALF_ULP,
    assert_close,
    assert_same,
    double,
    each_implementation,
    random,
)
from tests.nightly import each_pair

SCALE = 0.3
HEADS = [(4, 1), (6, 2), (3, 3)]  # query heads, KV heads: one, some and all have their own keys
NOT_FINITE = [float("inf"), float("-inf"), float("nan")]


def paged(sequences: Sequence[tuple[Tensor, Tensor]], block_size: int, *, seed: int = 0) -> Pages:
    """Pages that hold the k, v [context, G, Z] of each sequence, scattered over one layer of a storage of two; all
    that is not theirs, the rest of their last page included, is NaN."""
    kv_heads, size = sequences[0][0].shape[1:]
    num_pages = 3 + sum(-(-len(k) // block_size) for k, _ in sequences)
    storage = torch.full((num_pages, 2, 2, block_size, kv_heads, size), torch.nan, dtype=sequences[0][0].dtype)
    k_pages, v_pages = storage[:, 1, 0], storage[:, 1, 1]
    free = (1 + torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(seed))).tolist()
    context_lens = [len(k) for k, _ in sequences]
    tables = torch.zeros(len(sequences), -(-max(context_lens) // block_size), dtype=torch.int32)
    for table, (k, v) in zip(tables, sequences, strict=True):
        for t in range(len(k)):
            if t % block_size == 0:
                table[t // block_size] = free.pop()
            page = int(table[t // block_size])
            k_pages[page, t % block_size], v_pages[page, t % block_size] = k[t], v[t]
    lens = torch.tensor(context_lens, dtype=torch.int32)
    return Pages(k_pages, v_pages, tables, lens, max(context_lens))


def keys_and_values(context: int, kv_heads: int, size: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    k, v = (random(context, kv_heads, size, dtype=dtype, seed=2 * seed + i) for i in (0, 1))
    return k, v


def rounds_weights(attention: AttentionPrefill | AttentionDecode, dtype: torch.dtype) -> bool:
    """Returns whether an implementation rounds the softmax weights to dtype before it multiplies them by the values, as
    transformers does. Implementations for tensor cores and for AMX do."""
    module = getattr(attention, "__module__", "")
    tiles = "kernels.cpu" in module and dtype == torch.bfloat16 and library().level() in ("amx", EMULATED)
    return tiles or "triton" in module


def slack(attention: AttentionPrefill | AttentionDecode, dtype: torch.dtype) -> float:
    return 1e-5 + (HALF_ULP[dtype] if rounds_weights(attention, dtype) else 0.0)


def query_start(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@each_implementation("attention_prefill")
@each_pair({"size": (5, 16), "heads, kv_heads": HEADS, "block_size": (4, 16), "dtype": DTYPES})
def test_prefill_equals_the_formula(
    attention_prefill: AttentionPrefill, size: int, heads: int, kv_heads: int, block_size: int, dtype: torch.dtype
) -> None:
    contexts, lengths = [1, 16, 17, 4, 48, 33], [1, 16, 3, 1, 7, 32]
    known = [keys_and_values(context, kv_heads, size, dtype, seed) for seed, context in enumerate(contexts)]
    q = random(sum(lengths), heads, size, dtype=dtype, seed=50)
    starts = query_start(lengths)
    out = attention_prefill(q, paged(known, block_size), starts, max(lengths), SCALE)
    assert out.dtype == dtype
    for (start, end), (k, v) in zip(pairwise(starts.tolist()), known, strict=True):
        expected = oracle.attention(double(q[start:end]), double(k), double(v), SCALE)
        assert_close(out[start:end], expected, atol=slack(attention_prefill, dtype))


@each_implementation("attention_decode")
@each_pair({"heads, kv_heads": HEADS, "block_size": (4, 16), "dtype": DTYPES})
def test_decode_equals_the_formula(
    attention_decode: AttentionDecode, heads: int, kv_heads: int, block_size: int, dtype: torch.dtype
) -> None:
    contexts = [1, 4, 5, 16, 32, 33, 127, 128, 129, 160]
    known = [keys_and_values(context, kv_heads, 16, dtype, seed) for seed, context in enumerate(contexts)]
    q = random(len(contexts), heads, 16, dtype=dtype, seed=50)
    out = attention_decode(q, paged(known, block_size), SCALE)
    assert out.dtype == dtype
    for i, (k, v) in enumerate(known):
        expected = oracle.attention(double(q[i : i + 1]), double(k), double(v), SCALE)
        assert_close(out[i : i + 1], expected, atol=slack(attention_decode, dtype))


@each_implementation("attention_prefill")
def test_large_scores_do_not_overflow(attention_prefill: AttentionPrefill) -> None:
    k, v = keys_and_values(40, 1, 8, torch.float32)
    q = random(40, 2, 8, seed=9, scale=200)
    out = attention_prefill(q, paged([(k, v)], 16), query_start([40]), 40, 1.0)
    assert_close(out, oracle.attention(double(q), double(k), double(v), 1.0), atol=1e-3)


@each_implementation("attention_prefill", "attention_decode")
@each_pair({"heads, kv_heads": HEADS, "context, size": [(37, 5), (300, 16), (70, 72)], "dtype": EXACT_DTYPES})
def test_every_chunking_gives_the_same_bits(
    attention_prefill: AttentionPrefill,
    attention_decode: AttentionDecode,
    context: int,
    size: int,
    heads: int,
    kv_heads: int,
    dtype: torch.dtype,
) -> None:
    k, v = keys_and_values(context, kv_heads, size, dtype)
    q = random(context, heads, size, dtype=dtype, seed=9)

    def chunk(start: int, end: int) -> Tensor:
        pages = paged([(k[:end], v[:end])], 16, seed=end)
        return attention_prefill(q[start:end], pages, query_start([end - start]), end - start, SCALE)

    whole = chunk(0, context)
    for cuts in ([0, 1, 2, 9, context], [0, 5, 16, 17, 35, context], [0, 30, context - 1, context]):
        assert_same(torch.cat([chunk(start, end) for start, end in pairwise(cuts)]), whole)
    for t in (*range(20), context // 2, context - 2, context - 1):
        pages = paged([(k[: t + 1], v[: t + 1])], 16, seed=t)
        assert_same(attention_decode(q[t : t + 1], pages, SCALE), whole[t : t + 1])


@each_implementation("attention_prefill", "attention_decode")
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("size", [5, 200])
def test_numbers_that_are_not_finite_reach_no_earlier_token(
    attention_prefill: AttentionPrefill,
    attention_decode: AttentionDecode,
    size: int,
    heads: int,
    kv_heads: int,
    bad: float,
    dtype: torch.dtype,
) -> None:
    """Tokens that see them get what the formula gives, alone and in chunks that begin and end around them."""
    context, scale = 45, 0.05
    k, v = keys_and_values(context, kv_heads, size, dtype)
    q = random(context, heads, size, dtype=dtype, seed=9)
    # Of one element also the opposite infinity, whose sum is NaN. After the last token, nothing is left in a block.
    v[20, :, 3], v[22, 0, 3], v[context - 1, -1, -1] = bad, -bad, bad
    k[26, 0, 2] = bad

    def chunk(start: int, end: int) -> Tensor:
        pages = paged([(k[:end], v[:end])], 16, seed=end)
        return attention_prefill(q[start:end], pages, query_start([end - start]), end - start, scale)

    with np.errstate(invalid="ignore"):
        expected = oracle.attention(double(q), double(k), double(v), scale)
        whole = chunk(0, context)
        cut = [
            torch.cat([chunk(start, end) for start, end in pairwise(cuts)])
            for cuts in ([0, 20, 21, 22, context], [0, 7, 23, context - 1, context])
        ]
        ends = [1, 20, 21, 22, 23, 26, 27, context]
        pages = paged([(k[:end], v[:end]) for end in ends], 16, seed=1)
        last = [end - 1 for end in ends]
        alone = attention_decode(q[last], pages, scale)
    assert whole[:20].isfinite().all()
    assert not whole[20:, :, 3].isfinite().any()
    assert_close(whole, expected, atol=slack(attention_prefill, dtype))
    for other in cut:
        assert_same(other, whole)
    assert_same(alone, whole[last])


@each_implementation("attention_prefill", "attention_decode")
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("block_size", [4, 16])
def test_batch_mates_change_nothing(
    attention_prefill: AttentionPrefill, attention_decode: AttentionDecode, block_size: int, dtype: torch.dtype
) -> None:
    contexts, lengths = [150, 21, 64, 5], [40, 21, 1, 4]
    known = [keys_and_values(context, 2, 16, dtype, seed) for seed, context in enumerate(contexts)]
    starts = query_start(lengths)
    q = random(sum(lengths), 6, 16, dtype=dtype, seed=50)
    together = attention_prefill(q, paged(known, block_size), starts, max(lengths), SCALE)
    last = q[starts[1:].long() - 1]
    decoded = attention_decode(last, paged(known, block_size, seed=1), SCALE)
    for i, (start, end) in enumerate(pairwise(starts.tolist())):
        alone = paged(known[i : i + 1], block_size, seed=2)
        own = attention_prefill(q[start:end], alone, query_start([end - start]), end - start, SCALE)
        assert_same(own, together[start:end])
        assert_same(attention_decode(last[i : i + 1], alone, SCALE), decoded[i : i + 1])
        assert_same(decoded[i], together[end - 1])


@each_implementation("attention_prefill", "attention_decode", but="cpu")
@pytest.mark.parametrize("dtype", DTYPES)
# Triton's interpreter, unlike a GPU, reads a NaN in float8_e4m3fn as the number 480 or -480.
@pytest.mark.parametrize("spoilt", [False] if interpreted() else [False, True])
def test_pages_in_fp8(
    attention_prefill: AttentionPrefill, attention_decode: AttentionDecode, spoilt: bool, dtype: torch.dtype
) -> None:
    """As if the same numbers had been stored in the model's dtype, bit for bit."""
    contexts, lengths = [40, 5, 150], [12, 5, 1]
    narrow = [keys_and_values(n, 2, 16, torch.float8_e4m3fn, seed) for seed, n in enumerate(contexts)]
    if spoilt:
        narrow[0][1][-5] = torch.nan
    wide = [(k.to(dtype), v.to(dtype)) for k, v in narrow]
    starts, q = query_start(lengths), random(sum(lengths), 4, 16, dtype=dtype, seed=9)
    out, expected = (attention_prefill(q, paged(known, 16), starts, 12, SCALE) for known in (narrow, wide))
    assert_same(out, expected)
    assert out.isnan().flatten(1).any(1).tolist() == [spoilt and 7 <= row < 12 for row in range(sum(lengths))]
    last = starts[1:].long() - 1
    assert_same(attention_decode(q[last], paged(narrow, 16), SCALE), out[last])
