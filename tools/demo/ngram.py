"""Implements an n-gram model of tokens with interpolated Kneser-Ney smoothing. The loss of the n-gram model on held-out
text is compared with the demonstration model's loss.

The method is that of Kneser and Ney 1995 in the interpolated form of Chen and Goodman 1998 (section 3), with one
discount for each length of n-gram.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
BITS = 12  # number of bits for a token id, so that the ids of a 5-gram fit in 64 bits


@dataclass(frozen=True, slots=True)
class Level:
    """All n-grams of one length that occur in the documents, in ascending order, with their counts.

    An n-gram is packed into one integer, with its last token in the lowest bits.
    """

    grams: Integers
    counts: Integers
    contexts: Integers  # the different contexts: an n-gram's context is all its tokens except the last
    totals: Integers  # for each context, the sum of the counts of the n-grams that have this context
    kinds: Integers  # for each context, the number of different tokens that follow this context
    discount: float

    @classmethod
    def of(cls, grams: Integers, counts: Integers) -> Level:
        """Returns an object `Level` with the n-grams `grams`, which must be sorted and distinct. The array `counts` has
        the count of each n-gram."""
        contexts, starts, kinds = np.unique(grams >> BITS, return_index=True, return_counts=True)
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = once / (once + 2 * twice) if once else 0.5
        return cls(grams, counts, contexts, np.add.reduceat(counts, starts), kinds, discount)

    def mix(self, grams: Integers, shorter: Floats) -> Floats:
        """Returns, for each n-gram, the probability that the n-gram's last token follows the n-gram's earlier tokens.

        `shorter` has the probabilities of the same tokens after a context that is one token shorter.
        """
        count = found(self.grams, self.counts, grams)
        total = found(self.contexts, self.totals, grams >> BITS)
        kinds = found(self.contexts, self.kinds, grams >> BITS)
        own = np.maximum(count - self.discount, 0) + self.discount * kinds * shorter
        return np.where(total > 0, own / np.maximum(total, 1), shorter)


def found(keys: Integers, values: Integers, wanted: Integers) -> Integers:
    """Looks up the keys `wanted` in the sorted array `keys`. Returns the value of each wanted key, or 0 for a wanted
    key that is not in `keys`."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


class NGram:
    """An n-gram model: predicts a token from the `order - 1` tokens before it.

    The first token of a document is not predicted. It is repeated to fill the contexts at the document's beginning.
    """

    def __init__(self, documents: Iterable[Sequence[int]], *, order: int, vocab_size: int) -> None:
        assert order * BITS < 64
        assert vocab_size <= 1 << BITS
        self.order, self.vocab_size = order, vocab_size
        grams = np.concatenate([self._grams(document) for document in documents])
        level = Level.of(*np.unique(grams, return_counts=True))
        # each level has the n-grams of one length; the levels are sorted by this length, longest n-grams first
        self.levels = [level]
        for length in range(order - 1, 0, -1):
            # In Kneser-Ney smoothing, an n-gram shorter than `order` is not counted by its occurrences. Its count is
            # the number of different tokens that occur directly before it.
            mask = (1 << BITS * length) - 1
            level = Level.of(*np.unique(level.grams & mask, return_counts=True))
            self.levels.append(level)

    def _grams(self, document: Sequence[int]) -> Integers:
        """Returns, for each token of a document except the first token, the n-gram that ends with this token, packed
        into one integer."""
        ids = np.concatenate([np.full(self.order - 1, document[0]), np.asarray(document[1:])]).astype(np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(ids, self.order)
        return (windows << (BITS * np.arange(self.order - 1, -1, -1))).sum(axis=1)

    def probabilities(self, document: Sequence[int]) -> Floats:
        """Returns the probability of each token in a document, except the first token."""
        grams = self._grams(document)
        result = np.full(len(grams), 1 / self.vocab_size)
        for length, level in enumerate(reversed(self.levels), 1):
            result = level.mix(grams & ((1 << BITS * length) - 1), result)
        return result

    def nats(self, documents: Iterable[Sequence[int]]) -> float:
        """Returns the negative log-likelihood in nats, summed over all tokens except the first token of each
        document."""
        return -sum(float(np.log(self.probabilities(document)).sum()) for document in documents)
