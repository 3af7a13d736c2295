"""Causal attention over paged keys and values, with an online softmax (Dao et al. 2022, FlashAttention, Algorithm 1).

Scores are products of a tile of TILE rows with a block of KEYS keys. A matrix product's bits depend on its shape, and
may depend on a row's place in it, so both are the same however the rows arrive: every tile starts at a multiple of TILE
tokens of its sequence and every block at a multiple of KEYS, and rows that are not there count as zeros. One token is
thus computed in the place that it has in a long chunk.

The Q // G query heads that read one KV head share its tile. Pages are read token by token, so results do not depend on
the page size either.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from jamba_server.kernels.ops import Pages

TILE = 8  # a lone token costs as much as TILE
KEYS = 128


def attention_prefill(q: Tensor, pages: Pages, query_start: Tensor, max_query_len: int, scale: float) -> Tensor:
    """See `kernels.ops.AttentionPrefill`."""
    out = torch.empty_like(q)
    bounds = itertools.pairwise(query_start.tolist())
    for i, ((start, end), context_len) in enumerate(zip(bounds, pages.context_lens.tolist(), strict=True)):
        out[start:end] = _attend(q[start:end], pages, pages.block_tables[i], context_len, scale)
    return out


def attention_decode(q: Tensor, pages: Pages, scale: float) -> Tensor:
    """See `kernels.ops.AttentionDecode`."""
    return attention_prefill(q, pages, torch.arange(len(q) + 1), 1, scale)


def _attend(q: Tensor, pages: Pages, block_table: Tensor, context_len: int, scale: float) -> Tensor:
    """The last rows q [L, Q, Z] of one sequence of context_len tokens. Returns float32 [L, Q, Z]."""
    first = context_len - len(q)
    lead = first % TILE
    tiles = _to_tiles(q.float() * scale, lead, kv_heads=pages.k.shape[2])
    group = q.shape[1] // pages.k.shape[2]
    tile_starts = range(first - lead, context_len, TILE)
    # What the online softmax carries per row: the largest score, the sum of weights, the weighted sum of values.
    peak = tiles.new_full((*tiles.shape[:-1], 1), -torch.inf)
    total, values = torch.zeros_like(peak), torch.zeros_like(tiles)
    offsets = torch.arange(TILE, device=q.device).repeat(group)
    for block_start in range(0, context_len, KEYS):
        k, v, key_positions = _gather(pages, block_table, block_start, context_len)
        for i, tile_start in enumerate(tile_starts):
            if tile_start + TILE <= block_start:
                continue
            # `clone` aligns the operand as a lone tile is aligned.
            scores = tiles[i].clone() @ k
            scores.masked_fill_(key_positions > tile_start + offsets[:, None], -torch.inf)
            # Key 0 is visible to every row, so the peak is finite from the first block on.
            new_peak = torch.maximum(peak[i], scores.amax(-1, keepdim=True))
            weights, shrink = torch.exp(scores - new_peak), torch.exp(peak[i] - new_peak)
            total[i] = total[i] * shrink + weights.sum(-1, keepdim=True)
            values[i] = values[i] * shrink + weights @ v
            peak[i] = new_peak
    return _from_tiles(values / total, lead, len(q))


def _to_tiles(q: Tensor, lead: int, kv_heads: int) -> Tensor:
    """[L, Q, Z] as [tiles, G, (Q // G) * TILE, Z]; `lead` rows of the first tile precede q, zeros fill the last."""
    length, heads, size = q.shape
    tail = -(lead + length) % TILE
    padded = torch.cat([q.new_zeros(lead, heads, size), q, q.new_zeros(tail, heads, size)])
    by_head = padded.view(-1, TILE, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)
    return by_head.reshape(len(padded) // TILE, kv_heads, -1, size)


def _from_tiles(tiles: Tensor, lead: int, length: int) -> Tensor:
    """The inverse of `_to_tiles`."""
    count, kv_heads, rows, size = tiles.shape
    by_row = tiles.view(count, kv_heads, rows // TILE, TILE, size).permute(0, 3, 1, 2, 4)
    return by_row.reshape(count * TILE, -1, size)[lead : lead + length]


def _gather(pages: Pages, block_table: Tensor, start: int, context_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """K [G, Z, KEYS] and V [G, KEYS, Z] of the tokens from `start` on in float32, and their positions [KEYS].

    Behind the context's end stands its last token again: no row sees it there, and it is finite where a page's unused
    rest may hold anything.
    """
    positions = torch.arange(start, start + KEYS, device=block_table.device)
    tokens = positions.clamp(max=context_len - 1)
    block_size = pages.k.shape[1]
    page, offset = block_table[tokens // block_size], tokens % block_size
    k, v = pages.k[page, offset].float(), pages.v[page, offset].float()
    return k.permute(1, 2, 0).contiguous(), v.transpose(0, 1).contiguous(), positions
