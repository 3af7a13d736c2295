"""Tiers: which segments are in host memory and on the disk, seen by the engine's thread.

A new segment is kept in host memory and handed to the disk's thread. Until it is written, it is *staged*: in memory,
but outside the budget of the host tier, within one of its own. What the threads of the disk have done comes as events,
which the engine takes from its inbox at the beginning of a step, so the same events lead to the same decisions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from jamba_server.engine.cache.tiers.events import (
    REASONS,
    Disk,
    Event,
    Found,
    Ignored,
    Lost,
    Occupied,
    Opened,
    Reason,
    Restore,
    Restored,
    Wanted,
    Written,
)
from jamba_server.engine.cache.tiers.host import HostTier
from jamba_server.engine.cache.tiers.index import SegmentIndex
from jamba_server.engine.cache.tiers.segment import Entry, Segment
from jamba_server.engine.types import TierStats

logger = logging.getLogger(__name__)

TierName = Literal["host", "disk"]
STAGING_BYTES = 1 << 30


@dataclass(slots=True)
class Counts:
    """How often a tier was used: the number of hits, and the tokens, bytes and seconds of the restores."""

    hits: int = 0
    tokens: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class Tiers:
    """Owns the segments in host memory and the index of all segments. `host_bytes` and `staging_bytes` limit what is in
    memory; `disk` is None without a disk tier.

    `is_confirmed` says of the number of a launched step whether its results have been read without an error. Before
    that, a segment that was read from the device is kept back: only later segments of its chain may refer to it.
    """

    def __init__(
        self, *, block_size: int, host_bytes: int = 0, disk: Disk | None = None, staging_bytes: int = STAGING_BYTES
    ) -> None:
        self.index = SegmentIndex(block_size)
        self.host, self.disk = HostTier(host_bytes), disk
        self._counts: dict[TierName, Counts] = {"host": Counts(), "disk": Counts()}
        self._ignored: dict[Reason, int] = dict.fromkeys(REASONS, 0)
        self._written = self._written_bytes = self._failed = self._dropped = 0
        self._disk_bytes = self._disk_segments = self._found = 0
        self._fingerprint = ""
        self.staging_bytes, self.staged_bytes = staging_bytes, 0
        self._staged: dict[bytes, Segment] = {}
        self._on_disk: set[bytes] = set()
        self._bad: set[bytes] = set()  # keys whose files cannot be used and must be replaced
        self._unconfirmed: dict[bytes, tuple[int, Segment]] = {}
        self._overflowing = False

    @property
    def num_unconfirmed(self) -> int:
        return len(self._unconfirmed)

    # New segments -----------------------------------------------------------------------------------------------

    def has(self, key: bytes) -> bool:
        """Returns whether a later request could continue from the segment, with all segments before it."""
        return self.index.lineage(key) is not None

    def has_room(self, num_bytes: int) -> bool:
        """Returns whether a new segment of this size can be kept. Counts it as dropped if not."""
        staged = self.staged_bytes + sum(segment.entry.num_bytes for _, segment in self._unconfirmed.values())
        if (self.disk is None and num_bytes <= self.host.capacity) or (
            self.disk is not None and staged + num_bytes <= self.staging_bytes
        ):
            self._overflowing = False
            return True
        if not self._overflowing and self.disk is not None:
            logger.warning(
                "a segment of %d bytes is not kept: %d bytes wait for the disk, and the limit is %d",
                num_bytes,
                staged,
                self.staging_bytes,
            )
        self._overflowing = True
        self._dropped += 1
        return False

    def hold(self, segment: Segment, step: int) -> None:
        """Takes a segment that step number `step` has written, and keeps it back until `confirm` is called for it."""
        self._unconfirmed[segment.key] = step, segment
        self.index.add(segment.entry)

    def confirm(self, step: int) -> None:
        """Keeps the segments of all steps up to `step`, whose results have been read."""
        ready = [segment for number, segment in self._unconfirmed.values() if number <= step]
        for segment in ready:
            del self._unconfirmed[segment.key]
            self._keep(segment)

    def discard(self) -> None:
        """Forgets the segments of steps that have failed."""
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        for key in unconfirmed:
            self._forget_if_gone(key)

    def _keep(self, segment: Segment) -> None:
        if self.disk is not None:
            # A file that is there already either cannot be used or has lost the segments before it.
            replace = segment.key in self._bad or segment.key in self._on_disk
            self._on_disk.discard(segment.key)
            if (earlier := self._staged.get(segment.key)) is not None:
                self.staged_bytes -= earlier.entry.num_bytes
            self._staged[segment.key] = segment
            self.staged_bytes += segment.entry.num_bytes
            self.disk.write(segment, replace=replace)
        self._put_on_host(segment)
        self.touch(segment.key)

    def _put_on_host(self, segment: Segment) -> None:
        if self.host.capacity:
            for key in self.host.put(segment):
                self._forget_if_gone(key)
        self._forget_if_gone(segment.key)

    def _forget_if_gone(self, key: bytes) -> None:
        if not (key in self.host or key in self._staged or key in self._on_disk or key in self._unconfirmed):
            self.index.remove(key)

    # Finding segments -------------------------------------------------------------------------------------------

    def find(
        self, tokens: Sequence[int], hashes: Sequence[bytes], root: bytes, *, confirmed: bool
    ) -> list[Entry] | None:
        """Returns the chain of segments for the longest prefix of `tokens`, the first segment of the text first, or
        None. If `confirmed` is true, chains with segments of unconfirmed steps are left out. `hashes` are the keys of
        the full pages of `tokens`, and `root` is the key before the first page."""

        def accepts(lineage: list[Entry]) -> bool:
            return not confirmed or not any(entry.key in self._unconfirmed for entry in lineage)

        return self.index.find(tokens, hashes, root, accepts)

    def in_memory(self, wanted: Sequence[Wanted]) -> tuple[Segment, ...] | None:
        """Returns the segments if all of them are in memory."""
        segments = [self.host.get(w.entry.key) or self._staged.get(w.entry.key) for w in wanted]
        found = tuple(segment for segment in segments if segment is not None)
        return found if len(found) == len(wanted) else None

    def read(self, wanted: Sequence[Wanted]) -> Restore:
        """Has segments read from the disk. The event `Restored` is the answer."""
        assert self.disk is not None, "a segment that is not in memory is on the disk"
        whole = bool(self.host.capacity)  # a segment that comes into the host tier must have all of its tensors
        restore = Restore(tuple(Wanted(w.entry, w.pages or whole, w.state or whole) for w in wanted))
        self.disk.read(restore)
        return restore

    def touch(self, key: bytes) -> None:
        """Marks a segment and its ancestors as used. The ancestors count as used later, so that the end of a text is
        given up before its beginning."""
        keys = [entry.key for entry in reversed(self.index.lineage(key) or [])]
        self.host.touch(keys)
        if self.disk is not None:
            self.disk.touch(keys)

    def count(self, tier: TierName, *, tokens: int, num_bytes: int, seconds: float) -> None:
        counts = self._counts[tier]
        counts.hits += 1
        counts.tokens += tokens
        counts.num_bytes += num_bytes
        counts.seconds += seconds

    def stats(self) -> TierStats:
        host, disk = self._counts["host"], self._counts["disk"]
        return TierStats(
            hits_total={"host": host.hits, "disk": disk.hits},
            hit_tokens_total={"host": host.tokens, "disk": disk.tokens},
            restored_bytes_total={"host": host.num_bytes, "disk": disk.num_bytes},
            restore_seconds_total={"host": host.seconds, "disk": disk.seconds},
            ignored_files_total={str(reason): count for reason, count in self._ignored.items()},
            written_bytes_total=self._written_bytes,
            written_segments_total=self._written,
            failed_writes_total=self._failed,
            dropped_segments_total=self._dropped,
            staged_bytes=self.staged_bytes,
            num_bytes={"host": self.host.num_bytes, "disk": self._disk_bytes},
            segments={"host": len(self.host), "disk": self._disk_segments},
            found_segments_total=self._found,
            fingerprint=self._fingerprint,
        )

    # Events of the disk's threads -------------------------------------------------------------------------------

    def take(self, event: Event, restored: Callable[[Restored], None]) -> None:
        """Records what the disk's threads have done. `restored` is called with the answer to a `Restore`."""
        match event:
            case Opened(fingerprint):
                self._fingerprint = fingerprint
            case Found(entries):
                # A file of which the HTTP process has told the engine is found again by the next search of the folder.
                self._found += sum(entry.key not in self._on_disk for entry in entries)
                for entry in entries:
                    self._on_disk.add(entry.key)
                    self._bad.discard(entry.key)
                    if not (entry.key in self.host or entry.key in self._staged or entry.key in self._unconfirmed):
                        self.index.add(entry)
            case Lost(keys, bad):
                for key in keys:
                    self._on_disk.discard(key)
                    self._forget_if_gone(key)
                self._bad.update(keys if bad else ())
            case Written():
                self._end_write(event)
            case Ignored(reason):
                self._ignored[reason] += 1
            case Occupied(num_bytes, num_segments):
                self._disk_bytes, self._disk_segments = num_bytes, num_segments
            case Restored():
                for segment in event.segments or ():
                    if self.host.capacity and segment.key in self._on_disk and segment.key not in self.host:
                        self._put_on_host(segment)
                restored(event)

    def _end_write(self, event: Written) -> None:
        if (segment := self._staged.pop(event.key, None)) is not None:
            self.staged_bytes -= segment.entry.num_bytes
        if event.failed:
            self._failed += 1
        else:
            self._written += event.num_bytes > 0
            self._written_bytes += event.num_bytes
            self._on_disk.add(event.key)
            self._bad.discard(event.key)
        self._forget_if_gone(event.key)
