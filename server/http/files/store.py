"""The class `FileStore` keeps files in a folder, without blocking the event loop."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import anyio
import anyio.to_thread
from starlette.exceptions import HTTPException

from jamba_server.engine.errors import ConfigError, Overloaded, RequestRejected
from jamba_server.server.http.errors import NotStored
from jamba_server.server.http.files.table import FileTable, Purpose, StoredFile

logger = logging.getLogger(__name__)

T = TypeVar("T")

FOLDER, TABLE, LOCK = "files", "files.sqlite", "lock"
MAX_UPLOAD_BYTES = 200 * 1024**2  # the largest upload, as in OpenAI's API
LIFETIME_SECONDS = 30 * 24 * 3600  # time after which a file is deleted if the client chooses no other time
# A file counts with at least this number of bytes, so that very many small files are limited, too.
LEAST_BYTES = 4096
PART = ".part"  # ending of the names of files that are not complete


class FileStore:
    """Keeps files below the folder `data`, together at most `max_bytes` bytes.

    Every method that serves a client takes the name of an owner of API keys and finds only files of this owner. A
    thread runs the methods of the table one after the other. `now` returns the Unix time in seconds.
    """

    def __init__(self, data: Path | None, *, max_bytes: int, now: Callable[[], float] = time.time) -> None:
        """Opens the folder. If `data` is None or `max_bytes` is 0, no files are kept. Raises ConfigError if the folder
        cannot be used, or if another server uses it."""
        self.now, self._max_bytes = now, max_bytes
        self._folder = None if data is None or not max_bytes else data / FOLDER
        self._one_at_a_time = anyio.CapacityLimiter(1)
        self._table: FileTable | None = None
        self._held: BinaryIO | None = None
        self._sizes: dict[str, int] = {}  # maps the ids of all files, and of those that arrive, to their sizes
        self._lock = threading.Lock()  # threads write the files that arrive
        self.total = 0  # number of bytes that all files count together
        if self._folder is not None:
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"The folder {self._folder} cannot be made: {error.strerror}.") from error
            self._held = _hold(self._folder)
            weakref.finalize(self, self._held.close)
            self._table = FileTable(self._folder / TABLE)
            for id_, size in self._table.sizes().items():
                self._count(id_, size)
            self._remove_unknown(self._folder)

    async def close(self) -> None:
        if self._table is not None:
            await self._in_thread(self._table.close)
        if self._held is not None:
            self._held.close()

    def check_enabled(self) -> None:
        """Raises RequestRejected if the server keeps no files."""
        if self._folder is None:
            why = "--data-dir names no folder for them" if self._max_bytes else "--max-file-bytes is 0"
            raise RequestRejected(f"This server keeps no files, because {why}.", code="files_disabled")

    def path(self, id_: str) -> Path:
        """Returns where the content of a file lies."""
        assert self._folder is not None, "the caller checks that files are kept"
        return self._folder / id_

    async def get(self, id_: str, owner: str) -> StoredFile:
        """Raises NotStored if the owner has no file with this id."""
        self.check_enabled()
        if (file := await self._run(lambda table: table.get(id_, owner))) is None:
            raise NotStored("file", id_)
        return file

    async def page(
        self, owner: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> list[StoredFile]:
        """Returns up to `limit` files, beginning after the file `after`. Raises RequestRejected if the owner has no
        file `after`."""
        self.check_enabled()
        if after is not None and await self._run(lambda table: table.get(after, owner)) is None:
            raise RequestRejected(f"There is no file with the id {after[:64]!r}.", param="after")
        return await self._run(
            lambda table: table.page(owner, purpose=purpose, after=after, limit=limit, newest_first=newest_first)
        )

    async def open(self, id_: str, owner: str) -> tuple[StoredFile, BinaryIO]:
        """Returns a file and its content, which the caller must close."""
        file = await self.get(id_, owner)
        try:
            return file, await anyio.to_thread.run_sync(self.path(id_).open, "rb")  # pyright: ignore[reportReturnType]
        except FileNotFoundError:  # it was deleted meanwhile
            raise NotStored("file", id_) from None

    async def delete(self, id_: str, owner: str) -> None:
        await self.get(id_, owner)
        await self._remove(id_)

    async def expired(self) -> list[str]:
        """Returns the ids of the files whose time has come; `remove` deletes them."""
        return await self._run(lambda table: table.expired(int(self.now()))) if self._table else []

    async def remove(self, ids: Iterable[str]) -> None:
        """Deletes files of any owner."""
        for id_ in ids:
            await self._remove(id_)

    @contextmanager
    def arriving(self) -> Generator[Arriving]:
        """Context manager: a new file whose content the caller writes and then keeps with `keep`. At the end of the
        block, a file that is not kept is removed."""
        self.check_enabled()
        id_ = f"file-{uuid.uuid4().hex}"
        arriving = Arriving(self.path(id_ + PART), lambda size: self._grow(id_, size))
        try:
            yield arriving
        finally:
            if not arriving.kept:
                with contextlib.suppress(OSError, Overloaded):
                    arriving.finish()
                self._count(id_, None)
                _remove(arriving.path)

    async def keep(self, arriving: Arriving, owner: str, *, filename: str, lifetime: int | None) -> StoredFile:
        """Keeps a file that has arrived completely and is not empty."""
        assert arriving.size, "the caller refuses empty files"
        id_ = arriving.path.name.removesuffix(PART)
        file = self._new(id_, owner, "batch", filename, arriving.size, lifetime)

        def work(table: FileTable) -> None:
            arriving.finish()
            self._complete(table, arriving.path, file)
            arriving.kept = True  # here, because the task that waits for this thread may be cancelled meanwhile

        await self._run(work)
        return file

    async def put_result(
        self, id_: str, owner: str, filename: str, lines: Callable[[], Iterable[bytes]], lifetime: int | None
    ) -> None:
        """Makes the file with the results of a batch. If it exists already, because the server was killed after it had
        made the file, it is replaced. Results are kept even if files have more than `max_bytes` bytes then.

        Raises OSError or sqlite3.Error if the file cannot be written.
        """

        def work() -> None:
            assert self._table is not None, "without files there are no batches"
            path = self.path(id_ + PART)
            try:
                with _created(path) as content:
                    size = sum(content.write(line) for line in lines())
                    content.flush()
                    os.fsync(content.fileno())  # the results are deleted from the database afterwards
                self._complete(self._table, path, self._new(id_, owner, "batch_output", filename, size, lifetime))
            except BaseException:
                _remove(path)  # what was written would keep a full disk full
                raise

        await self._in_thread(work)

    def _new(
        self, id_: str, owner: str, purpose: Purpose, filename: str, size: int, lifetime: int | None
    ) -> StoredFile:
        now = int(self.now())
        expires = now + (LIFETIME_SECONDS if lifetime is None else lifetime)
        return StoredFile(
            id=id_, owner=owner, purpose=purpose, filename=filename, size=size, created=now, expires=expires
        )

    def _complete(self, table: FileTable, path: Path, file: StoredFile) -> None:
        # The content is in place before the table names it, so a kill in between leaves only a file without a name.
        final = path.with_name(file.id)
        path.rename(final)
        try:
            table.put(file)
        except BaseException:
            _remove(final)
            raise
        self._count(file.id, file.size)

    def _count(self, id_: str, size: int | None) -> None:
        """Records the size of a file, or with None that the file is gone."""
        with self._lock:
            if (before := self._sizes.pop(id_, None)) is not None:
                self.total -= max(LEAST_BYTES, before)
            if size is not None:
                self._sizes[id_] = size
                self.total += max(LEAST_BYTES, size)

    def _grow(self, id_: str, size: int) -> None:
        """Records that a file that arrives has `size` bytes now. Raises HTTPException if these are too many."""
        if size > MAX_UPLOAD_BYTES:
            raise HTTPException(413, f"The file is larger than the limit of {MAX_UPLOAD_BYTES} bytes.")
        self._count(id_, size)
        if self.total > self._max_bytes:
            raise HTTPException(
                413,
                f"All files would have more than {self._max_bytes} bytes together (--max-file-bytes). Delete files "
                "that are no longer needed.",
            )

    async def _remove(self, id_: str) -> None:
        def work(table: FileTable) -> None:
            table.delete(id_)
            self.path(id_).unlink(missing_ok=True)

        await self._run(work)
        self._count(id_, None)

    def _remove_unknown(self, folder: Path) -> None:
        """Removes contents that the table does not name: they were being written when the server was killed."""
        for path in folder.glob("file-*"):
            if path.name not in self._sizes:
                path.unlink(missing_ok=True)

    async def _run(self, work: Callable[[FileTable], T]) -> T:
        table = self._table
        assert table is not None, "the caller checks that files are kept"
        try:
            return await self._in_thread(lambda: work(table))
        except (OSError, sqlite3.Error) as error:
            logger.error("the stored files cannot be used: %s", error)
            raise Overloaded(f"The stored files cannot be used at present: {error}.") from error

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._one_at_a_time)


class Arriving:
    """A file that is being written. `size` is the number of its bytes so far, and `kept` says whether it has arrived
    completely and was kept. The function `grow` is called with the new size before bytes are written; it raises an
    exception if they are too many."""

    def __init__(self, path: Path, grow: Callable[[int], None]) -> None:
        self.path, self.size, self.kept = path, 0, False
        self._grow = grow
        self._content: BinaryIO | None = None

    def write(self, data: bytes) -> None:
        """Raises Overloaded if the disk is full."""
        self._grow(self.size + len(data))
        try:
            if self._content is None:
                self._content = _created(self.path)
            self._content.write(data)
        except OSError as error:
            raise Overloaded(f"The file cannot be stored at present: {error.strerror}.") from error
        self.size += len(data)

    def finish(self) -> None:
        """Writes what is still in memory, and closes the file. Raises OSError if the disk is full."""
        if self._content is not None:
            self._content.close()


def _hold(folder: Path) -> BinaryIO:
    """Locks a folder for this process, until the result is closed or the process ends. Otherwise two servers would run
    the same batches. Raises ConfigError if another server has the lock."""
    try:
        file = _created(folder / LOCK)
    except OSError as error:
        raise ConfigError(f"The file {folder / LOCK} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(
            f"The folder {folder} is in use by another server, so it cannot be used for files and batches: "
            f"{error.strerror}. Give this server another --data-dir, or --max-file-bytes 0."
        ) from error
    return file


def _created(path: Path) -> BinaryIO:
    """Opens a file for writing, and empties it if it exists. Only the server's user may read it, because files contain
    conversations."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb")


def _remove(path: Path) -> None:
    """Deletes a file if it is there and can be deleted."""
    with contextlib.suppress(OSError):
        path.unlink()
