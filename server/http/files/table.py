"""The class `FileTable` keeps what is known of each file in SQLite. The contents are files of their own."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jamba_server.server.http.store.sqlite import open_database

VERSION = 1

# `number` grows with each new file, so it sorts the files by their age.
_SCHEMA = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    purpose TEXT NOT NULL,
    filename TEXT NOT NULL,
    size INTEGER NOT NULL,
    created INTEGER NOT NULL,
    expires INTEGER
);
CREATE INDEX files_by_owner ON files (owner, number)
"""
_COLUMNS = "id, owner, purpose, filename, size, created, expires"

Purpose = Literal["batch", "batch_output"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """What is known of a file. `owner` is the name of the owner of the API key that made it, `size` is in bytes, and
    the times are Unix times in seconds. A file whose `expires` is None is kept until it is deleted."""

    id: str
    owner: str
    purpose: Purpose
    filename: str
    size: int
    created: int
    expires: int | None


class FileTable:
    """The table of files. Its methods block, and only one thread may call them at a time. Each method is one
    transaction. Every query of a client has the owner as a parameter, so that no route can forget to check it."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the database `path`. Raises ConfigError if it cannot be used."""
        self._connection = open_database(path, _SCHEMA, VERSION)
        weakref.finalize(self, self._connection.close)

    def close(self) -> None:
        self._connection.close()

    def put(self, file: StoredFile) -> None:
        """Stores a file. A file with the same id is replaced."""
        values = (file.id, file.owner, file.purpose, file.filename, file.size, file.created, file.expires)
        self._connection.execute(f"INSERT OR REPLACE INTO files ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def get(self, id_: str, owner: str) -> StoredFile | None:
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM files WHERE id = ? AND owner = ?", (id_, owner)
        ).fetchall()
        return _stored(rows[0]) if rows else None

    def page(
        self, owner: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> list[StoredFile]:
        """Returns up to `limit` files of an owner, beginning after the file with the id `after`."""
        order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM files WHERE owner = ?1 AND (?2 IS NULL OR purpose = ?2) AND "
            f"(?3 IS NULL OR number {sign} (SELECT number FROM files WHERE id = ?3)) ORDER BY number {order} LIMIT ?4",
            (owner, purpose, after, limit),
        ).fetchall()
        return [_stored(row) for row in rows]

    def expired(self, now: int) -> list[str]:
        """Returns the ids of the files whose time has come."""
        return [id_ for (id_,) in self._connection.execute("SELECT id FROM files WHERE expires <= ?", (now,))]

    def delete(self, id_: str) -> None:
        self._connection.execute("DELETE FROM files WHERE id = ?", (id_,))

    def sizes(self) -> dict[str, int]:
        """Returns the size of each file, by its id."""
        return dict(self._connection.execute("SELECT id, size FROM files").fetchall())


def _stored(row: tuple[str, str, Purpose, str, int, int, int | None]) -> StoredFile:
    id_, owner, purpose, filename, size, created, expires = row
    return StoredFile(
        id=id_, owner=owner, purpose=purpose, filename=filename, size=size, created=created, expires=expires
    )
