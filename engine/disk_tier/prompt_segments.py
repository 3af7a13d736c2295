"""The segments of one prompt, which two servers name by the same keys. Works without torch.

The keys of a prefix depend on its tokens and on the cache salt only. So a server that has the prompt knows which key
each segment must have, which segment precedes it, and which tokens it has. From the server that has computed the prompt
it takes only the contents of the pages and states.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from jamba_server.engine.cache.keys import chain
from jamba_server.engine.cache.tiers.segment import Entry, SegmentLayout
from jamba_server.engine.disk_tier.folder import SegmentFolder, opened
from jamba_server.engine.disk_tier.format import BadSegment, check_layout, read_header, read_tensors
from jamba_server.engine.disk_tier.transfer import lineage


class PromptKeys:
    """The keys of all prefixes of a prompt whose request has the cache salt `salt`."""

    def __init__(self, tokens: Sequence[int], salt: str, layout: SegmentLayout) -> None:
        self._tokens, self._layout, size = array("q", tokens), layout, layout.block_size
        # The keys of 0, 1, 2, ... full pages.
        self._pages = [sha256(salt.encode()).digest()]
        for first in range(0, len(tokens) - size + 1, size):
            self._pages.append(chain(self._pages[-1], self._tokens[first : first + size]))

    def __len__(self) -> int:
        """Returns the number of tokens of the prompt."""
        return len(self._tokens)

    def at(self, end: int) -> bytes:
        """Returns the key of the first `end` tokens."""
        full, tail = divmod(end, self._layout.block_size)
        return chain(self._pages[full], self._tokens[end - tail : end]) if tail else self._pages[full]

    def entry(self, start: int, end: int) -> Entry:
        """Returns what the header of the segment with the tokens [start, end) must say."""
        size = self._layout.block_size
        return Entry(
            key=self.at(end),
            parent=self.at(start) if start else b"",
            base=self._pages[start // size],
            last=self._pages[end // size],
            start=start,
            end=end,
            num_bytes=self._layout.num_bytes(start, end),
        )


def has_prefix(folder: SegmentFolder, keys: PromptKeys, least: int) -> bool:
    """Returns whether the folder has all segments of a prefix of at least `least` tokens of the prompt. Only headers
    are read."""
    for end in range(len(keys), max(least, 1) - 1, -1):
        key = keys.at(end)
        if folder.path_of(key).exists() and lineage(folder, key):
            return True
    return least <= 0


def take_file(folder: SegmentFolder, path: Path, expected: Entry) -> None:
    """Checks a file below the folder that has come from another server, and gives it the name of its segment. The file
    outlives the process from now on, as one of `SegmentFolder.write` does.

    Raises BadSegment if the file is not that of the segment `expected`, whole and unchanged, and OSError if it cannot
    be kept."""
    with opened(path) as file:
        header = read_header(file)
        check_layout(header, folder.layout, folder.fingerprint)
        if header.entry != expected:
            raise BadSegment("foreign", "it is not the segment that was asked for")
        read_tensors(file, header)
        folder.reserve(expected)
        os.fsync(file.fileno())
        folder.adopt(path, expected)
