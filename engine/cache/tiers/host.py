"""HostTier: segments in host memory, the least recently used of which make room for others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from jamba_server.engine.cache.tiers.segment import Segment


class HostTier:
    """Keeps segments of up to `capacity` bytes together."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.num_bytes = capacity, 0
        self._segments: OrderedDict[bytes, Segment] = OrderedDict()

    def __len__(self) -> int:
        return len(self._segments)

    def __contains__(self, key: bytes) -> bool:
        return key in self._segments

    def get(self, key: bytes) -> Segment | None:
        return self._segments.get(key)

    def put(self, segment: Segment) -> list[bytes]:
        """Keeps a segment, unless it has more bytes than the whole tier may have. Returns the keys that had to go."""
        self.remove(segment.key)
        if segment.entry.num_bytes > self.capacity:
            return []
        gone: list[bytes] = []
        while self.num_bytes + segment.entry.num_bytes > self.capacity:
            key, oldest = self._segments.popitem(last=False)
            self.num_bytes -= oldest.entry.num_bytes
            gone.append(key)
        self._segments[segment.key] = segment
        self.num_bytes += segment.entry.num_bytes
        return gone

    def remove(self, key: bytes) -> None:
        if (segment := self._segments.pop(key, None)) is not None:
            self.num_bytes -= segment.entry.num_bytes

    def touch(self, keys: Iterable[bytes]) -> None:
        """Marks segments as used, the last of `keys` as the one used last."""
        for key in keys:
            if key in self._segments:
                self._segments.move_to_end(key)
