"""SegmentFolder: the files of the disk tier. Works without torch.

Each model and configuration has a folder below the given one, named after its fingerprint, and each segment a file
named after its key. A file is written under another name and renamed, so that it is either complete or not there,
whenever a server is killed. About once a second, all new files are synchronised with the disk together, which costs
much less than one by one. A file that was cut off by a loss of power before that is found by its hashes. Several
servers may use a folder at the same time without locks: whoever writes a segment that is there already leaves it as it
is, and an open file stays readable after another server has deleted it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Callable, Generator, Iterable
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Final, NamedTuple

from jamba_server.engine.cache.tiers.segment import Entry, Segment, SegmentLayout
from jamba_server.engine.disk_tier.format import (
    BadSegment,
    Header,
    check_layout,
    read_header,
    read_tensors,
    write_segment,
)

SUFFIX: Final = ".safetensors"
UNFINISHED: Final = ".part"
# A file under a temporary name is deleted when nobody has written to it for this many seconds: its writer was killed.
ABANDONED_SECONDS: Final = 600.0
LONGEST_HEADER: Final = 8192  # bytes
_CLOCK_STEP_NS: Final = 100_000_000
_MOST_OPEN: Final = 32  # the largest number of files that stay open because they are not synchronised yet


class OtherParent(BadSegment):
    """Another server has written the segment, with another segment as its parent."""

    def __init__(self, entry: Entry) -> None:
        super().__init__("missing", "another server has written it with another parent")
        self.entry = entry


class Stored(NamedTuple):
    """A file below the folder: its path, size in bytes, and when it was last used, in nanoseconds since 1970."""

    path: Path
    num_bytes: int
    used_ns: int


class Usage(NamedTuple):
    """What all models have below a folder."""

    num_bytes: int
    num_files: int


@contextlib.contextmanager
def opened(path: Path) -> Generator[BufferedReader]:
    """Opens a file for reading, regular files only. Raises BadSegment where the system raises OSError, also inside the
    `with` block."""
    try:
        # O_NONBLOCK: the opening of a named pipe must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise BadSegment("foreign", "it is not a regular file")
        with open(descriptor, "rb") as file:
            yield file
    except FileNotFoundError:
        raise BadSegment("missing", "the file is gone") from None
    except OSError as error:
        raise BadSegment("unreadable", error.strerror or str(error)) from None


def private_file(path: Path) -> BufferedWriter:
    """Opens a new file for writing, which only its owner can read. Raises OSError."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def key_of(name: str) -> bytes | None:
    """Returns the key in the name of a segment's file, or None for another name."""
    try:
        key = bytes.fromhex(name.removesuffix(SUFFIX))
    except ValueError:
        return None
    return key if len(key) == 32 and name == key.hex() + SUFFIX else None


def files_in(root: Path) -> list[Stored]:
    """Returns the files of all segments below `root`, unfinished ones included. Files of other names are left out."""
    found: list[Stored] = []
    for folder in _entries(root):
        if folder.is_dir(follow_symlinks=False):
            for file in _entries(Path(folder.path)):
                if file.name.endswith((SUFFIX, UNFINISHED)):
                    with contextlib.suppress(OSError):  # another server has deleted it meanwhile
                        info = file.stat(follow_symlinks=False)
                        if stat.S_ISREG(info.st_mode):
                            found.append(Stored(Path(file.path), info.st_size, info.st_mtime_ns))
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def collect(root: Path, limit: int, *, now: float | None = None) -> tuple[Usage, list[Path]]:
    """Deletes the least recently used files below `root` until they have at most `limit` bytes, and unfinished files
    that nobody writes any more. Returns what is left, and what was deleted. Raises OSError.

    A segment is used whenever a later one of its chain is, so the end of a conversation is deleted before its
    beginning."""
    oldest = ((time.time() if now is None else now) - ABANDONED_SECONDS) * 1e9
    files, deleted = files_in(root), list[Path]()
    total = sum(file.num_bytes for file in files)
    for file in sorted(files, key=lambda file: file.used_ns):
        if total > limit or (file.path.suffix == UNFINISHED and file.used_ns < oldest):
            with contextlib.suppress(FileNotFoundError):
                file.path.unlink()
            total -= file.num_bytes
            deleted.append(file.path)
    return Usage(total, len(files) - len(deleted)), deleted


