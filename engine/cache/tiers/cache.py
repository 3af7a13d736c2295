"""TieredCache: a prefix cache that keeps in other tiers what the device may lose, and gets it back from there.

A state that is saved, at the end of a turn or inside a prompt, is read from the device together with the pages since
the segment before it (`_park`). A waiting sequence whose prefix is in a tier, and longer there than on the device, has
this prefix written to free pages and a free slot of the device (`seek`), where the usual lookup then finds it. Only
pages and slots that no running sequence owns are used for this, so running sequences always win.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from jamba_server.engine.cache.manager import CacheCopies, CacheManager, Save
from jamba_server.engine.cache.state_store import SlotStates
from jamba_server.engine.cache.tiers.events import Event, Restore, Restored, Wanted
from jamba_server.engine.cache.tiers.segment import Entry, Segment, SegmentLayout
from jamba_server.engine.cache.tiers.tiers import TierName, Tiers
from jamba_server.engine.sequence import RestoredPrefix
from jamba_server.engine.sequence import Sequence as Text
from jamba_server.engine.types import TierStats

logger = logging.getLogger(__name__)

# The largest number of restores for one sequence. After that the sequence is computed, whatever the tiers have. Without
# this limit it might wait for ever, because a restored prefix may be evicted before the sequence runs, or a file may
# turn out to be unusable.
MAX_RESTORES: Final = 3


class Mover(Protocol):
    """Copies pages and states between the device and host memory. A copy is ordered after all launched steps and before
    all later ones."""

    def read(self, pages: Sequence[int], used: int, place: int) -> Mapping[str, memoryview]:
        """Returns the contents of pages and of the state at `place` of the store. Only the first `used` tokens of the
        pages have been written for this text; what follows them is replaced by zeros."""
        ...

    def write(self, contents: Sequence[tuple[Segment, Sequence[tuple[int, int]]]], slot: int | None) -> float:
        """Writes contents of segments to pages of the device: for each segment, pairs of (index of the page in the
        segment, id of the page). The state of the last segment is written to `slot`, unless this is None. Returns
        how many seconds that took, for statistics."""
        ...


@dataclass(eq=False, slots=True)
class _Waiting:
    """Sequences that wait for the segment of `target`. `hit` is the number of tokens that the device had."""

    target: Entry
    restore: Restore
    sequences: list[Text]
    hit: int


class TieredCache(CacheManager):
    """A cache manager with tiers. `layout` gives the sizes of segments."""

    def __init__(self, store: SlotStates, tiers: Tiers, mover: Mover, layout: SegmentLayout, **sizes: Any) -> None:
        super().__init__(store, **sizes)
        self.store: SlotStates = store
        self.tiers, self.mover, self.layout = tiers, mover, layout
        self._launched = self._finished = 0  # the numbers of the last step that was launched, and confirmed
        self._waiting: dict[bytes, _Waiting] = {}

    @property
    def is_restoring(self) -> bool:
        return bool(self._waiting)

    # Keeping what was computed ----------------------------------------------------------------------------------

    def free(self, seq: Text) -> None:
        position = seq.num_computed
        super().free(seq)
        # The pages and the slot are free now, but nothing has been written to them yet.
        if position:
            self._park(seq, position)

    def launch(self, copies: CacheCopies) -> None:
        saves = [(save.sequence, save.position) for save in self._saves]
        super().launch(copies)
        self._launched += 1
        for seq, position in saves:
            self._park(seq, position, least=max(self.block_size, self.interval // 16))

    def confirm(self) -> None:
        super().confirm()
        self._finished += 1
        self.tiers.confirm(self._finished)

    def discard(self) -> None:
        super().discard()
        self.tiers.discard()
        self._finished = self._launched

    def _park(self, seq: Text, position: int, *, least: int = 1) -> None:
        """Reads the state of `seq` at `position` from the device, with the pages since the segment before it. Does
        nothing if the segment is there, has fewer than `least` tokens, or if anything of it is not on the device."""
        if not self.enabled or not seq.request.cache.write or self.tiers.has(key := self._key(seq, position)):
            return
        before = self._in_tiers(seq, position - 1, confirmed=False)
        start, parent = (before[-1].end, before[-1].key) if before else (0, b"")
        if position - start < least or (place := self.store.find(key)) is None:
            return
        if not self.tiers.has_room(num_bytes := self.layout.num_bytes(start, position)):
            return
        first = start // self.block_size
        pages = [self.pages.lookup(name) for name in self._page_keys(seq, position)[first:]]
        if any(page is None for page in pages):
            return
        hashes, count = self.page_keys(seq, position // self.block_size), position - first * self.block_size
        root = self._root(seq)
        entry = Entry(
            key=key,
            parent=parent,
            base=hashes[first - 1] if first else root,
            last=hashes[-1] if hashes else root,
            start=start,
            end=position,
            num_bytes=num_bytes,
        )
        tensors = self.mover.read([page for page in pages if page is not None], count, place)
        tokens = seq.tokens[first * self.block_size : position]
        self.tiers.hold(Segment(entry, tokens, tensors), self._launched)
        self.tiers.confirm(self._finished)

    def _page_keys(self, seq: Text, position: int) -> list[bytes]:
        """Returns the keys of the pages of the first `position` tokens, a partly filled one included."""
        hashes = self.page_keys(seq, position // self.block_size)
        return [*hashes, self._key(seq, position)] if position % self.block_size else hashes

    def _in_tiers(self, seq: Text, limit: int, *, confirmed: bool) -> list[Entry] | None:
        hashes = self.page_keys(seq, limit // self.block_size)
        return self.tiers.find(seq.tokens[:limit], hashes, self._root(seq), confirmed=confirmed)

    # Bringing prefixes back to the device -----------------------------------------------------------------------

    def expect(self, seq: Text) -> int:
        """Returns how many tokens of a new sequence will be found in the cache. If they are on the disk, they are read
        from now on, while the sequence waits."""
        hit = super().expect(seq)
        if (lineage := self._better(seq, hit)) is None:
            return hit
        wanted = self._wanted(seq, lineage)
        if self.tiers.in_memory(wanted) is None:
            self._wait(seq, wanted, hit)
        return lineage[-1].end

    def seek(self, seq: Text) -> bool:
        """Called when a sequence is about to start. If a tier has a longer prefix of the sequence than the device,
        brings this prefix to the device. Returns whether the sequence must wait, because segments have to be read from
        the disk first."""
        if seq.restoring or not self.tiers.index:
            return seq.restoring
        hit = self.match(seq).num_tokens
        if (lineage := self._better(seq, hit)) is None:
            return False
        wanted = self._wanted(seq, lineage)
        if (segments := self.tiers.in_memory(wanted)) is None:
            self._wait(seq, wanted, hit)
            return True
        seq.num_restores += 1
        if (seconds := self._restore(seq, lineage[-1], segments)) is not None:
            self._count("host", lineage[-1], hit, segments, seconds, [seq])
        return False

    def _better(self, seq: Text, hit: int) -> list[Entry] | None:
        """Returns the chain of segments to restore for `seq`, whose first `hit` tokens the device has. Returns None if
        the chain would bring less than a page of further tokens, or if `seq` has had MAX_RESTORES restores."""
        if not self.enabled or seq.num_reusable <= 0 or seq.num_restores >= MAX_RESTORES:
            return None
        lineage = self._in_tiers(seq, seq.num_reusable, confirmed=True)
        return lineage if lineage is not None and lineage[-1].end - hit >= self.block_size else None

    def _wait(self, seq: Text, wanted: list[Wanted], hit: int) -> None:
        target = wanted[-1].entry
        if (waiting := self._waiting.get(target.key)) is None:
            waiting = self._waiting[target.key] = _Waiting(target, self.tiers.read(wanted), [], hit)
        waiting.sequences.append(seq)
        seq.restoring = True
        seq.num_restores += 1

    def _wanted(self, seq: Text, lineage: list[Entry]) -> list[Wanted]:
        """Returns what must be read of a chain: the pages that the device lacks, and the last state."""
        there = 0
        for key in self.page_keys(seq, lineage[-1].end // self.block_size):
            if self.pages.lookup(key) is None:
                break
            there += self.block_size
        ancestors = [Wanted(entry, True, False) for entry in lineage[:-1] if entry.end > there]
        return [*ancestors, Wanted(lineage[-1], True, True)]

    def give_up(self, seq: Text) -> None:
        """Must be called when a sequence that waits for a restore ends."""
        for key, waiting in list(self._waiting.items()):
            if seq in waiting.sequences:
                waiting.sequences.remove(seq)
                if not waiting.sequences:
                    waiting.restore.cancelled = True
                    del self._waiting[key]
        seq.restoring = False

    def take(self, event: Event) -> None:
        self.tiers.take(event, self._restored)

    def close(self, timeout: float) -> None:
        if self.tiers.disk is not None and not self.tiers.disk.close(timeout):
            logger.warning("the disk tier has not written everything within %g s", timeout)

    @property
    def tier_stats(self) -> TierStats:
        return self.tiers.stats()

    def _restored(self, event: Restored) -> None:
        target = event.restore.wanted[-1].entry
        waiting = self._waiting.get(target.key)
        if waiting is None or waiting.restore is not event.restore:
            return  # nobody waits for it any more
        del self._waiting[target.key]
        for seq in waiting.sequences:
            seq.restoring = False
        if event.segments is None:
            return
        if (seconds := self._restore(waiting.sequences[0], target, event.segments)) is not None:
            seconds += event.seconds
            self._count("disk", target, waiting.hit, event.segments, seconds, waiting.sequences)

    def _count(
        self,
        tier: TierName,
        target: Entry,
        hit: int,
        segments: Sequence[Segment],
        seconds: float,
        sequences: Sequence[Text],
    ) -> None:
        """Counts a prefix that has come from a tier, and records it in the sequences that it was brought for."""
        for seq in sequences:
            seq.restored = RestoredPrefix(tier, target.end, seconds)
        num_bytes = sum(data.nbytes for segment in segments for data in segment.tensors.values())
        self.tiers.count(tier, tokens=target.end - hit, num_bytes=num_bytes, seconds=seconds)
        self.tiers.touch(target.key)

    def _restore(self, seq: Text, target: Entry, segments: Sequence[Segment]) -> float | None:
        """Writes a prefix of `seq` to free pages and a free slot, and makes it findable. Returns how many seconds the
        writing took, or None, and does nothing, if too few of them are free, or if a page that is in none of `segments`
        was evicted meanwhile."""
        keys = self._page_keys(seq, target.end)
        if self.store.find(target.key) is not None and all(self.pages.lookup(key) is not None for key in keys):
            return None
        held = {i: page for i, key in enumerate(keys) if (page := self.pages.lookup(key)) is not None}
        there, missing = list(held.values()), [i for i in range(len(keys)) if i not in held]
        sources = self._sources(segments, missing)
        # The next step runs copies that were planned earlier. The prefix is written now, before these copies, so it
        # must not be written to their destinations.
        taken = {destination for _, destination in self._page_copies}
        if sources is None or len(missing) > self.pages.num_free - sum(self.pages.refs[page] == 0 for page in there):
            return None
        self.pages.retain(there)  # so that the next call does not evict these pages to get free ones
        fresh = self.pages.allocate(len(missing))
        assert fresh is not None, "the free pages were counted above"
        room = None if self.store.find(target.key) is not None else self.store.reserve(target.key)
        overwritten = taken.intersection(fresh) or (room is not None and room.slot in self.store.pending_slots)
        if overwritten or (room is None and self.store.find(target.key) is None):
            self.pages.release([*fresh, *there])
            self.slots.release([] if room is None else [room.slot])
            return None
        pages = dict(zip(missing, fresh, strict=True))
        contents = [(segment, [(i - first, pages[i]) for i in blocks]) for segment, first, blocks in sources]
        seconds = self.mover.write(contents, None if room is None else room.slot)
        for i, page in pages.items():
            self.pages.publish(page, keys[i])
        if room is not None:
            self._publish_state(Save(seq, target.end, room))
            self.slots.release([room.slot])
        # As in `free`: the last page is released first, so that it is evicted first.
        self.pages.release(reversed([pages[i] if i in pages else held[i] for i in range(len(keys))]))
        return seconds

    def _sources(
        self, segments: Sequence[Segment], missing: Sequence[int]
    ) -> list[tuple[Segment, int, list[int]]] | None:
        """Returns for each segment the index of its first page in the text, and which of the `missing` pages are taken
        from it. A page that two segments have is taken from the later one, which has more of its tokens. The last
        segment is always listed, for its state. Returns None if a page is in no segment."""
        left, found = set(missing), list[tuple[Segment, int, list[int]]]()
        for segment in reversed(segments):
            first = segment.entry.start // self.block_size
            blocks = [i for i in range(first, -(-segment.entry.end // self.block_size)) if i in left]
            left -= set(blocks)
            found.append((segment, first, blocks))
        return None if left else found[::-1]
