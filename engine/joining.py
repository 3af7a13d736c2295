"""Joining: decides whether a waiting sequence waits until a running sequence has computed the prefix that both have.

Without waiting, requests that arrive together would each compute the same prefix. A sequence waits only for a running
sequence, which gets tokens of the step budget sooner or later, so no two sequences wait for each other. The rules
depend on the order of requests and on numbers of tokens, and on no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jamba_server.engine.cache.manager import CacheManager
from jamba_server.engine.sequence import Sequence

# A sequence waits only if this saves the computation of at least this number of tokens. A step takes about as long for
# a few dozen tokens as for one token, because it reads all weights. So waiting for a shorter prefix gains nothing.
MIN_SAVED_TOKENS = 64
MAX_JUNCTIONS = 4  # places in one running prompt where states are saved for sequences that wait
# A sequence gives up waiting after the engine has scheduled this many times the prompt tokens that the prefix lacked
# when the wait began, and this many steps' budgets of prompt tokens.
MAX_WAIT, MAX_WAIT_STEPS = 4, 8


class Joining:
    """Decides which waiting sequences wait for running sequences. `budget` is the number of prompt tokens of a step."""

    def __init__(self, cache: CacheManager, budget: int, min_saved: int = MIN_SAVED_TOKENS) -> None:
        self._cache, self._budget, self.min_saved = cache, budget, min_saved

    def gate(self, running: Iterable[Sequence], work: int) -> Callable[[Sequence], bool]:
        """Returns a function that says whether a waiting sequence may start now. `running` and `work` are those of
        `must_wait`. The function is called for many waiting sequences, so it looks at few running ones."""
        prefilling = [seq for seq in running if seq.num_computed < seq.num_prompt and seq.request.cache.write]
        # A preempted sequence with a step in flight starts again when the results of the step are known.
        return lambda seq: (
            not (seq.restoring or seq.num_in_flight or (prefilling and self.must_wait(seq, prefilling, work)))
        )

    def must_wait(self, seq: Sequence, running: Iterable[Sequence], work: int) -> bool:
        """Returns whether `seq` waits for one of the running sequences, all of which write to the cache. `work` is the
        number of prompt tokens that were ever scheduled. The running sequence then saves a state where its tokens begin
        to differ from those of `seq`, unless it saves one shortly before."""
        if not self._cache.enabled or not seq.reads_cache or not seq.num_uncached:
            return False
        for other in running:
            end = self._junction(seq, other)
            if end is None:
                continue
            if not seq.has_waited:
                seq.has_waited = True
                lacking = end - other.num_computed
                seq.waits_until = work + MAX_WAIT * lacking + MAX_WAIT_STEPS * self._budget
            return work <= seq.waits_until
        return False

    def _junction(self, seq: Sequence, other: Sequence) -> int | None:
        """Returns the number of tokens after which a state for `seq` will be saved while `other` is computed, or None
        if it is not worth waiting for this state. The number is a multiple of the block size."""
        size = self._cache.block_size
        if other.num_computed >= other.num_prompt or other.order[0] > seq.order[0]:
            return None
        is_sibling = bool(seq.request.group) and seq.request.group == other.request.group
        min_saved = size if is_sibling else max(size, self.min_saved)
        start = max(len(seq.tokens) - seq.num_uncached, other.num_cached)
        limit = min(seq.num_reusable // size, other.num_prompt // size)
        ours, theirs = self._cache.all_page_keys(seq, limit), self._cache.all_page_keys(other, limit)
        shared = _common(ours, theirs, limit, at_least=(start + min_saved) // size) * size
        if shared - start < min_saved or shared <= other.num_computed:
            return None
        saved = max((p for p in self._cache.worthy_positions(other) if p <= shared), default=0)
        if shared - saved >= min_saved and len(other.junctions) < MAX_JUNCTIONS:
            other.junctions.append(shared)
            saved = shared
        return saved if saved > other.num_computed and saved - start >= min_saved else None


def _common(ours: list[bytes], theirs: list[bytes], limit: int, *, at_least: int) -> int:
    """Returns the number of equal keys among the first `limit` keys of two lists, or 0 if fewer than `at_least` are
    equal. Each key is a hash of all tokens up to it, so the lists differ from the first different key on."""
    low, high = at_least, limit
    if low > high or (low and ours[low - 1] != theirs[low - 1]):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if ours[middle - 1] == theirs[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
