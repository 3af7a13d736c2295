"""Segment: the pages and the saved state of a part of a text, as the tiers keep them. Works without torch.

A conversation of several turns is a chain of segments:

    [ tokens 0 to 128, state at 128 ][ tokens 128 to 179, state at 179 ][ tokens 179 to 260, state at 260 ]

A segment has the key of the prefix that ends with its last token, and the key of the segment before it, its parent.
Pages are kept whole: if a segment begins inside a page, it has this page too, with the tokens before its first token.
So neighbouring segments share at most one page.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass

from jamba_server.engine.cache.keys import chain
from jamba_server.engine.cache.layout import DTYPE_BYTES, CacheLayout, Kept

TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Entry:
    """What a lookup needs to know of a segment, which has the tokens [start, end) of its text.

    `key` is the key of the prefix of `end` tokens. `parent` is the key of the segment that ends at `start`, or empty
    for the first segment of a text. `base` is the key of the full pages before the segment's first page, and `last` is
    the key of all full pages up to `end`; without such pages both are the hash of the request's cache salt. `num_bytes`
    is the size of the tensors.
    """

    key: bytes
    parent: bytes
    base: bytes
    last: bytes
    start: int
    end: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment with its contents: `tensors` maps the names of `SegmentLayout` to bytes. `tokens` are the token ids
    from the beginning of the segment's first page to its end. A segment that was read for its pages only has no
    tensors of the state."""

    entry: Entry
    tokens: array[int]
    tensors: Mapping[str, memoryview]

    @property
    def key(self) -> bytes:
        return self.entry.key


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """Names, shapes and dtypes of a segment's tensors. `page` has the tensors of one page, which a segment has as many
    times as it has pages. `state` has the tensors of one state."""

    block_size: int
    page: Mapping[str, Kept]
    state: Mapping[str, Kept]

    @classmethod
    def of(cls, layout: CacheLayout) -> SegmentLayout:
        pages = {name for layer in layout.layers for name in layer.page}
        slots = {name for layer in layout.layers for name in layer.slot}
        return cls(
            block_size=layout.block_size,
            page={name: layout.stacked("page", name) for name in sorted(pages)},
            state={name: layout.stacked("slot", name) for name in sorted(slots)},
        )

    def first_page(self, start: int) -> int:
        """Returns the index of the first page of a segment that begins at the token `start`."""
        return start // self.block_size

    def num_pages(self, start: int, end: int) -> int:
        return -(-end // self.block_size) - start // self.block_size

    def tensors(self, start: int, end: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns shape and dtype of each tensor of a segment, in the order of the file."""
        count = self.num_pages(start, end)
        shapes = {TOKENS: ((end - start // self.block_size * self.block_size,), "int32")}
        shapes |= {name: ((count, *kept.shape), kept.dtype) for name, kept in self.page.items()}
        shapes |= {name: (kept.shape, kept.dtype) for name, kept in self.state.items()}
        return shapes

    def num_bytes(self, start: int, end: int) -> int:
        sizes = {**DTYPE_BYTES, "int32": 4}
        return sum(math.prod(shape) * sizes[dtype] for shape, dtype in self.tensors(start, end).values())


def keys_match(segment: Segment, block_size: int) -> bool:
    """Returns whether the keys of a segment are those of its tokens. The key of a prefix depends on all of its tokens
    and on the cache salt, so a segment whose keys match belongs to the text that a lookup was for."""
    entry, tokens, key = segment.entry, segment.tokens, segment.entry.base
    skipped = entry.start % block_size
    if len(tokens) != entry.end - entry.start + skipped:
        return False
    if entry.start and entry.parent != (chain(key, tokens[:skipped]) if skipped else key):
        return False
    for first in range(0, len(tokens) // block_size * block_size, block_size):
        key = chain(key, tokens[first : first + block_size])
    tail = tokens[len(tokens) // block_size * block_size :]
    return key == entry.last and entry.key == (chain(key, tail) if tail else key)
