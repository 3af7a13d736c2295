"""Asks the operating system to read files into its page cache before they are needed. Works without torch, so that it
can begin before torch is imported, which takes longer than reading a gigabyte from a fast disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.start.machine import available_memory
from jamba_server.engine.weight_files import weight_files

# Linux reads at most a few MiB for one call, so the call is made for each piece of this size.
_PIECE: Final = 1 << 20
_WINDOW: Final = 256 << 20  # the pages that are read ahead of their use take at most this many bytes


def reading_early(model: Path, load_format: str) -> ReadAhead:
    """Returns an object that begins to read the weights of a model, before anything is known about them. The pages take
    at most half of the memory that is available. Nothing is read if the weight files are not found; what loads them
    later says so."""
    try:
        paths = [] if load_format == "dummy" else [model] if model.is_file() else weight_files(model)
    except (CheckpointError, OSError):
        paths = []
    return ReadAhead(paths, available_memory() // 2)


class ReadAhead:
    """Reads files ahead of their use, in a thread, while the object is used as a context manager. The files are used
    one after the other, each from its start to its end, and the method `used` says how far.

    An error of the operating system ends the thread and changes nothing else: the files are then read when they are
    used.
    """

    def __init__(self, paths: Sequence[Path], window: int = _WINDOW) -> None:
        self._paths, self._window = paths, window
        self._used, self._is_closed = 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def used(self, num_bytes: int) -> None:
        """Must be called with the number of bytes of all files together that have been used up to now."""
        with self._changed:
            self._used = num_bytes
            self._changed.notify()

    def _run(self) -> None:
        before = 0  # the sizes of the files that have been read
        for path in self._paths:
            try:
                with path.open("rb", buffering=0) as file:
                    size = os.fstat(file.fileno()).st_size
                    for start in range(0, size, _PIECE):
                        if not self._wait_until(before + start - self._window):
                            return
                        os.posix_fadvise(file.fileno(), start, _PIECE, os.POSIX_FADV_WILLNEED)
            except OSError:
                return
            before += size

    def _wait_until(self, num_bytes: int) -> bool:
        """Waits until `num_bytes` bytes have been used. Returns False if the object is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._used >= num_bytes)
            return not self._is_closed
