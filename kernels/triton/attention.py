"""These kernels compute causal attention over keys and values that are stored in pages.

The algorithms are FlashAttention (Dao et al. 2022) and Flash-Decoding (Dao 2023).

The keys of a sequence are divided into splits of SPLIT keys, from position 0, and each split into blocks of KEYS keys.
The softmax is online within a split, and splits are merged in order. Decode computes its splits in parallel and merges
them afterwards; prefill does both in one loop. Both run the same code over tiles of the same shape, so a token has the
same bits in prefill and decode.

A tile has ROWS rows: the query heads that read one KV head, of as many tokens as fit. In decode only the rows of one
token are used. The empty rows cost no time, because decode is memory-bound. With fewer rows the compiler would use
another tensor-core instruction, which adds in another order. Prefill may have twice as many rows and warps: two groups
of four warps then share the keys and values that they load. Each row stays in one warp, so its bits do not change.

A program computes its values as two halves of at most 64 columns, with one product each. For a wider product the
compiler would divide the columns among the warps instead of the rows, so that every warp would hold all queries.

A softmax weight of zero hides a key from the rows that do not see it, but zero times a value that is infinite or NaN is
NaN. Decode loads no key that its token does not see. Prefill looks for NaN in its results. If it finds one, it may
compute the tokens of the tile again, one by one, so that each token has the bits that it has in decode.
"""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.ops import Pages
from jamba_server.kernels.triton.launch import (
    EXACT,
    LOG2_E,
    capability,
    cdiv,
    dot,
    follow,
    jit,
    next_power_of_2,
    rounded,
)

# A split is a range of SPLIT consecutive keys of a sequence. A kernel sums the weighted values of each split
# separately, and then merges the sums of all splits.
SPLIT = 512
ROWS = 64  # The number of query rows in a tile, unless the function `_tile` chooses another number.
MANY_ROWS = 128  # The number of query rows in a tile of prefill on GPUs of compute capability 9.
# The largest number of output columns that a program computes. A program keeps its sums in registers, and the sums of
# more columns would not fit.
VALUES = 128
OPTIONS: dict[str, Any] = EXACT | {"num_stages": 2}
# The launch options of the decode kernel. Memory bandwidth limits decode, so the pipeline loads keys two blocks ahead.
# The other pipeline stages load the page ids of these blocks. Without the option "maxnreg", the compiler would spill
# registers so that more programs run at once.
DECODE_OPTIONS: dict[str, Any] = EXACT | {"num_stages": 6, "maxnreg": 255}
# A limit in bytes for the vector of a query head. With larger vectors, a tile of ROWS rows or 6 pipeline stages might
# not fit into shared memory.
WIDE_BYTES = 512
# The largest size in bytes of the split results that decode stores at one time. This size limits the number of
# sequences that one launch processes. A launch always processes at least one sequence.
PARTIAL_BYTES = 256 * 1024**2
# The largest number of programs of one launch in decode, unless there are more pairs of a sequence and a KV head. The
# host knows the longest context only, so most programs of a launch may have no split to compute. If a sequence has more
# splits than programs, each of its programs computes several splits.
DECODE_PROGRAMS = 4096


