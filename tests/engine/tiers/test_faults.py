"""The fuzz finds mistakes: each test plants one and expects that some run ends with an error."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from jamba_server.engine.cache.manager import CacheCopies, CacheManager
from jamba_server.engine.cache.tiers.cache import TieredCache
from jamba_server.engine.cache.tiers.events import Restored, Wanted
from jamba_server.engine.cache.tiers.host import HostTier
from jamba_server.engine.cache.tiers.segment import Entry, Segment
from jamba_server.engine.cache.tiers.tiers import Tiers
from jamba_server.engine.disk_tier import folder, format
from jamba_server.engine.disk_tier.format import Header
from jamba_server.engine.sequence import Sequence as Text
from tests.engine.tiers import shapes
from tests.engine.tiers.fuzz import run
from tests.engine.tiers.simulated import SimulatedMover

Patch = pytest.MonkeyPatch
CACHE: Any = TieredCache  # whose private methods are replaced


def no_salt(patch: Patch) -> None:
    """Prefixes of all cache salts have the same keys."""
    patch.setattr(CacheManager, "_root", lambda self, seq: sha256(b"").digest())


def same_fingerprint(patch: Patch) -> None:
    """Another model uses the same folder."""
    patch.setattr(shapes, "fingerprint_of", lambda model: "0" * 64)


def foreign_file(patch: Patch) -> None:
    """Nobody checks which model has written a file."""
    patch.setattr(folder, "check_layout", lambda header, layout, fingerprint: None)


def no_verification(patch: Patch) -> None:
    """Any hash is right."""

    class Text(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = str.__hash__

    class Any:
        def __init__(self, data: object) -> None: ...

        def hexdigest(self) -> str:
            return Text("0" * 64)

    patch.setattr(format, "sha256", Any)


def torn_file(patch: Patch) -> None:
    """The size of a file is not checked, and what is missing is read as zeros."""
    read = format.read_tensors

    def careless(file: Any, header: Header, wanted: Callable[[str], bool]) -> Segment:
        try:
            return read(file, header, wanted)
        except format.BadSegment:
            names = [name for name in header.tensors if name != "tokens" and wanted(name)]
            tensors = {n: memoryview(bytes(header.tensors[n].end - header.tensors[n].start)) for n in names}
            return Segment(header.entry, array("q"), tensors)

    patch.setattr(folder, "read_tensors", careless)


def page_off_by_one(patch: Patch) -> None:
    """Pages are taken from the place beside theirs."""
    sources = CACHE._sources

    def shifted(self: TieredCache, segments: Sequence[Segment], missing: Sequence[int]) -> Any:
        found = sources(self, segments, missing)
        return found and [(segment, first - (len(blocks) > 1), blocks[:-1]) for segment, first, blocks in found]

    patch.setattr(TieredCache, "_sources", shifted)


def older_page(patch: Patch) -> None:
    """A page that two segments have is taken from the earlier one, which has fewer of its tokens."""
    sources = CACHE._sources

    def forward(self: TieredCache, segments: Sequence[Segment], missing: Sequence[int]) -> Any:
        found = sources(self, segments[::-1], missing)
        return found and found[::-1]

    patch.setattr(TieredCache, "_sources", forward)


def other_position(patch: Patch) -> None:
    """A segment gets the state of the segment before it."""
    hold, last = Tiers.hold, dict[str, memoryview]()

    def swapped(self: Tiers, segment: Segment, step: int) -> None:
        state = last.get("ssm", segment.tensors["ssm"])
        last["ssm"] = segment.tensors["ssm"]
        hold(self, Segment(segment.entry, segment.tokens, {**segment.tensors, "ssm": state}), step)

    patch.setattr(Tiers, "hold", swapped)


def freed_page_is_read(patch: Patch) -> None:
    """Pages are read when the next step has been launched, which may have overwritten them."""
    read, launch = SimulatedMover.read, TieredCache.launch
    later: list[Callable[[], None]] = []

    def delayed(self: SimulatedMover, pages: Sequence[int], used: int, place: int) -> Mapping[str, memoryview]:
        found = {name: memoryview(bytearray(data)) for name, data in read(self, pages, used, place).items()}

        def fill() -> None:
            for name, data in read(self, pages, used, place).items():
                found[name][:] = data

        later.append(fill)
        return found

    def launched(self: TieredCache, copies: CacheCopies) -> None:
        for fill in later:
            fill()
        later.clear()
        launch(self, copies)

    patch.setattr(SimulatedMover, "read", delayed)
    patch.setattr(TieredCache, "launch", launched)


def used_before_complete(patch: Patch) -> None:
    """A sequence goes on while its prefix is still being read."""
    wait = CACHE._wait

    def hasty(self: Any, seq: Text, wanted: list[Wanted], hit: int) -> None:
        wait(self, seq, wanted, hit)
        shapes = [self.layout.tensors(w.entry.start, w.entry.end) for w in wanted]
        empty = [
            Segment(w.entry, array("q"), {n: memoryview(bytes(_size(s))) for n, (s, _) in shape.items()})
            for w, shape in zip(wanted, shapes, strict=True)
        ]
        self._restore(seq, wanted[-1].entry, empty)
        self.give_up(seq)

    patch.setattr(TieredCache, "_wait", hasty)


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def failed_step_is_kept(patch: Patch) -> None:
    """What a failed step has written is kept."""
    patch.setattr(Tiers, "discard", lambda self: None)


def not_confirmed(patch: Patch) -> None:
    """A segment is handed to the disk before the step that has written it is confirmed."""
    hold = Tiers.hold

    def at_once(self: Tiers, segment: Segment, step: int) -> None:
        hold(self, segment, step)
        self.confirm(step)

    patch.setattr(Tiers, "hold", at_once)


def mixed_up_tails(patch: Patch) -> None:
    """A lookup does not compare the tokens of a partly filled page, only their number."""
    find = Tiers.find

    def careless(self: Tiers, tokens: Sequence[int], hashes: Sequence[bytes], root: bytes, *, confirmed: bool) -> Any:
        for n in range(len(hashes), -1, -1):
            base = hashes[n - 1] if n else root
            for key in self.index:
                lineage = self.index.lineage(key)
                if lineage and lineage[-1].key != base == lineage[-1].last and lineage[-1].end <= len(tokens):
                    return lineage
        return find(self, tokens, hashes, root, confirmed=confirmed)

    patch.setattr(Tiers, "find", careless)


def endless_wait(patch: Patch) -> None:
    """A sequence is not told that its prefix cannot be read."""
    restored = CACHE._restored

    def silent(self: Any, event: Restored) -> None:
        if event.segments is not None:
            restored(self, event)

    patch.setattr(TieredCache, "_restored", silent)


def leaked_page(patch: Patch) -> None:
    """A page that was held during a restore is not released."""
    restore = CACHE._restore

    def leaking(self: Any, seq: Text, target: Entry, segments: Sequence[Segment]) -> float | None:
        done = restore(self, seq, target, segments)
        if done is not None and (page := self.pages.lookup(self._page_keys(seq, target.end)[0])) is not None:
            self.pages.retain([page])
        return done

    patch.setattr(TieredCache, "_restore", leaking)


def unbounded_memory(patch: Patch) -> None:
    """The host tier forgets to subtract what it gives up."""
    patch.setattr(HostTier, "remove", lambda self, key: self._segments.pop(key, None))


def skipped_ancestor(patch: Patch) -> None:
    """A page that the chain lacks is left as it is."""
    sources = CACHE._sources

    def whatever(self: TieredCache, segments: Sequence[Segment], missing: Sequence[int]) -> Any:
        return sources(self, segments[-1:], missing) or [
            (s, s.entry.start // self.block_size, list[int]()) for s in segments[-1:]
        ]

    patch.setattr(TieredCache, "_sources", whatever)


# Each mistake with the first of the seeds that are tried.
FAULTS: dict[Callable[[Patch], None], int] = {
    no_salt: 0,
    same_fingerprint: 0,
    foreign_file: 425,
    no_verification: 61,
    torn_file: 32,
    page_off_by_one: 0,
    older_page: 1,
    other_position: 0,
    freed_page_is_read: 0,
    used_before_complete: 0,
    failed_step_is_kept: 3,
    not_confirmed: 10,
    mixed_up_tails: 0,
    endless_wait: 4,
    leaked_page: 0,
    unbounded_memory: 10,
    skipped_ancestor: 0,
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_the_fuzz_finds(plant: Callable[[Patch], None], monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    plant(monkeypatch)
    for seed in range(FAULTS[plant], FAULTS[plant] + 60):
        for ahead in (False, True):
            try:
                run(seed, tmp_path / f"{seed}-{ahead}", ahead=ahead)
            except (AssertionError, KeyError):
                return
    pytest.fail("60 seeds have not found it")
