"""The threads of the disk tier. One writes segments and looks for segments of other servers; the other reads segments.

The engine's thread hands them work and gets `Event`s through its inbox. So neither the contents nor the speed of the
disk affect a step that has begun. Works without torch.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from jamba_server.engine.cache.tiers.events import (
    Event,
    Found,
    Ignored,
    Lost,
    Occupied,
    Opened,
    Restore,
    Restored,
    Written,
)
from jamba_server.engine.cache.tiers.segment import Segment
from jamba_server.engine.disk_tier.folder import OtherParent, SegmentFolder, key_of
from jamba_server.engine.disk_tier.format import BadSegment

logger = logging.getLogger(__name__)

SCAN_SECONDS: Final = 1.0  # how often the folder is searched for segments of other servers
# This is added to the niceness of the process. A greater number would give way more, but this thread then might hold
# the interpreter's lock while it waits for a processor, and the engine would wait with it.
NICENESS: Final = 5
EXIT_SECONDS: Final = 5.0  # a process that ends without `Worker.close` waits for each thread at most this long


class Worker:
    """A disk tier in threads of its own. `open_folder` waits until the weights' hash is known and returns the folder;
    if it raises OSError, the tier stays closed."""

    def __init__(self, open_folder: Callable[[], SegmentFolder]) -> None:
        self._post: Callable[[Event], None] = lambda event: None
        self._open_folder = open_folder
        self._folder: SegmentFolder | None = None
        self._writes: queue.SimpleQueue[Callable[[SegmentFolder | None], None] | None] = queue.SimpleQueue()
        self._reads: queue.SimpleQueue[Restore | None] = queue.SimpleQueue()
        self._opened = threading.Event()
        self._failing = False  # whether the last segment could not be written
        self._scanned = 0.0  # when the folder was searched last, by the monotonic clock
        self._writer = threading.Thread(target=self._run_writer, name="tier writer", daemon=True)
        self._reader = threading.Thread(target=self._run_reader, name="tier reader", daemon=True)

    def start(self, post: Callable[[Event], None]) -> None:
        """Starts the threads. `post` takes their events; both threads call it."""
        self._post = post
        self._writer.start()
        self._reader.start()
        # Threads that still run while the interpreter ends may end the process with an error.
        atexit.register(self._end)

    def _end(self) -> None:
        self.close(EXIT_SECONDS)
        self._reader.join(EXIT_SECONDS)

    def wait_until_open(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds until the folder has been opened, or cannot be. Returns whether that is so."""
        return self._opened.wait(timeout)

    # Called by the engine's thread ------------------------------------------------------------------------------

    def write(self, segment: Segment, *, replace: bool) -> None:
        self._writes.put(lambda folder: self._write(folder, segment, replace))

    def read(self, restore: Restore) -> None:
        self._reads.put(restore)

    def touch(self, keys: Sequence[bytes]) -> None:
        self._writes.put(lambda folder: None if folder is None else folder.touch(keys))

    def close(self, timeout: float) -> bool:
        atexit.unregister(self._end)
        deadline = time.monotonic() + timeout
        # The calling thread writes, too: on a busy machine, the thread of the lowest priority would need too long.
        while self._folder is not None and time.monotonic() < deadline:
            try:
                work = self._writes.get_nowait()
            except queue.Empty:
                break
            if work is not None:
                work(self._folder)
        self._writes.put(None)
        self._reads.put(None)
        self._writer.join(max(0.0, deadline - time.monotonic()))
        return not self._writer.is_alive()

    # The writer's thread ----------------------------------------------------------------------------------------

    def _run_writer(self) -> None:
        give_way()
        self._folder = self._open()
        self._opened.set()
        while True:
            try:
                work = self._writes.get(timeout=SCAN_SECONDS)
            except queue.Empty:
                work = self._scan
            if work is None:
                self._synchronise()
                return
            try:
                work(self._folder)
            except Exception:
                # A mistake in this module must not end the thread, because then nothing would be written any more.
                logger.exception("the disk tier of the prefix cache has met an unexpected error")
            if time.monotonic() - self._scanned > SCAN_SECONDS:
                self._scan(self._folder)

    def _open(self) -> SegmentFolder | None:
        try:
            folder = self._open_folder()
            folder.open()
        except OSError as error:
            logger.error("the disk tier of the prefix cache stays closed: %s", error)
            return None
        self._scan(folder)
        self._post(Opened(folder.fingerprint))
        return folder

    def _scan(self, folder: SegmentFolder | None) -> None:
        self._scanned = time.monotonic()
        if folder is None:
            return
        self._synchronise()
        try:
            found, gone = folder.scan(self._report)
        except OSError as error:
            if not self._failing:
                logger.warning("%s cannot be searched: %s", folder.path, error)
            self._failing = True
            return
        if found:
            self._post(Found(tuple(found)))
        if gone:
            self._post(Lost(tuple(gone)))
        if found or gone:
            self._post(Occupied(*folder.usage))

    def _synchronise(self) -> None:
        if self._folder is not None and (lost := self._folder.synchronise()):
            logger.warning("%d new segments could not be written to %s, and are deleted", len(lost), self._folder.path)
            self._post(Lost(tuple(lost)))

    def _report(self, path: Path, error: BadSegment) -> None:
        logger.warning("%s is ignored (%s): %s", path, error.reason, error)
        self._post(Ignored(error.reason))
        if (key := key_of(path.name)) is not None:
            self._post(Lost((key,), bad=True))

    def _write(self, folder: SegmentFolder | None, segment: Segment, replace: bool) -> None:
        try:
            if folder is None:
                raise OSError("the folder could not be opened")
            if gone := folder.reserve(segment.entry):
                self._post(Lost(tuple(gone)))
            written = folder.write(segment, replace=replace)
        except OSError as error:
            if not self._failing:
                logger.warning("the disk tier of the prefix cache could not write a segment: %s", error)
            self._failing = True
            self._post(Written(segment.key, 0, failed=True))
        except BaseException:
            self._post(Written(segment.key, 0, failed=True))
            raise
        else:
            self._failing = False
            self._post(Written(segment.key, written))
            self._post(Occupied(*folder.usage))

    # The reader's thread ----------------------------------------------------------------------------------------

    def _run_reader(self) -> None:
        self._opened.wait()
        while (restore := self._reads.get()) is not None:
            try:
                answer = self._read(restore)
            except Exception:
                # Without an answer, the sequence would wait for ever.
                logger.exception("the disk tier of the prefix cache has met an unexpected error")
                answer = Restored(restore, None, 0, 0.0)
            self._post(answer)

    def _read(self, restore: Restore) -> Restored:
        began, folder = time.monotonic(), self._folder
        segments: list[Segment] = []
        for wanted in restore.wanted:
            if restore.cancelled or folder is None:
                return Restored(restore, None, 0, 0.0)
            try:
                segments.append(folder.read(wanted.entry, pages=wanted.pages, state=wanted.state))
            except BadSegment as error:
                if error.reason == "missing":
                    self._post(Lost((wanted.entry.key,)))
                else:
                    self._report(folder.path_of(wanted.entry.key), error)
                if isinstance(error, OtherParent):
                    self._post(Found((error.entry,)))
                return Restored(restore, None, 0, time.monotonic() - began)
        num_bytes = sum(data.nbytes for segment in segments for data in segment.tensors.values())
        return Restored(restore, tuple(segments), num_bytes, time.monotonic() - began)


def give_way() -> None:
    """Gives the calling thread a lower priority than the threads that compute."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
