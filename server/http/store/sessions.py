"""The class `Sessions` keeps the names of conversations. A session is a name for the last response of a
conversation."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

# A session without a response is empty: the next request begins its conversation. `used` orders the sessions by their
# last use, and `pin` is the name under which the engine has pinned the session's prefix.
SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    response_id TEXT,
    created_at INTEGER NOT NULL,
    used INTEGER NOT NULL,
    pin TEXT,
    pinned_until INTEGER,
    PRIMARY KEY (owner, name)
) WITHOUT ROWID
"""

_COLUMNS = "name, response_id, created_at, pin, pinned_until"
_NEXT = "(SELECT coalesce(max(used), 0) + 1 FROM sessions)"


@dataclass(frozen=True, slots=True)
class Session:
    """A session: its name, the id of its last response (None: it has none), the time when it was made, the name of the
    engine's pin and the time when the pin ends. Times are in seconds since 1970."""

    name: str
    response_id: str | None
    created_at: int
    pin: str | None = None
    pinned_until: int | None = None


class Sessions:
    """The sessions of all owners in one database. Every method finds only the sessions of one owner. If an owner has
    more than `limit` sessions, those that were not used for longest are deleted."""

    def __init__(self, connection: sqlite3.Connection, limit: int) -> None:
        self._connection, self._limit = connection, limit
        connection.execute(SCHEMA)

    def list(self, owner: str) -> list[Session]:
        """Returns the owner's sessions, the most recently used first."""
        rows = self._connection.execute(f"SELECT {_COLUMNS} FROM sessions WHERE owner = ? ORDER BY used DESC", (owner,))
        return [Session(*row) for row in rows.fetchall()]

    def get(self, name: str, owner: str) -> Session | None:
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM sessions WHERE name = ? AND owner = ?", (name, owner)
        ).fetchall()
        return Session(*rows[0]) if rows else None

    def add(self, name: str, owner: str, response_id: str | None, now: int) -> bool:
        """Makes a session. Returns False, and changes nothing, if the owner has one of this name."""
        with self._connection:
            added = self._connection.execute(
                f"INSERT OR IGNORE INTO sessions VALUES (?, ?, ?, ?, {_NEXT}, NULL, NULL)",
                (owner, name, response_id, now),
            ).rowcount
            self._connection.execute(
                "DELETE FROM sessions WHERE owner = ?1 AND name NOT IN "
                "(SELECT name FROM sessions WHERE owner = ?1 ORDER BY used DESC LIMIT ?2)",
                (owner, self._limit),
            )
        return added > 0

    def move(self, name: str, owner: str, before: str | None, after: str | None) -> bool:
        """Makes `after` the last response of a session. Returns False, and changes nothing, if its last response is not
        `before`, because another request has used the session meanwhile."""
        with self._connection:
            return (
                self._connection.execute(
                    f"UPDATE sessions SET response_id = ?, used = {_NEXT} "
                    "WHERE name = ? AND owner = ? AND response_id IS ?",
                    (after, name, owner, before),
                ).rowcount
                > 0
            )

    def pin(self, name: str, owner: str, pin: str | None, until: int | None) -> Session | None:
        """Records a pin. Returns the session as it was before, or None if the owner has no session of this name."""
        with self._connection:
            before = self.get(name, owner)
            self._connection.execute(
                "UPDATE sessions SET pin = ?, pinned_until = ? WHERE name = ? AND owner = ?", (pin, until, name, owner)
            )
        return before

    def delete(self, name: str, owner: str) -> Session | None:
        """Deletes a session. Returns the session as it was before, or None if the owner has no session of this name."""
        with self._connection:
            before = self.get(name, owner)
            self._connection.execute("DELETE FROM sessions WHERE name = ? AND owner = ?", (name, owner))
        return before
