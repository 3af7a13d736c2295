"""This module computes causal attention over paged keys and values, with an online softmax.

The algorithm is FlashAttention (Dao et al. 2022, Algorithm 1).

Scores are products of a tile of TILE rows with a block of KEYS keys. The bits of a matrix product depend on its shape,
and might depend on a row's place in the tile. The shape and the place must therefore not depend on how a prompt is cut
into chunks: a tile starts at a multiple of TILE tokens of its sequence, a block starts at a multiple of KEYS tokens,
and missing rows are filled with zeros. A single decoded token thus has the same place in its tile as it has in a long
chunk.

The Q // G query heads that read one KV head share a tile. Pages are read token by token, so results do not depend on
the page size either.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from jamba_server.kernels.ops import Pages

TILE = 8  # The number of query tokens in a tile. A tile with a single token takes as much time as a full tile.
KEYS = 128  # The number of cached tokens in a block of keys.


def attention_prefill(q: Tensor, pages: Pages, query_start: Tensor, max_query_len: int, scale: float) -> Tensor:
    """See the protocol `kernels.ops.AttentionPrefill` for the arguments and the result."""
    out = torch.empty_like(q)
    bounds = itertools.pairwise(query_start.tolist())
    for i, ((start, end), context_len) in enumerate(zip(bounds, pages.context_lens.tolist(), strict=True)):
        out[start:end] = _attend(q[start:end], pages, pages.block_tables[i], context_len, scale)
    return out


def attention_decode(q: Tensor, pages: Pages, scale: float) -> Tensor:
    """See the protocol `kernels.ops.AttentionDecode` for the arguments and the result."""
    return attention_prefill(q, pages, torch.arange(len(q) + 1), 1, scale)


def _attend(q: Tensor, pages: Pages, block_table: Tensor, context_len: int, scale: float) -> Tensor:
    """Returns the attention of the last L tokens of a sequence of `context_len` tokens: float32 [L, Q, Z].

    q: [L, Q, Z], the queries of these L tokens.
    """
    first = context_len - len(q)
    lead = first % TILE
    tiles = _to_tiles(q.float() * scale, lead, kv_heads=pages.k.shape[2])
    group = q.shape[1] // pages.k.shape[2]
    tile_starts = range(first - lead, context_len, TILE)
    # For each row, the online softmax keeps the largest score, the sum of exp(score - largest score), and the sum of
    # exp(score - largest score) * value. All three are updated after each block of keys.
    maximum = tiles.new_full((*tiles.shape[:-1], 1), -torch.inf)
    weight_sum, values = torch.zeros_like(maximum), torch.zeros_like(tiles)
    offsets = torch.arange(TILE, device=q.device).repeat(group)
    for block_start in range(0, context_len, KEYS):
        k, v, key_positions = _gather(pages, block_table, block_start, context_len)
        finite = bool(v.isfinite().all())
        for i, tile_start in enumerate(tile_starts):
            if tile_start + TILE <= block_start:
                continue
            # The bits of a matrix product might depend on the memory alignment. `clone` gives all tiles the same one.
            scores = tiles[i].clone() @ k
            hidden = key_positions > tile_start + offsets[:, None]
            scores.masked_fill_(hidden, -torch.inf)
            # The first block contains key 0, which every row sees. Each row's maximum is thus finite from then on.
            new_maximum = torch.maximum(maximum[i], scores.amax(-1, keepdim=True))
            weights, rescale = torch.exp(scores - new_maximum), torch.exp(maximum[i] - new_maximum)
            weight_sum[i] = weight_sum[i] * rescale + weights.sum(-1, keepdim=True)
            product = weights @ v if finite else _product_of_visible(weights, v, hidden)
            values[i] = values[i] * rescale + product
            maximum[i] = new_maximum
    return _from_tiles(values / weight_sum, lead, len(q))


def _product_of_visible(weights: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """Returns weights @ v: [G, rows, Z]. In the product for a row, the values that the row does not see are zeros.

    The weight of such a value is zero, but the product of zero and an infinite value or NaN is NaN. weights: [G, rows,
    KEYS]; v: [G, KEYS, Z]; hidden: bool [rows, KEYS]. There is one product of the usual shape for each token of the
    tile, so a row's bits do not depend on the number of tokens that the tile holds.
    """
    product = weights.new_empty(*weights.shape[:2], v.shape[2])
    for token in range(TILE):
        visible = v.masked_fill(hidden[token, :, None], 0.0)
        product[:, token::TILE] = (weights @ visible)[:, token::TILE]
    return product


def _to_tiles(q: Tensor, lead: int, kv_heads: int) -> Tensor:
    """Splits the queries q [L, Q, Z] into tiles of TILE tokens: [number of tiles, G, (Q // G) * TILE, Z].

    The first tile starts with zeros for `lead` tokens. Zeros also fill the last tile after its last token.
    """
    length, heads, size = q.shape
    tail = -(lead + length) % TILE
    padded = torch.cat([q.new_zeros(lead, heads, size), q, q.new_zeros(tail, heads, size)])
    by_head = padded.view(-1, TILE, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)
    return by_head.reshape(len(padded) // TILE, kv_heads, -1, size)


def _from_tiles(tiles: Tensor, lead: int, length: int) -> Tensor:
    """Is the inverse of the function `_to_tiles`: returns the tokens' rows [L, Q, Z] without the padding zeros."""
    count, kv_heads, rows, size = tiles.shape
    by_row = tiles.view(count, kv_heads, rows // TILE, TILE, size).permute(0, 3, 1, 2, 4)
    return by_row.reshape(count * TILE, -1, size)[lead : lead + length]


def _gather(pages: Pages, block_table: Tensor, start: int, context_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the keys, values and positions of KEYS tokens, from position `start` on.

    The keys are float32 [G, Z, KEYS], the values float32 [G, KEYS, Z], the positions [KEYS]. For positions after the
    end of the context, the keys and values of the last token are repeated. No row sees these copies. They are used
    because their numbers are usually finite, unlike the numbers in the unused part of a page.
    """
    positions = torch.arange(start, start + KEYS, device=block_table.device)
    tokens = positions.clamp(max=context_len - 1)
    block_size = pages.k.shape[1]
    page, offset = block_table[tokens // block_size], tokens % block_size
    k, v = pages.k[page, offset].float(), pages.v[page, offset].float()
    return k.permute(1, 2, 0).contiguous(), v.transpose(0, 1).contiguous(), positions