def attention_prefill(q: Tensor, pages: Pages, query_start: Tensor, max_query_len: int, scale: float) -> Tensor:
    """Implements the protocol `AttentionPrefill`, which is documented in the module `kernels.ops`."""
    _, heads, size = q.shape
    tile = _tile(q, pages, max_query_len)
    options = {"num_warps": 8 if tile["ROWS"] == MANY_ROWS else 4} | OPTIONS
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tiles, parts = cdiv(max_query_len, tile["ROWS"] // tile["GROUP"]), cdiv(size, VALUES)
    prefill_kernel[(tiles, pages.k.shape[2] * parts, len(query_start) - 1)](
        q, *_pages(pages), query_start, out, *q.stride()[:2], heads, scale, **tile, **options
    )
    return out


def attention_decode(q: Tensor, pages: Pages, scale: float) -> Tensor:
    """Implements the protocol `AttentionDecode`, which is documented in the module `kernels.ops`."""
    sequences, heads, size = q.shape
    tile = _tile(q, pages)
    options = OPTIONS if size * q.element_size() > WIDE_BYTES else DECODE_OPTIONS
    splits = cdiv(pages.max_context_len, SPLIT)
    at_once = min(sequences, max(1, PARTIAL_BYTES // (4 * heads * splits * (size + 2))))
    # For each split of the keys, the kernel `decode_kernel` writes the maximum score, the sum of softmax weights and
    # the weighted sum of values.
    maxima, weight_sums = (q.new_empty(at_once, heads, splits, dtype=torch.float32) for _ in range(2))
    values = q.new_empty(at_once, heads, splits, size, dtype=torch.float32)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for first in range(0, sequences, at_once):
        count = min(at_once, sequences - first)
        pairs = pages.k.shape[2] * cdiv(size, VALUES)
        programs = max(1, min(splits, DECODE_PROGRAMS // (pairs * count)))
        decode_kernel[(programs, pairs, count)](
            *(q, *_pages(pages), maxima, weight_sums, values, *q.stride()[:2], heads, scale, splits, first),
            **tile, **options,
        )  # fmt: skip
        merge_kernel[(heads, count)](
            *(maxima, weight_sums, values, pages.context_lens, out, splits, first),
            SPLIT=SPLIT, SIZE=size, BLOCK_Z=tile["BLOCK_Z"], **EXACT,
        )  # fmt: skip
    return out


def _tile(q: Tensor, pages: Pages, queries: int = 1) -> dict[str, int]:
    """Returns the sizes of a tile, for at most `queries` tokens of each sequence. Only ROWS depends on `queries`."""
    _, heads, size = q.shape
    group, block = heads // pages.k.shape[2], max(32, next_power_of_2(size))
    require(q.stride(2) == 1, "q", q, "have contiguous heads")
    require(pages.k.stride(3) == 1, "pages.k", pages.k, "have contiguous heads")
    require(pages.v.stride() == pages.k.stride(), "pages.v", pages.v, "have the strides of pages.k")
    # The variable `key_bytes` is the size in bytes of one column of a block of keys: one number of each key. On GPUs
    # whose tensor cores read keys from registers, the number of registers limits this size. The variable `large` is
    # true for GPUs of compute capability 9 and 10. The tensor cores of these GPUs process 64 rows at once, and their
    # shared memory is larger than that of other GPUs.
    large = capability()[0] in (9, 10)
    key_bytes = 64 if large and size <= VALUES else 32
    rows = ROWS if large or size * q.element_size() <= WIDE_BYTES else 16
    # With more keys in a block, the sums are rescaled less often. On GPUs of compute capability 10, a row of a larger
    # tile would be divided between two warps, and its bits would change.
    if capability()[0] == 9 and size <= VALUES and q.element_size() == 2:
        key_bytes = 128
        rows = MANY_ROWS if queries * group > ROWS else ROWS
    return {
        "SIZE": size,
        "GROUP": group,
        "BLOCK_SIZE": pages.k.shape[1],
        "ROWS": max(rows, next_power_of_2(group)),
        "BLOCK_Z": block,
        "HALF": min(block, VALUES) // 2,
        "KEYS": max(16, key_bytes // q.element_size()),
        "SPLIT": SPLIT,
    }


def _pages(pages: Pages) -> tuple[Any, ...]:
    """Returns the arguments from `k_pages` to `head_stride` that `prefill_kernel` and `decode_kernel` both take."""
    tables = pages.block_tables
    return pages.k, pages.v, tables, pages.context_lens, tables.stride(0), *pages.k.stride()[:3]


@jit(do_not_specialize=["table_stride"])
def prefill_kernel(
    q: tl.tensor, k_pages: tl.tensor, v_pages: tl.tensor,
    block_tables: tl.tensor, context_lens: tl.tensor,
    table_stride: tl.tensor, page_stride: tl.tensor, token_stride: tl.tensor, head_stride: tl.tensor,
    query_start: tl.tensor, out: tl.tensor,
    q_row_stride: tl.tensor, q_head_stride: tl.tensor, heads: tl.tensor, scale: tl.tensor,
    SIZE: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_Z: tl.constexpr, HALF: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
) -> None:  # fmt: skip
    """Computes prefill attention for one tile of query rows, over all splits of the keys.

    The grid is (tiles of the longest sequence, KV heads * parts, sequences). A part has 2 * HALF columns of the values.
    """
    follow()
    parts: tl.constexpr = (SIZE + 2 * HALF - 1) // (2 * HALF)
    sequence, kv_head, part = tl.program_id(2), tl.program_id(1) // parts, tl.program_id(1) % parts
    start = tl.load(query_start + sequence)
    length, context = tl.load(query_start + sequence + 1) - start, tl.load(context_lens + sequence)
    first = tl.program_id(0) * (ROWS // GROUP)
    if first >= length:
        return
    r, z = tl.arange(0, ROWS), tl.arange(0, BLOCK_Z)[None, :]
    t, head = first + r // GROUP, kv_head * GROUP + r % GROUP
    filled = (r // GROUP < ROWS // GROUP) & (t < length)
    at = q + (start + t).to(tl.int64)[:, None] * q_row_stride + head[:, None] * q_head_stride + z
    tile = tl.load(at, mask=filled[:, None] & (z < SIZE), other=0.0)
    # An unused row of the tile attends to one key. If an unused row attended to no key, its sum of softmax weights
    # would be zero, and the division by this sum would give NaN.
    visible = tl.where(filled, context - length + t + 1, 1)
    k_head, v_head = k_pages + kv_head * head_stride, v_pages + kv_head * head_stride
    table = block_tables + sequence.to(tl.int64) * table_stride
    column = part * (2 * HALF) + tl.arange(0, HALF)[None, :]
    # The first pass computes all tokens of the tile. If a value that some rows do not see may have made these rows NaN,
    # each further pass computes one token, and loads only the keys and values that this token sees, as decode does.
    token, end = first - 1, tl.minimum(first + ROWS // GROUP, length)
    while token < end:
        # The number of the sequence's first row is loaded again. Otherwise the compiler would compute the addresses of
        # the output before the loop, and keep them in registers while it attends.
        alone, row = token >= first, tl.load(query_start + sequence) + t
        stop = tl.where(alone, token + 1, end)
        last = context - length + stop
        weight_sum, low, high = attend_splits(
            tile, k_head, v_head, table, visible, last, column, page_stride, token_stride, scale,
            SIZE, BLOCK_SIZE, ROWS, BLOCK_Z, HALF, KEYS, SPLIT,
        )  # fmt: skip
        low, high = low / weight_sum[:, None], high / weight_sum[:, None]
        out_at = out + (row.to(tl.int64) * heads + head)[:, None] * SIZE + column
        chosen = (filled & (t >= token) & (t < stop))[:, None]
        tl.store(out_at, rounded(low, out.type.element_ty), mask=chosen & (column < SIZE))
        tl.store(out_at + HALF, rounded(high, out.type.element_ty), mask=chosen & (column + HALF < SIZE))
        again = alone
        if (token < first) & has_nan(weight_sum, low, high, filled):
            unseen = context - length + first + 1
            again = is_any_not_finite(
                tile.dtype, v_head, table, unseen, last, column, page_stride, token_stride, SIZE, BLOCK_SIZE, HALF, KEYS
            )
        token = tl.where(again, token + 1, end)


@jit(do_not_specialize=["splits", "first", "table_stride"])
def decode_kernel(
    q: tl.tensor, k_pages: tl.tensor, v_pages: tl.tensor,
    block_tables: tl.tensor, context_lens: tl.tensor,
    table_stride: tl.tensor, page_stride: tl.tensor, token_stride: tl.tensor, head_stride: tl.tensor,
    maxima: tl.tensor, weight_sums: tl.tensor, values: tl.tensor,
    q_row_stride: tl.tensor, q_head_stride: tl.tensor, heads: tl.tensor, scale: tl.tensor,
    splits: tl.tensor, first: tl.tensor,
    SIZE: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_Z: tl.constexpr, HALF: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
) -> None:  # fmt: skip
    """Computes decode attention for one token of a sequence. A program computes every n-th split of the keys, where n
    is the first size of the grid.

    The grid is (programs of a pair, KV heads * parts, sequences from `first` on). A part has 2 * HALF columns of the
    values. `splits` is the number of splits of the longest context.
    """
    follow()
    parts: tl.constexpr = (SIZE + 2 * HALF - 1) // (2 * HALF)
    sequence, kv_head, part = first + tl.program_id(2), tl.program_id(1) // parts, tl.program_id(1) % parts
    context = tl.load(context_lens + sequence)
    if tl.program_id(0) * SPLIT >= context:
        return
    r, z = tl.arange(0, ROWS), tl.arange(0, BLOCK_Z)[None, :]
    head = kv_head * GROUP + r
    at = q + sequence.to(tl.int64) * q_row_stride + head[:, None] * q_head_stride + z
    tile = tl.load(at, mask=(r < GROUP)[:, None] & (z < SIZE), other=0.0)
    visible = tl.zeros((ROWS,), tl.int32) + context
    k_head, v_head = k_pages + kv_head * head_stride, v_pages + kv_head * head_stride
    table = block_tables + sequence.to(tl.int64) * table_stride
    column = part * (2 * HALF) + tl.arange(0, HALF)[None, :]
    for start in range(tl.program_id(0) * SPLIT, context, tl.num_programs(0) * SPLIT):
        maximum, weight_sum, low, high = attend(
            tile, k_head, v_head, table, visible, start, context, column, page_stride, token_stride, scale,
            SIZE, BLOCK_SIZE, ROWS, BLOCK_Z, HALF, KEYS, SPLIT,
        )  # fmt: skip
        place = (tl.program_id(2).to(tl.int64) * heads + head) * splits + start // SPLIT
        tl.store(maxima + place, maximum, mask=r < GROUP)
        tl.store(weight_sums + place, weight_sum, mask=r < GROUP)
        values_at = values + place[:, None] * SIZE + column
        tl.store(values_at, low, mask=(r < GROUP)[:, None] & (column < SIZE))
        tl.store(values_at + HALF, high, mask=(r < GROUP)[:, None] & (column + HALF < SIZE))


@jit(do_not_specialize=["splits", "first"])
def merge_kernel(
    maxima: tl.tensor,
    weight_sums: tl.tensor,
    values: tl.tensor,
    context_lens: tl.tensor,
    out: tl.tensor,
    splits: tl.tensor,
    first: tl.tensor,
    SPLIT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_Z: tl.constexpr,
) -> None:
    """Merges the attention results of all splits of a sequence, for one query head in decode.

    The grid is (query heads, sequences from index `first` on).
    """
    follow()
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    one, z = tl.arange(0, 1), tl.arange(0, BLOCK_Z)[None, :]
    maximum, weight_sum = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32)
    merged = tl.zeros((1, BLOCK_Z), tl.float32)
    place = row * splits + one
    for _ in range(0, tl.load(context_lens + first + tl.program_id(1)), SPLIT):
        weighted = tl.load(values + place[:, None] * SIZE + z, mask=z < SIZE, other=0.0)
        maximum, weight_sum, merged = merge(
            maximum, weight_sum, merged, tl.load(maxima + place), tl.load(weight_sums + place), weighted
        )
        place += 1
    at = out + (row + first.to(tl.int64) * tl.num_programs(0)) * SIZE + z
    tl.store(at, rounded(merged / weight_sum[:, None], out.type.element_ty), mask=z < SIZE)


@jit
def attend_splits(
    q: tl.tensor, k_head: tl.tensor, v_head: tl.tensor, table: tl.tensor, visible: tl.tensor,
    last: tl.tensor, column: tl.tensor, page_stride: tl.tensor, token_stride: tl.tensor, scale: tl.tensor,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_Z: tl.constexpr, HALF: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Computes attention over all keys before `last`, and merges the splits in order.

    Returns the sum of weights and two halves of the weighted sum of values, as the function `attend` does.
    """
    maximum, weight_sum = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    low, high = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    for split in range(0, last, SPLIT):
        more_maximum, more_weight_sum, more_low, more_high = attend(
            q, k_head, v_head, table, visible, split, last, column, page_stride, token_stride, scale,
            SIZE, BLOCK_SIZE, ROWS, BLOCK_Z, HALF, KEYS, SPLIT,
        )  # fmt: skip
        _, _, low = merge(maximum, weight_sum, low, more_maximum, more_weight_sum, more_low)
        maximum, weight_sum, high = merge(maximum, weight_sum, high, more_maximum, more_weight_sum, more_high)
    return weight_sum, low, high


@jit
def has_nan(weight_sum: tl.tensor, low: tl.tensor, high: tl.tensor, filled: tl.tensor) -> tl.tensor:
    """Returns whether one of the rows `filled` holds a NaN that a value may have caused, which it should not see.

    The product of a softmax weight of zero and a value that is infinite or NaN is NaN. If the sum of a row's weights is
    NaN, keys that the row sees have caused that, and the whole row is NaN in any case.
    """
    nan = tl.max(((low != low) | (high != high)).to(tl.int32), axis=1)
    return tl.max(tl.where(filled & (weight_sum == weight_sum), nan, 0), axis=0) > 0


@jit
def is_any_not_finite(
    dtype: tl.constexpr, v_head: tl.tensor, table: tl.tensor, start: tl.tensor, end: tl.tensor, column: tl.tensor,
    page_stride: tl.tensor, token_stride: tl.tensor,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HALF: tl.constexpr, KEYS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Returns whether a value of the keys `start` to `end` - 1 is infinite or NaN, in the columns of the program."""
    found = tl.zeros((KEYS, HALF), tl.int32)
    for block in range(start, end, KEYS):
        key = block + tl.arange(0, KEYS)
        page = tl.load(table + key // BLOCK_SIZE, mask=key < end, other=0).to(tl.int64)
        v_at = v_head + (page * page_stride + key % BLOCK_SIZE * token_stride)[:, None] + column
        inside = (key < end)[:, None]
        low = tl.load(v_at, mask=inside & (column < SIZE), other=0.0).to(dtype).to(tl.float32)
        high = tl.load(v_at + HALF, mask=inside & (column + HALF < SIZE), other=0.0).to(dtype).to(tl.float32)
        # The product of zero and a number that is infinite or NaN is NaN.
        found |= ((low * 0.0 != 0.0) | (high * 0.0 != 0.0)).to(tl.int32)
    return tl.max(tl.max(found, axis=1), axis=0) > 0


@jit
def attend(
    q: tl.tensor, k_head: tl.tensor, v_head: tl.tensor, table: tl.tensor, visible: tl.tensor,
    start: tl.tensor, last: tl.tensor, column: tl.tensor,
    page_stride: tl.tensor, token_stride: tl.tensor, scale: tl.tensor,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_Z: tl.constexpr, HALF: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Computes attention over the keys of the split from position `start` on, but only over keys before `last`.

    Returns the maximum score divided by ln 2 [ROWS], the sum of weights [ROWS], and two halves of the weighted sum of
    values, each [ROWS, HALF]: the columns `column` [1, HALF] and the columns `column` + HALF. Row r of q sees the keys
    before position visible[r].
    """
    maximum, weight_sum = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    low, high = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    z = tl.arange(0, BLOCK_Z)
    for block in range(start, tl.minimum(start + SPLIT, last), KEYS):
        key = block + tl.arange(0, KEYS)
        page = tl.load(table + key // BLOCK_SIZE, mask=key < last, other=0).to(tl.int64)
        token = page * page_stride + key % BLOCK_SIZE * token_stride
        # Keys from position `last` on are not loaded. Their memory might hold NaN, and NaN times a weight of 0 is NaN.
        k = tl.load(k_head + token[None, :] + z[:, None], mask=(key < last)[None, :] & (z < SIZE)[:, None], other=0.0)
        scores = dot(q, k.to(q.dtype), tl.zeros((ROWS, KEYS), tl.float32)) * (scale * LOG2_E)
        scores = tl.where(key[None, :] < visible[:, None], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights, rescale = tl.exp2(scores - base[:, None]), tl.exp2(maximum - base)
        v_at, inside = v_head + token[:, None] + column, (key < last)[:, None]
        v_low = tl.load(v_at, mask=inside & (column < SIZE), other=0.0)
        v_high = tl.load(v_at + HALF, mask=inside & (column + HALF < SIZE), other=0.0)
        weight_sum = tl.fma(weight_sum, rescale, tl.sum(weights, axis=1))
        weights, rescale = rounded(weights, q.dtype), rescale[:, None]
        low = dot(weights, v_low.to(q.dtype), low * rescale)
        high = dot(weights, v_high.to(q.dtype), high * rescale)
        maximum = new_maximum
    return maximum, weight_sum, low, high


@jit
def merge(
    maximum: tl.tensor,
    weight_sum: tl.tensor,
    values: tl.tensor,
    more_maximum: tl.tensor,
    more_weight_sum: tl.tensor,
    more_values: tl.tensor,
) -> tuple[tl.tensor, ...]:
    """Merges the results of the function `attend` for two ranges of keys into one result for both ranges."""
    new_maximum = tl.maximum(maximum, more_maximum)
    base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    rescale, more_rescale = tl.exp2(maximum - base), tl.exp2(more_maximum - base)
    weight_sum = tl.fma(weight_sum, rescale, more_weight_sum * more_rescale)
    values = tl.fma(values, tl.broadcast_to(rescale[:, None], values.shape), more_values * more_rescale[:, None])
    return new_maximum, weight_sum, values
