"""What the engine's thread and the disk's threads tell each other. The disk's threads are in `engine/disk_tier`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, get_args

from jamba_server.engine.cache.tiers.segment import Entry, Segment

# Why a file is not used: it ends too early or too late; its contents are not those that were written; it belongs to
# another model, format or configuration; it cannot be read; it is gone.
Reason = Literal["torn", "edited", "foreign", "unreadable", "missing"]
REASONS: tuple[Reason, ...] = get_args(Reason)


class Opened(NamedTuple):
    """The folder of the model with this fingerprint was opened."""

    fingerprint: str


class Found(NamedTuple):
    """Segments that are on the disk."""

    entries: tuple[Entry, ...]


class Lost(NamedTuple):
    """Segments that are not on the disk any more, or cannot be used. `bad` says that a file is there which must be
    replaced."""

    keys: tuple[bytes, ...]
    bad: bool = False


class Written(NamedTuple):
    """The end of an attempt to write a segment. If it is on the disk now, `failed` is false."""

    key: bytes
    num_bytes: int
    failed: bool = False


class Ignored(NamedTuple):
    """A file that cannot be used."""

    reason: Reason


class Occupied(NamedTuple):
    """What all models have in the folder."""

    num_bytes: int
    num_segments: int


class Restored(NamedTuple):
    """The end of a `Restore`: its segments in their order, or None if one of them cannot be used."""

    restore: Restore
    segments: tuple[Segment, ...] | None
    num_bytes: int
    seconds: float


Event = Opened | Found | Lost | Written | Ignored | Occupied | Restored


class Wanted(NamedTuple):
    """A segment to read: its pages, its state, or both."""

    entry: Entry
    pages: bool
    state: bool


@dataclass(eq=False, slots=True)
class Restore:
    """Segments to read. `cancelled` is set by the engine's thread when nobody waits for them any more."""

    wanted: tuple[Wanted, ...]
    cancelled: bool = field(default=False)


class Disk(Protocol):
    """What the engine's thread asks of the disk. No method waits."""

    def write(self, segment: Segment, *, replace: bool) -> None: ...

    def read(self, restore: Restore) -> None: ...

    def touch(self, keys: Sequence[bytes]) -> None:
        """Marks the segments of a chain as used, the end of the conversation first."""
        ...

    def close(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds until everything is written. Returns whether it is."""
        ...
