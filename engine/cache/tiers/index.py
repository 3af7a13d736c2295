"""SegmentIndex: finds the segments of a text by the keys of its prefixes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from jamba_server.engine.cache.keys import chain
from jamba_server.engine.cache.tiers.segment import Entry


class SegmentIndex:
    """The segments that the tiers have, by key. A segment is *usable* if its parent and all further ancestors are in
    the index too, because only then the pages of the whole prefix are there."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._entries: dict[bytes, Entry] = {}
        # Maps the key of full pages to the segments that end inside the next page: how many of their tokens are in that
        # page, and how many segments end there.
        self._tails: dict[bytes, dict[int, int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._entries)

    def get(self, key: bytes) -> Entry | None:
        return self._entries.get(key)

    def add(self, entry: Entry) -> None:
        """Adds a segment, or replaces the segment of the same key."""
        self.remove(entry.key)
        self._entries[entry.key] = entry
        if tail := entry.end % self._block_size:
            lengths = self._tails.setdefault(entry.last, {})
            lengths[tail] = lengths.get(tail, 0) + 1

    def remove(self, key: bytes) -> None:
        if (entry := self._entries.pop(key, None)) is None:
            return
        if tail := entry.end % self._block_size:
            lengths = self._tails[entry.last]
            lengths[tail] -= 1
            if not lengths[tail]:
                del lengths[tail]
            if not lengths:
                del self._tails[entry.last]

    def lineage(self, key: bytes) -> list[Entry] | None:
        """Returns the segment of `key` and its ancestors, the first segment of the text first. Returns None if the
        segment is not usable."""
        found: list[Entry] = []
        while (entry := self._entries.get(key)) is not None:
            if found and entry.end != found[-1].start:
                return None
            found.append(entry)
            if not entry.start:
                return found[::-1]
            key = entry.parent
        return None

    def find(
        self, tokens: Sequence[int], hashes: Sequence[bytes], root: bytes, accepts: Callable[[list[Entry]], bool]
    ) -> list[Entry] | None:
        """Returns the lineage of the longest usable prefix of `tokens` which `accepts` accepts, or None. `hashes` are
        the keys of the full pages of `tokens`, and `root` is the key before the first page."""
        for key in self._candidates(tokens, hashes, root):
            if (lineage := self.lineage(key)) is not None and accepts(lineage):
                return lineage
        return None

    def _candidates(self, tokens: Sequence[int], hashes: Sequence[bytes], root: bytes) -> Iterable[bytes]:
        """Yields the keys of the segments that end a prefix of `tokens`, the longest prefix first."""
        size = self._block_size
        for n in range(len(hashes), -1, -1):
            base = hashes[n - 1] if n else root
            for tail in sorted(self._tails.get(base, ()), reverse=True):
                if n * size + tail <= len(tokens):
                    key = chain(base, tokens[n * size : n * size + tail])
                    if key in self._entries:
                        yield key
            if n and base in self._entries:
                yield base
