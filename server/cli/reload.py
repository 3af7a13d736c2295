"""Reads files again when they change while the server runs: the API keys, and the TLS certificate with its private
key."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jamba_server.engine.errors import ConfigError

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 5.0

# A file has changed if one of these numbers has changed: its device, its inode, its size in bytes, or the time of its
# last change in ns. None stands for a file that cannot be read.
_Mark = tuple[int, int, int, int] | None


@dataclass(kw_only=True)
class Watched:
    """Files that are read together, such as a certificate and its private key. The function `read` reads the files and
    applies what they say. It raises ConfigError if the files cannot be used."""

    name: str
    paths: Sequence[str]
    read: Callable[[], None]
    marks: tuple[_Mark, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.marks = self.current_marks()

    def current_marks(self) -> tuple[_Mark, ...]:
        return tuple(map(_mark, self.paths))


class Reloader:
    """Reads watched files again when they change. If a file cannot be used, the contents that were read before stay in
    use."""

    def __init__(self, watched: Sequence[Watched]) -> None:
        self._watched = watched

    @property
    def active(self) -> bool:
        """Returns whether there is a file to watch."""
        return bool(self._watched)

    def check(self) -> None:
        """Reads those files again that have changed since they were last read."""
        for each in self._watched:
            if (marks := each.current_marks()) != each.marks:
                each.marks = marks
                self._read(each)

    def read_all(self) -> None:
        """Reads all files again, whether or not they have changed."""
        for each in self._watched:
            each.marks = each.current_marks()
            self._read(each)

    async def watch(self, interval: float = INTERVAL_SECONDS) -> None:
        """Calls `check` every `interval` seconds, until the task is cancelled."""
        while True:
            await asyncio.sleep(interval)
            self.check()

    def _read(self, each: Watched) -> None:
        try:
            each.read()
        except ConfigError as error:
            logger.error("%s not read again, so the former ones stay in use: %s", each.name, error)
        else:
            logger.info("%s read again", each.name)


def _mark(path: str) -> _Mark:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