class SegmentFolder:
    """The files of one model and configuration, whose `fingerprint` is a hexadecimal text. `max_bytes` limits what all
    models have below `root`."""

    def __init__(self, root: Path, fingerprint: str, layout: SegmentLayout, max_bytes: int) -> None:
        self.root, self.fingerprint, self.layout, self.max_bytes = root, fingerprint, layout, max_bytes
        self.path = root / fingerprint[:32]
        self.usage = Usage(0, 0)
        self._known: set[str] = set()  # names that the last scan has found, whether they can be used or not
        self._scanned = 0  # modification time of the folder at the last scan, in nanoseconds
        self._new: dict[bytes, int] = {}  # the keys of files that are not synchronised yet, with their descriptors
        self._lost: list[bytes] = []  # the keys of deleted files that the next call of `synchronise` returns
        self._tag = secrets.token_hex(4)  # tells apart the temporary names of several folder objects of a process
        self._number = 0  # how many temporary names were given
        self._counts_found = False  # whether `usage` lacks the files that the next scan will find

    def open(self) -> None:
        """Creates the folder, which only its owner can read. Raises OSError."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        self.path.chmod(0o700)
        self.usage, _ = collect(self.root, self.max_bytes)

    def path_of(self, key: bytes) -> Path:
        return self.path / (key.hex() + SUFFIX)

    def scan(self, report: Callable[[Path, BadSegment], None]) -> tuple[list[Entry], list[bytes]]:
        """Returns the segments that have come and the keys of those that have gone since the last scan. Files that
        cannot be used go to `report`, once. Raises OSError if the folder cannot be read."""
        changed = self.path.stat().st_mtime_ns
        if changed == self._scanned:
            return [], []
        names = {entry.name for entry in _entries(self.path) if entry.name.endswith(SUFFIX)}
        gone = [key for name in self._known - names if (key := key_of(name)) is not None]
        found: list[Entry] = []
        for name in sorted(names - self._known):
            try:
                found.append(self._header(self.path / name).entry)
            except BadSegment as error:
                if error.reason != "missing":
                    report(self.path / name, error)
        if self._counts_found:  # the first scan finds what `open` has counted
            size = sum(entry.num_bytes for entry in found)
            self.usage = Usage(self.usage.num_bytes + size, self.usage.num_files + len(found))
        self._counts_found = True
        # The clock of a file system has steps of some milliseconds, in which the folder may change again unnoticed.
        self._known, self._scanned = names, changed if time.time_ns() - changed > _CLOCK_STEP_NS else 0
        return found, gone

    def keys(self) -> set[bytes]:
        """Returns the keys of all files, whether they can be used or not. Raises OSError."""
        return {key for entry in _entries(self.path) if (key := key_of(entry.name)) is not None}

    def header(self, key: bytes) -> Header:
        """Reads and checks the header of a file. Raises BadSegment."""
        return self._header(self.path_of(key))

    def unfinished(self, key: bytes) -> Path:
        """Returns a new temporary name for a file, which `collect` deletes if its writer is killed."""
        self._number += 1
        return self.path / f"{key.hex()[:16]}-{os.getpid()}-{self._tag}-{self._number}{UNFINISHED}"

    def _header(self, path: Path) -> Header:
        with opened(path) as file:
            return self._checked(file, path)

    def _checked(self, file: BufferedReader, path: Path) -> Header:
        header = read_header(file)
        check_layout(header, self.layout, self.fingerprint)
        if header.entry.key != key_of(path.name):
            raise BadSegment("foreign", "its name is not that of its contents")
        return header

    def read(self, entry: Entry, *, pages: bool = True, state: bool = True) -> Segment:
        """Reads the pages, the state or both of a segment, and checks them. Raises BadSegment."""
        path = self.path_of(entry.key)
        names = {*(self.layout.page if pages else ()), *(self.layout.state if state else ())}
        with opened(path) as file:
            header = self._checked(file, path)
            if header.entry != entry:
                raise OtherParent(header.entry)
            return read_tensors(file, header, names.__contains__)

    def reserve(self, entry: Entry) -> list[bytes]:
        """Makes room for a segment, if there would be more than `max_bytes`: deletes the least recently used files, of
        whichever model. Returns the keys of this model that are gone. Raises OSError."""
        size = self.largest_file(entry.start, entry.end)
        if size > self.max_bytes:
            raise OSError(f"it has {size} bytes, and the whole tier may have {self.max_bytes} (state_cache_disk_bytes)")
        if self.usage.num_bytes + size <= self.max_bytes:
            return []
        self.usage, deleted = collect(self.root, self.max_bytes - size)
        return [key for path in deleted if path.parent == self.path and (key := key_of(path.name)) is not None]

    def largest_file(self, start: int, end: int) -> int:
        """Returns the largest size that the file of a segment with the tokens [start, end) may have, in bytes."""
        return self.layout.num_bytes(start, end) + LONGEST_HEADER

    def write(self, segment: Segment, *, replace: bool = False) -> int:
        """Writes a segment, unless it is there. Returns how many bytes were written. If `replace` is true, a file that
        is there, which cannot be used, is replaced. The file outlives the process from now on, and a loss of power
        after the next call of `synchronise`. Raises OSError."""
        path = self.path_of(segment.key)
        if not replace and os.path.lexists(path):
            return 0
        if len(self._new) >= _MOST_OPEN:
            self._lost = self.synchronise()
        unfinished = self.unfinished(segment.key)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            written = write_segment(descriptor, segment, self.layout, self.fingerprint, int(time.time()))
            os.rename(unfinished, path)
        except BaseException:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
        if (earlier := self._new.pop(segment.key, None)) is not None:
            os.close(earlier)
        self._new[segment.key] = descriptor
        self._known.add(path.name)
        self.usage = Usage(self.usage.num_bytes + written, self.usage.num_files + 1)
        return written

    def adopt(self, path: Path, entry: Entry) -> int:
        """Gives a file below the folder, which is complete and synchronised, the name of its segment, unless there is a
        file of this name. Returns how many bytes the folder has got. Raises OSError."""
        target = self.path_of(entry.key)
        if target.exists():
            return 0
        size = path.stat().st_size
        os.rename(path, target)
        self._known.add(target.name)
        self.usage = Usage(self.usage.num_bytes + size, self.usage.num_files + 1)
        return size

    def touch(self, keys: Iterable[bytes]) -> None:
        """Marks the segments of a chain as used now, the end of the conversation first. Each is marked as used a little
        later than the one before, so that the end is deleted first."""
        now = time.time_ns()
        for number, key in enumerate(keys):
            with contextlib.suppress(OSError):
                os.utime(self.path_of(key), ns=(now + 1000 * number, now + 1000 * number))

    def synchronise(self) -> list[bytes]:
        """Makes all files that were written durable, and their names. A file that the system cannot write to the disk
        is deleted. Returns the keys of deleted files."""
        new, self._new = self._new, {}
        lost, self._lost = self._lost, []
        for key, descriptor in new.items():
            try:
                os.fsync(descriptor)
            except OSError:
                lost.append(key)
                with contextlib.suppress(OSError):
                    self.path_of(key).unlink()
            finally:
                os.close(descriptor)
        if new:
            with contextlib.suppress(OSError):  # some network file systems refuse it for folders
                self._synchronise_names()
        return lost

    def _synchronise_names(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
