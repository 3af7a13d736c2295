"""What the front end remembers of the prefixes that each engine has computed.

An engine's own cache knows better, but asking it would take a message and an answer before each request. The front end
has routed every prompt itself, so it knows which engine has computed it; it does not know what was evicted there. A
wrong guess costs time and changes no token.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

import xxhash

# Prefixes are told apart at every multiple of this number of tokens, as many as a page of the cache has by default.
BLOCK_TOKENS = 16
# An engine's prefixes are remembered up to this number of blocks: 2.1 million tokens, in about 20 MB.
MAX_BLOCKS = 1 << 17


def prefix_keys(tokens: Sequence[int], salt: str) -> list[int]:
    """Returns a number for each prefix of `tokens` whose length is a multiple of BLOCK_TOKENS, the shortest first.

    The number is a hash of the whole prefix and of the salt of the prefix cache. The last token is left out, because an
    engine computes it in any case. Two prefixes with the same number would only be routed alike.
    """
    digest, keys = xxhash.xxh3_64(salt.encode()), list[int]()
    words = memoryview(array("q", tokens)).cast("B")
    size = BLOCK_TOKENS * 8
    for start in range(0, len(words) - size, size):
        digest.update(words[start : start + size])
        keys.append(digest.intdigest())
    return keys


class KnownPrefixes:
    """The prefixes that one engine has computed, as keys of `prefix_keys`. At most `max_blocks` are kept; the ones not
    used for longest are forgotten first."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._keys: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def longest(self, keys: Sequence[int]) -> int:
        """Returns how many tokens the longest known prefix has."""
        low, high = 0, len(keys)
        # All shorter prefixes of a known prefix are known, too: `add` marks the shortest one as used last, so the
        # longest one is forgotten first. A binary search therefore finds the longest known prefix.
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if keys[middle - 1] in self._keys else (low, middle - 1)
        return low * BLOCK_TOKENS

    def add(self, keys: Sequence[int]) -> None:
        """Remembers all prefixes of a prompt as just used."""
        for key in reversed(keys):  # so that a long prefix is forgotten before the shorter ones that it contains
            self._keys.pop(key, None)
            self._keys[key] = None
        while len(self._keys) > self._max_blocks:
            self._keys.popitem(last=False)

    def clear(self) -> None:
        self._keys.clear()
