"""PageIndex: the tokens of cached pages, by the prefix that comes before each page."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

# Maximum number of pages that are remembered after one prefix. A popular prefix, such as a system message, is followed
# by a different page in each request, and only the newest of these pages are compared with a new request.
MAX_PAGES = 32

Tokens = tuple[int, ...]


class PageIndex:
    """Remembers the tokens of the pages that follow a prefix, full pages and partly filled ones. A prefix is given by
    its key in the cache.

    A page is found by the key of all tokens up to its end. The index finds also pages that begin with the tokens of a
    request and go on differently: the keys and values of the common tokens are the same.
    """

    def __init__(self, capacity: int) -> None:
        """`capacity` is the number of pages in the cache."""
        self._capacity = capacity
        self._pages: dict[bytes, deque[Tokens]] = {}

    def add(self, prefix: bytes, tokens: Tokens, is_cached: Callable[[bytes, Tokens], bool]) -> None:
        """Remembers a page with `tokens`, which follows `prefix`. Entries of pages that `is_cached` does not know any
        more are dropped when the index has become too large."""
        pages = self._pages.setdefault(prefix, deque(maxlen=MAX_PAGES))
        if tokens not in pages:
            pages.append(tokens)
        if len(self._pages) > 2 * self._capacity + 8:
            self._drop_dead(is_cached)

    def after(self, prefix: bytes) -> Iterator[Tokens]:
        """Yields the tokens of the pages that follow a prefix, the newest page first. The page may have been evicted
        meanwhile."""
        return reversed(self._pages.get(prefix, ()))

    def _drop_dead(self, is_cached: Callable[[bytes, Tokens], bool]) -> None:
        alive = {
            prefix: deque((tokens for tokens in pages if is_cached(prefix, tokens)), maxlen=MAX_PAGES)
            for prefix, pages in self._pages.items()
        }
        self._pages = {prefix: pages for prefix, pages in alive.items() if pages}


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the longest common prefix of two lists of tokens, which are at most a page long."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
