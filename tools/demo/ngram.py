"""What a model that only counts would lose on the same text: interpolated Kneser-Ney over tokens.

Kneser and Ney 1995 in the interpolated form of Chen and Goodman 1998 (section 3), one discount for each order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
BITS = 12  # of a token id; five of them fit in 64 bits


@dataclass(frozen=True, slots=True)
class Level:
    """N-grams of one length, a number each: the last token in the lowest bits. Sorted."""

    grams: Integers
    counts: Integers
    contexts: Integers  # all tokens but the last
    totals: Integers  # of the counts, by context
    kinds: Integers  # different tokens after the context
    discount: float

    @classmethod
    def of(cls, grams: Integers, counts: Integers) -> Level:
        """`grams` are sorted and distinct."""
        contexts, starts, kinds = np.unique(grams >> BITS, return_index=True, return_counts=True)
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = once / (once + 2 * twice) if once else 0.5
        return cls(grams, counts, contexts, np.add.reduceat(counts, starts), kinds, discount)

    def mix(self, grams: Integers, shorter: Floats) -> Floats:
        """Probabilities of the last tokens, given those by a context shorter by one."""
        count = found(self.grams, self.counts, grams)
        total = found(self.contexts, self.totals, grams >> BITS)
        kinds = found(self.contexts, self.kinds, grams >> BITS)
        own = np.maximum(count - self.discount, 0) + self.discount * kinds * shorter
        return np.where(total > 0, own / np.maximum(total, 1), shorter)


def found(keys: Integers, values: Integers, wanted: Integers) -> Integers:
    """The value of each wanted key, 0 where there is none."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


class NGram:
    """A model of tokens after up to `order - 1` others. A document's first token is given and fills its context."""

    def __init__(self, documents: Iterable[Sequence[int]], *, order: int, vocab_size: int) -> None:
        assert order * BITS < 64
        assert vocab_size <= 1 << BITS
        self.order, self.vocab_size = order, vocab_size
        grams = np.concatenate([self._grams(document) for document in documents])
        level = Level.of(*np.unique(grams, return_counts=True))
        self.levels = [level]  # the longest first
        for length in range(order - 1, 0, -1):
            # A shorter n-gram counts the different tokens seen before it.
            mask = (1 << BITS * length) - 1
            level = Level.of(*np.unique(level.grams & mask, return_counts=True))
            self.levels.append(level)

    def _grams(self, document: Sequence[int]) -> Integers:
        """Every token but the first, each with the `order - 1` before it."""
        ids = np.concatenate([np.full(self.order - 1, document[0]), np.asarray(document[1:])]).astype(np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(ids, self.order)
        return (windows << (BITS * np.arange(self.order - 1, -1, -1))).sum(axis=1)

    def probabilities(self, document: Sequence[int]) -> Floats:
        """Of every token but the first, in order."""
        grams = self._grams(document)
        result = np.full(len(grams), 1 / self.vocab_size)
        for length, level in enumerate(reversed(self.levels), 1):
            result = level.mix(grams & ((1 << BITS * length) - 1), result)
        return result

    def nats(self, documents: Iterable[Sequence[int]]) -> float:
        """Of all tokens but each document's first."""
        return -sum(float(np.log(self.probabilities(document)).sum()) for document in documents)
