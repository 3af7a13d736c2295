"""Segments that move to the disk tier of another server. Works without torch.

A key depends on the cache salt of the request that has computed the segment. `Arrivals` computes the keys again for
another salt, from the token ids, so that a segment belongs to whoever brings it, and to nobody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from jamba_server.engine.cache.keys import chain
from jamba_server.engine.cache.tiers.segment import Entry, Segment
from jamba_server.engine.disk_tier.folder import SegmentFolder, opened
from jamba_server.engine.disk_tier.format import BadSegment, Header, check_layout, read_header, read_tensors


def find_chain(folder: SegmentFolder, tokens: Sequence[int], salt: str) -> list[Header]:
    """Returns the headers of the segments for the longest prefix of `tokens`, the first segment of the text first, and
    marks these files as used. Returns an empty list if there are none. Raises OSError."""
    size, there = folder.layout.block_size, folder.keys()
    key, found = sha256(salt.encode()).digest(), list[bytes]()
    for first in range(0, len(tokens) if there else 0, size):
        page = tokens[first : first + size]
        ends = [chain(key, page[:count]) for count in range(1, len(page) + 1)]
        found += [end for end in ends if end in there]
        key = ends[-1]
    for end in reversed(found):
        if headers := lineage(folder, end):
            folder.touch(header.entry.key for header in reversed(headers))
            return headers
    return []


def lineage(folder: SegmentFolder, key: bytes) -> list[Header]:
    """Returns the headers of a segment and of all segments before it, or an empty list if one of them is missing."""
    found: list[Header] = []
    while True:
        try:
            header = folder.header(key)
        except BadSegment:
            return []
        if found and header.entry.end != found[-1].entry.start:
            return []
        found.append(header)
        if not header.entry.start:
            return found[::-1]
        key = header.entry.parent


class Arrivals:
    """Takes the files of a chain of segments, the first segment of the text first, and writes them to a folder under
    the keys that they have with `salt`. `num_written` counts those that were not there yet."""

    def __init__(self, folder: SegmentFolder, salt: str) -> None:
        self.folder, self._root = folder, sha256(salt.encode()).digest()
        self._last: Entry | None = None
        self.num_written = 0

    def take(self, path: Path) -> None:
        """Reads, checks and writes one segment. The file `path` stays. Raises BadSegment if the file cannot be used, or
        does not continue the one before it, and OSError if the segment cannot be written."""
        with opened(path) as file:
            header = read_header(file)
            check_layout(header, self.folder.layout, self.folder.fingerprint)
            segment = read_tensors(file, header)
        segment = self._rekeyed(segment)
        self.folder.reserve(segment.entry)
        self.num_written += self.folder.write(segment) > 0
        if self.folder.synchronise():
            raise OSError("the system could not write it to the disk")
        self._last = segment.entry

    def _rekeyed(self, segment: Segment) -> Segment:
        entry, size, before = segment.entry, self.folder.layout.block_size, self._last
        skipped = segment.tokens[: entry.start % size]  # tokens of the first page that the segment before it has, too
        base, parent, start = (before.last, before.key, before.end) if before else (self._root, b"", 0)
        if entry.start != start or (before and parent != (chain(base, skipped) if skipped else base)):
            raise BadSegment("foreign", "it does not continue the segment before it")
        last = base
        full = len(segment.tokens) // size * size
        for first in range(0, full, size):
            last = chain(last, segment.tokens[first : first + size])
        tail = segment.tokens[full:]
        key = chain(last, tail) if tail else last
        return Segment(
            Entry(key, parent, base, last, entry.start, entry.end, entry.num_bytes), segment.tokens, segment.tensors
        )
